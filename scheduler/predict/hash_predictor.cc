#include <algorithm>

#include "scheduler/predict/predictor.h"

namespace thermocline::sched {
namespace {

class HashPredictor final : public ExpertPredictor {
 public:
  HashPredictor(std::span<const int32_t> table, int layers, int64_t vocabulary, int top_k)
      : table_(table), layers_(layers), vocabulary_(vocabulary), top_k_(top_k) {}

  void guess(int layer, const Known& known, int most, std::vector<Guess>& out) override {
    out.clear();
    if (layer >= layers_ || known.token_id < 0 || known.token_id >= vocabulary_) return;
    const int32_t* const row = table_.data() + (layer * vocabulary_ + known.token_id) * top_k_;
    for (int k = 0; k < std::min(top_k_, most); ++k) out.push_back({static_cast<uint16_t>(row[k]), 1});
  }
  void observe(int, const Known&, std::span<const TracePick>) override {}

 private:
  const std::span<const int32_t> table_;
  const int layers_;
  const int64_t vocabulary_;
  const int top_k_;
};

}  // namespace

std::unique_ptr<ExpertPredictor> make_hash_predictor(std::span<const int32_t> table, int layers, int64_t vocabulary,
                                                     int top_k) {
  return std::make_unique<HashPredictor>(table, layers, vocabulary, top_k);
}

}  // namespace thermocline::sched
