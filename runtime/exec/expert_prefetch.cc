#include "runtime/exec/expert_prefetch.h"

#include <algorithm>
#include <iterator>

namespace thermocline {

Result<ExpertPrefetch::Mode> ExpertPrefetch::parse(std::string_view name) {
  if (name == "off") return Mode::off;
  if (name == "auto") return Mode::automatic;
  if (name == "on") return Mode::on;
  return invalid("unknown prefetch mode '" + std::string(name) + "': use off, auto or on");
}

bool ExpertPrefetch::on(int64_t tokens) const {
  return o_.mode != Mode::off && tokens <= sched::Referee::kMostTokens && (o_.mode == Mode::on || referee_.on());
}

void ExpertPrefetch::stage(const cpu::CpuContext& cpu, std::span<const cpu::ExpertWeights> experts,
                           std::span<const int32_t> guesses, const std::function<bool(int32_t)>& missing,
                           const std::function<bool()>& stop) {
  // As many of the likeliest as all workers' caches hold, then by their ids.
  const auto most = static_cast<size_t>(o_.worker_bytes * cpu.pool.size() / static_cast<int64_t>(experts[0].bytes()));
  in_turn_.clear();
  for (const int32_t e : guesses) {
    if (in_turn_.size() >= most) break;
    if (e < 0 || e >= static_cast<int32_t>(experts.size()) || staged_[static_cast<size_t>(e)] || !missing(e)) continue;
    staged_[static_cast<size_t>(e)] = true;
    in_turn_.push_back(e);
  }
  if (in_turn_.empty()) return;
  std::sort(in_turn_.begin(), in_turn_.end());
  weights_.clear();
  for (const int32_t e : in_turn_) weights_.push_back(&experts[static_cast<size_t>(e)]);
  count_ += static_cast<int64_t>(in_turn_.size());
  whole_ += cpu::stage_experts(cpu, weights_, o_.worker_bytes, stop);
}

void ExpertPrefetch::missed(std::span<const int32_t> ids) {
  if (in_turn_.empty()) return;
  for (const int32_t id : ids) {
    if (id < 0 || id >= std::ssize(staged_) || !staged_[static_cast<size_t>(id)]) continue;
    staged_[static_cast<size_t>(id)] = false;
    ++right_;
  }
  for (const int32_t e : in_turn_) staged_[static_cast<size_t>(e)] = false;
  in_turn_.clear();
}

void ExpertPrefetch::stepped(int64_t tokens, double ns, int64_t now_ns) {
  if (o_.mode == Mode::automatic && tokens <= sched::Referee::kMostTokens) referee_.step(tokens, ns, now_ns);
}

}  // namespace thermocline
