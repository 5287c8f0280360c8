// MemoryPlan: what an engine is going to take, by tier and owner, against what there is. Written before the first byte
// of a weight is read, so that what cannot fit is refused in a second, with the numbers, instead of killed in an hour.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::sched {

/// Of the host, beside weights, KV and buffers: tokenizer, requests, connections, code. An estimate.
inline constexpr uint64_t kProgramBytes = uint64_t{128} << 20;

class MemoryPlan {
 public:
  static constexpr int kHost = -1, kDisk = -2;  // tiers; others are devices, by number
  static std::string tier_name(int tier);

  /// What a tier has, and who says so ("what the machine has free"). A tier without a capacity holds anything.
  void set_capacity(int tier, uint64_t bytes, std::string source);
  struct Row {
    int tier = kHost;
    std::string owner;
    uint64_t bytes = 0;
    std::string advice;
  };

  /// `advice` is what makes the row smaller: "lower --max-model-len".
  void add(int tier, std::string owner, uint64_t bytes, std::string advice = "");

  const std::vector<Row>& rows() const { return rows_; }
  uint64_t planned_bytes(int tier) const;
  /// Of an owner, in all tiers together.
  uint64_t owner_bytes(std::string_view owner) const;
  /// What the tier has beyond the plan; 0 where more is planned than there is, all of uint64_t without a capacity.
  uint64_t room(int tier) const;

  /// Errors: out_of_memory with the whole table, the first row that does not fit marked, and the advice of the rows of
  /// its tier.
  Status check() const;
  /// A table a tier: owner, bytes, and the bytes up to there.
  std::string to_string() const;

 private:
  struct Tier {
    int number = kHost;
    bool bounded = false;
    uint64_t capacity = 0;
    std::string source;
  };
  Tier& tier(int number);
  const Tier* find(int number) const;
  /// The first row of a tier at which the sum passes the capacity, or null.
  const Row* first_too_large(const Tier& tier) const;
  std::string table(const Tier& tier, size_t owner_width) const;

  std::vector<Tier> tiers_;  // in the order they were named
  std::vector<Row> rows_;
};

}  // namespace thermocline::sched
