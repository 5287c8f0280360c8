#include "scheduler/plan/what_if.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>

namespace thermocline::sched {
namespace {

constexpr double kGibibyte = 1 << 30;
constexpr double kUsualDisk = 7e9;  // bytes a second, of a PCIe 4.0 one

const DecodeSpeed& of_batch(const BoxPlan& plan, int batch) {
  return *std::find_if(plan.decode.begin(), plan.decode.end(), [&](const DecodeSpeed& d) { return d.batch == batch; });
}

double percent(double now, double then) { return now > 0 ? 100 * (then / now - 1) : 0; }

class WhatIfs {
 public:
  WhatIfs(const BoxQuestion& question, const BoxPlan& plan) : q_(question), now_(plan) {}

  void add(std::string change, const BoxQuestion& other) {
    const BoxPlan then = plan_box(other);
    WhatIf w{.change = std::move(change),
             .fits = then.refusal.empty(),
             .decode_percent =
                 percent(of_batch(now_, q_.batch).tokens_per_second, of_batch(then, other.batch).tokens_per_second),
             .prefill_percent = percent(now_.prefill.tokens_per_second, then.prefill.tokens_per_second)};
    const bool same = std::abs(w.decode_percent) < 1 && std::abs(w.prefill_percent) < 1;
    if (w.fits != now_.refusal.empty() || (w.fits && !same)) found_.push_back(std::move(w));
  }
  std::vector<WhatIf> take() { return std::move(found_); }

 private:
  const BoxQuestion& q_;
  const BoxPlan& now_;
  std::vector<WhatIf> found_;
};

void more_memory(WhatIfs& found, const BoxQuestion& q, const BoxPlan& plan) {
  const double needed = static_cast<double>(plan.memory.planned_bytes(MemoryPlan::kHost)),
               short_of = needed - q.machine.cpu.memory_bytes;
  if (q.machine.cpu.memory_bytes <= 0 || short_of <= 0) return;
  BoxQuestion other = q;
  const double more = 64 * std::ceil(short_of / (64 * kGibibyte));
  other.machine.cpu.memory_bytes += more * kGibibyte;
  found.add(fmt::format("+{:.0f} GiB RAM", more), other);
}

void a_disk(WhatIfs& found, const BoxQuestion& q) {
  if (q.model.table_bytes <= 0 || q.machine.disk.read_bytes_per_second > 0) return;
  BoxQuestion other = q;
  other.machine.disk.read_bytes_per_second = kUsualDisk;
  found.add(fmt::format("the n-gram table on a disk of {:.0f} GB/s", kUsualDisk / 1e9), other);
}

void other_cards(WhatIfs& found, const BoxQuestion& q) {
  BoxQuestion other = q;
  if (q.machine.gpus.empty()) {
    other.machine.gpus.push_back(gpu_profile(*find_gpu_sheet("5090"), q.machine.cpu.read_bytes_per_second));
    return found.add("an RTX 5090", other);
  }
  const double larger = next_gpu_memory(q.machine.gpus[0].memory_bytes);
  for (GpuProfile& gpu : other.machine.gpus) gpu.memory_bytes = std::max(gpu.memory_bytes, larger);
  if (larger > 0)
    found.add(fmt::format("{:.0f} GiB on the card instead of {:.0f}", larger / kGibibyte,
                          q.machine.gpus[0].memory_bytes / kGibibyte),
              other);
  other = q;
  other.machine.gpus.push_back(q.machine.gpus[0]);
  found.add("one more card", other);
}

void more_channels(WhatIfs& found, const BoxQuestion& q, const std::optional<CpuSheet>& sheet) {
  if (!sheet || sheet->channels == 0) return;
  constexpr int kChannels[] = {1, 2, 4, 6, 8, 12, 16, 24};
  const int* const more = std::upper_bound(std::begin(kChannels), std::end(kChannels), sheet->channels);
  if (more == std::end(kChannels)) return;
  CpuSheet wider = *sheet;
  wider.channels = *more;
  wider.read_bytes_per_second = dram_bytes_per_second(*more, sheet->megatransfers);
  BoxQuestion other = q;
  other.machine.cpu = cpu_profile(wider);
  found.add(fmt::format("{} channels instead of {}", *more, sheet->channels), other);
}

void other_loads(WhatIfs& found, const BoxQuestion& q) {
  BoxQuestion other = q;
  other.context = std::floor(q.context / 2);
  if (other.context >= 1) found.add("half the context", other);
  other = q;
  other.batch = q.batch == 1 ? 8 : 1;
  found.add(fmt::format("batch {} instead of {}", other.batch, q.batch), other);
  other.batch = std::min(2 * q.batch, 4096);
  if (q.batch > 1 && other.batch > q.batch)
    found.add(fmt::format("batch {} instead of {}", other.batch, q.batch), other);
}

}  // namespace

std::vector<WhatIf> what_ifs(const BoxQuestion& q, const BoxPlan& plan, const std::optional<CpuSheet>& sheet) {
  WhatIfs found(q, plan);
  more_memory(found, q, plan);
  a_disk(found, q);
  other_cards(found, q);
  more_channels(found, q, sheet);
  other_loads(found, q);
  return found.take();
}

}  // namespace thermocline::sched
