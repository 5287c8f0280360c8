// LRU, over all layers and layer by layer, and FreeToken's rule on top of the first.
#include "scheduler/placement/scored_policy.h"

namespace thermocline::sched {
namespace {

class LruPolicy : public ScoredPolicy {
 public:
  using ScoredPolicy::ScoredPolicy;

 protected:
  void count(const ExpertUse& use, const StepUses&) override { scores_[at(use.id)] = static_cast<double>(step_); }
};

class LruLayerPolicy final : public LruPolicy {
 public:
  using LruPolicy::LruPolicy;

 protected:
  int group(const ExpertId& id) const override { return id.layer; }
  int groups() const override { return o_.layers; }
};

// A share of a layer's misses is fetched by the step itself; these take the slots of what was used longest ago.
class FreetokenPolicy final : public LruPolicy {
 public:
  using LruPolicy::LruPolicy;
  double demand_share() const override { return o_.demand_share; }

 protected:
  void counted(const StepUses& step) override { fetched_.assign(step.fetched.begin(), step.fetched.end()); }
  bool wanted(const ExpertId& id) const override {
    return std::find(fetched_.begin(), fetched_.end(), id) != fetched_.end();
  }

 private:
  std::vector<ExpertId> fetched_;
};

}  // namespace

std::unique_ptr<ExpertPolicy> make_lru_policy(const PolicyOptions& o) { return std::make_unique<LruPolicy>(o); }
std::unique_ptr<ExpertPolicy> make_lru_layer_policy(const PolicyOptions& o) {
  return std::make_unique<LruLayerPolicy>(o);
}
std::unique_ptr<ExpertPolicy> make_freetoken_policy(const PolicyOptions& o) {
  return std::make_unique<FreetokenPolicy>(o);
}

}  // namespace thermocline::sched
