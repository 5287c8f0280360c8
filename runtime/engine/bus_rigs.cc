#include "runtime/engine/bus_rigs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/base/timing.h"
#include "runtime/exec/handover.h"

namespace thermocline {
namespace {

using gpu::CopyKind;

constexpr int64_t kMailWords = 64, kAnswerAt = 16;  // of a layer, and in it: lines of their own

}  // namespace

// Minimises the sum of ((fixed + slope x - t) / t)^2.
CopyCost fit_copies(std::span<const CopyTime> times) {
  double ones = 0, x = 0, xx = 0, t = 0, xt = 0;  // sums, each over t^2
  for (const CopyTime& time : times) {
    const double w = 1 / (time.ns * time.ns);
    ones += w;
    x += w * time.bytes;
    xx += w * time.bytes * time.bytes;
    t += w * time.ns;
    xt += w * time.bytes * time.ns;
  }
  const double slope = (ones * xt - x * t) / (ones * xx - x * x), fixed = (t - slope * x) / ones;
  if (slope > 0 && fixed >= 0) return {1e9 / slope, fixed};
  return {1e9 * xx / xt, 0};
}

Result<CopyRig> CopyRig::create(DeviceRig& rig, uint64_t host_bytes) {
  CopyRig copies(rig.stream());
  const auto largest = static_cast<size_t>(kBytes.back());
  TC_ASSIGN(copies.from_, rig.device().allocate_pinned(std::max<size_t>(host_bytes, largest)));
  TC_ASSIGN(copies.to_, rig.device().allocate(largest));
  TC_ASSIGN(copies.copied_, rig.device().new_event());
  std::memset(copies.from_.data(), 1, copies.from_.size());
  return copies;
}

void CopyRig::queue(double bytes) {
  const auto size = static_cast<size_t>(bytes);
  if (at_ + size > from_.size()) at_ = 0;
  stream_->copy(to_.data(), from_.data() + at_, size, CopyKind::h2d);
  at_ += (size + 4095) / 4096 * 4096;
}

Result<double> CopyRig::seconds(double bytes) {
  const Clock::time_point start = Clock::now();
  queue(bytes);
  TC_RETURN_IF_ERROR(stream_->synchronize());
  return seconds_since(start);
}

Result<double> CopyRig::read_share(StreamRead& read, double copy_rate) {
  constexpr int kMostCopies = 512, kAttempts = 4;  // a driver's queue takes about a thousand
  const auto rate = [&] { return median({read.measure(1), read.measure(1), read.measure(1)}); };
  const Clock::time_point start = Clock::now();
  const double alone = rate(), largest = kBytes.back();
  // Reads may take four times as long beside copies, and the last of them still has one beside it.
  int copies = 1 + static_cast<int>(std::min<double>(kMostCopies, 4 * seconds_since(start) * copy_rate / largest));
  for (int attempt = 1;; ++attempt) {
    for (int i = 0; i < copies; ++i) queue(largest);
    stream_->record(*copied_);
    const double beside = rate();
    const bool all_the_while = !copied_->done();
    TC_RETURN_IF_ERROR(stream_->synchronize());
    if (all_the_while || attempt == kAttempts) return std::clamp(beside / alone, 0.01, 1.0);
    copies = std::min(2 * copies, kMostCopies);
  }
}

uint32_t* HandoverRig::mail(int layer) const { return reinterpret_cast<uint32_t*>(flags_.data()) + kMailWords * layer; }

Result<HandoverRig> HandoverRig::create(DeviceRig& rig, int layers) {
  HandoverRig out(rig, layers);
  gpu::Device& device = rig.device();
  const int64_t dim = rig.shapes().dim;
  const auto row_bytes = static_cast<size_t>(dim) * sizeof(bf16);
  TC_ASSIGN(out.pinned_step_, device.allocate_pinned(sizeof(uint32_t)));
  TC_ASSIGN(out.flags_, device.allocate_pinned(static_cast<size_t>(kMailWords * layers) * sizeof(uint32_t)));
  TC_ASSIGN(out.misses_, device.allocate_pinned(sizeof(gpu::MissPair)));
  TC_ASSIGN(out.x_, device.allocate_pinned(row_bytes));
  TC_ASSIGN(out.y_, device.allocate_pinned(row_bytes));
  for (const gpu::PinnedBuffer* const buffer : {&out.flags_, &out.misses_, &out.y_})
    std::memset(buffer->data(), 0, buffer->size());

  gpu::PublishArgs publish;
  gpu::FetchArgs fetch;
  TC_ASSIGN(out.device_step_, rig.values(std::vector<uint32_t>{0}, out.held_));
  TC_ASSIGN(int32_t* const counts, rig.values(std::vector<int32_t>{0, 1}, out.held_));  // no item, one miss
  TC_ASSIGN(uint32_t* const arrived, rig.values(std::vector<uint32_t>{0}, out.held_));
  TC_ASSIGN(bf16* const x, rig.array<bf16>(dim, out.held_));
  TC_ASSIGN(bf16* const y, rig.array<bf16>(dim, out.held_));
  publish.step.step = fetch.step.step = {out.device_step_, {1}};
  publish.counts = fetch.counts = {counts, {2}};
  publish.arrived = {arrived, {1}};
  publish.x = {x, {1, dim}};
  publish.host_x = {reinterpret_cast<bf16*>(out.x_.data()), {1, dim}};
  fetch.misses = {reinterpret_cast<gpu::MissPair*>(out.misses_.data()), {1}};
  fetch.host_y = {reinterpret_cast<bf16*>(out.y_.data()), {1, dim}};
  fetch.y = {y, {1, dim}};
  TC_ASSIGN(out.graph_, out.capture(rig, publish, fetch));
  return out;
}

Result<std::unique_ptr<gpu::Graph>> HandoverRig::capture(DeviceRig& rig, gpu::PublishArgs publish,
                                                         gpu::FetchArgs fetch) {
  stream_->begin_capture();
  stream_->copy(device_step_, pinned_step_.data(), sizeof(uint32_t), CopyKind::h2d);
  for (int layer = 0; layer < layers_; ++layer) {
    publish.flag = {mail(layer), {2}};
    fetch.answer = {mail(layer) + kAnswerAt, {1}};
    rig.device().kernels().publish(*stream_, publish);
    rig.device().kernels().fetch(*stream_, fetch);
  }
  return stream_->end_capture();
}

Status HandoverRig::run(WorkerPool& pool, std::vector<double>& ns) {
  *reinterpret_cast<uint32_t*>(pinned_step_.data()) = ++step_;
  stream_->launch(*graph_);
  Clock::time_point last;
  for (int layer = 0; layer < layers_; ++layer) {
    TC_RETURN_IF_ERROR(await_flag(*stream_, mail(layer)[1], step_));
    const Clock::time_point now = Clock::now();
    if (layer > 0) ns.push_back(std::chrono::duration<double, std::nano>(now - last).count());
    last = now;
    pool.run([](int) {});
    raise_answer(mail(layer)[kAnswerAt], step_);
  }
  return stream_->synchronize();
}

}  // namespace thermocline
