#include "scheduler/plan/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

namespace thermocline::sched {
namespace {

std::string size_text(uint64_t bytes) {
  const double mib = static_cast<double>(bytes) / (1 << 20);
  return mib < 1000 ? fmt::format("{:.1f} MiB", mib) : fmt::format("{:.2f} GiB", mib / 1024);
}

}  // namespace

std::string MemoryPlan::tier_name(int tier) {
  return tier == kHost ? "host" : tier == kDisk ? "disk" : fmt::format("device {}", tier);
}

MemoryPlan::Tier& MemoryPlan::tier(int number) {
  if (const Tier* known = find(number)) return const_cast<Tier&>(*known);
  tiers_.emplace_back().number = number;
  return tiers_.back();
}

const MemoryPlan::Tier* MemoryPlan::find(int number) const {
  const auto at = std::find_if(tiers_.begin(), tiers_.end(), [&](const Tier& t) { return t.number == number; });
  return at == tiers_.end() ? nullptr : &*at;
}

void MemoryPlan::set_capacity(int number, uint64_t bytes, std::string source) {
  Tier& t = tier(number);
  t.bounded = true;
  t.capacity = bytes;
  t.source = std::move(source);
}

void MemoryPlan::add(int number, std::string owner, uint64_t bytes, std::string advice) {
  tier(number);
  rows_.push_back({number, std::move(owner), bytes, std::move(advice)});
}

uint64_t MemoryPlan::planned_bytes(int number) const {
  uint64_t bytes = 0;
  for (const Row& row : rows_)
    if (row.tier == number) bytes += row.bytes;
  return bytes;
}

uint64_t MemoryPlan::owner_bytes(std::string_view owner) const {
  uint64_t bytes = 0;
  for (const Row& row : rows_)
    if (row.owner == owner) bytes += row.bytes;
  return bytes;
}

uint64_t MemoryPlan::room(int number) const {
  const Tier* const t = find(number);
  if (!t || !t->bounded) return std::numeric_limits<uint64_t>::max();
  return t->capacity - std::min(t->capacity, planned_bytes(number));
}

const MemoryPlan::Row* MemoryPlan::first_too_large(const Tier& t) const {
  uint64_t sum = 0;
  for (const Row& row : rows_)
    if (row.tier == t.number && t.bounded && (sum += row.bytes) > t.capacity) return &row;
  return nullptr;
}

std::string MemoryPlan::table(const Tier& t, size_t owner_width) const {
  std::string text = fmt::format("{}: {}{}\n", tier_name(t.number), t.bounded ? size_text(t.capacity) : "unbounded",
                                 t.source.empty() ? "" : ", " + t.source);
  const Row* const large = first_too_large(t);
  uint64_t sum = 0;
  for (const Row& row : rows_) {
    if (row.tier != t.number) continue;
    sum += row.bytes;
    text += fmt::format("  {:<{}}  {:>12}  {:>12}{}\n", row.owner, owner_width, size_text(row.bytes), size_text(sum),
                        &row == large ? "  <- does not fit" : "");
  }
  return text;
}

std::string MemoryPlan::to_string() const {
  size_t width = 0;
  for (const Row& row : rows_) width = std::max(width, row.owner.size());
  std::string text;
  for (const Tier& t : tiers_) text += table(t, width);
  return text;
}

Status MemoryPlan::check() const {
  for (const Tier& t : tiers_) {
    const Row* const large = first_too_large(t);
    if (!large) continue;
    std::string advice;
    for (const Row& row : rows_)
      if (row.tier == t.number && !row.advice.empty() && advice.find(row.advice) == std::string::npos)
        advice += (advice.empty() ? "" : "; or ") + row.advice;
    return Error{ErrorCode::out_of_memory,
                 fmt::format("not enough memory on {}: {} needed, {} there; what does not fit: {}\n{}{}",
                             t.number == kHost ? "the host" : tier_name(t.number), size_text(planned_bytes(t.number)),
                             size_text(t.capacity), large->owner, to_string(), advice)};
  }
  return {};
}

}  // namespace thermocline::sched
