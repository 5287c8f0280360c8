#include "runtime/exec/slot_pool.h"

#include <algorithm>
#include <cstring>

namespace thermocline {

using sched::ExpertId;

SlotLayout::SlotLayout(const cpu::ExpertWeights& any) {
  const cpu::PackedMatrix* const matrices[3] = {&any.w1, &any.w3, &any.w2};
  const auto place = [&](Plane& plane, int64_t size) {
    plane = {bytes, size};
    bytes += (size + 255) / 256 * 256;
  };
  for (int i = 0; i < 3; ++i) {
    place(tiles[i], matrices[i]->tile_plane_bytes());
    place(scales[i], matrices[i]->scale_plane_bytes());
  }
  bytes = (bytes + 4095) / 4096 * 4096;
}

SlotPool::SlotPool(std::unique_ptr<ExpertStore> store, int slots, int staging)
    : store_(std::move(store)),
      experts_(store_->experts()),
      slots_(slots),
      staging_(staging),
      layout_(*store_->find({0, 0})),
      shapes_{store_->find({0, 0})->w1, store_->find({0, 0})->w3, store_->find({0, 0})->w2},
      mirror_(static_cast<size_t>(store_->layers() * experts_), -1),
      planned_(mirror_),
      state_(static_cast<size_t>(slots)) {
  for (int slot = slots; slot-- > 0;) free_.push_back(slot);
}

Result<std::unique_ptr<SlotPool>> SlotPool::create(gpu::Device& device, std::unique_ptr<ExpertStore> store, int slots,
                                                   int staging) {
  std::unique_ptr<SlotPool> pool(new SlotPool(std::move(store), slots, staging));
  TC_ASSIGN(pool->copies_, device.new_stream());
  TC_ASSIGN(pool->filled_, device.new_event());
  const size_t table_bytes = pool->mirror_.size() * sizeof(int32_t);
  TC_ASSIGN(pool->memory_, device.allocate(static_cast<size_t>((slots + staging) * pool->layout_.bytes)));
  TC_ASSIGN(pool->table_, device.allocate(table_bytes));
  TC_ASSIGN(pool->upload_, device.allocate_pinned(table_bytes));
  std::memset(pool->upload_.data(), 0xff, table_bytes);
  return pool;
}

gpu::DeviceView<const int32_t, 1> SlotPool::device_table(int layer) const {
  return {reinterpret_cast<const int32_t*>(table_.data()) + static_cast<ptrdiff_t>(layer) * experts_, {experts_}};
}

std::span<const int32_t> SlotPool::step_table(int layer) const {
  return {reinterpret_cast<const int32_t*>(upload_.data()) + static_cast<ptrdiff_t>(layer) * experts_,
          static_cast<size_t>(experts_)};
}

sched::Residency SlotPool::residency() const {
  const auto free = static_cast<int>(free_.size());
  return {planned_, store_->layers(), experts_, free, planned_residents_};
}

void SlotPool::copy_expert(const ExpertId& id, std::byte* to, gpu::Stream& stream) {
  const cpu::ExpertWeights* const found = store_->find(id);
  TC_CHECK(found != nullptr, "an expert that is not in host memory");
  const cpu::ExpertWeights& expert = *found;
  TC_CHECK_EQ(SlotLayout(expert).bytes, layout_.bytes);
  const cpu::PackedMatrix* const matrices[3] = {&expert.w1, &expert.w3, &expert.w2};
  for (int i = 0; i < 3; ++i) {
    const cpu::PackedMatrix& m = *matrices[i];
    for (int node = 0; node < m.nodes; ++node) {  // a slice a NUMA node
      const int64_t first = m.first_group(node),
                    groups = (node + 1 < m.nodes ? m.first_group(node + 1) : m.row_groups()) - first;
      if (groups == 0) continue;
      const cpu::RowGroup from = m.row_group(first);
      const int64_t tile_bytes = m.group_tile_bytes(), scale_bytes = m.group_scale_bytes();
      stream.copy(to + layout_.tiles[i].offset + first * tile_bytes, from.tiles,
                  static_cast<size_t>(groups * tile_bytes), gpu::CopyKind::h2d);
      stream.copy(to + layout_.scales[i].offset + first * scale_bytes, from.scales,
                  static_cast<size_t>(groups * scale_bytes), gpu::CopyKind::h2d);
    }
  }
  counters_.h2d_bytes += static_cast<int64_t>(expert.bytes());
}

int SlotPool::take_free(const ExpertId& id) {
  int32_t& planned = planned_[static_cast<size_t>(id.layer * experts_ + id.expert)];
  if (free_.empty() || planned >= 0) return -1;
  const int slot = free_.back();
  free_.pop_back();
  planned = slot;
  ++planned_residents_;
  state_[static_cast<size_t>(slot)] = {State::filling, id, false};
  ++counters_.fills;
  return slot;
}

bool SlotPool::fill(const ExpertId& id) {
  const int slot = take_free(id);
  if (slot < 0) return false;
  copy_expert(id, memory_.data() + slot * layout_.bytes, *copies_);
  return true;
}

bool SlotPool::fill_from_device(const ExpertId& id, const std::byte* source, gpu::Stream& stream) {
  const int slot = take_free(id);
  if (slot < 0) return false;
  stream.copy(memory_.data() + slot * layout_.bytes, source, static_cast<size_t>(layout_.bytes), gpu::CopyKind::d2d);
  counters_.d2d_bytes += layout_.bytes;
  return true;
}

void SlotPool::stage(const ExpertId& id, int staging_slot, gpu::Stream& stream) {
  TC_CHECK(staging_slot >= 0 && staging_slot < staging_);
  copy_expert(id, memory_.data() + (slots_ + staging_slot) * layout_.bytes, stream);
}

bool SlotPool::evict(const ExpertId& id) {
  const int32_t slot = entry(id);
  if (slot < 0) return false;  // not there, or still on its way
  entry(id) = -1;
  planned_[static_cast<size_t>(id.layer * experts_ + id.expert)] = -1;
  --planned_residents_;
  ++counters_.evictions;
  Slot& s = state_[static_cast<size_t>(slot)];
  s.state = in_flight_ ? State::tombstone : State::free;
  if (s.state == State::free) free_.push_back(slot);
  return true;
}

void SlotPool::begin_step(gpu::Stream& compute) {
  TC_CHECK(!in_flight_);
  bool any = false;
  for (size_t slot = 0; slot < state_.size(); ++slot) {
    Slot& s = state_[slot];
    if (s.state != State::filling) continue;
    if (s.due) {
      s.state = State::resident;
      entry(s.id) = static_cast<int32_t>(slot);
      any = true;
    } else {
      s.due = true;
    }
  }
  if (any) compute.wait(*filled_);
  copies_->record(*filled_);  // what is due next time
  const size_t bytes = mirror_.size() * sizeof(int32_t);
  if (!uploaded_ || std::memcmp(upload_.data(), mirror_.data(), bytes) != 0) {
    std::memcpy(upload_.data(), mirror_.data(), bytes);
    compute.copy(table_.data(), upload_.data(), upload_.size(), gpu::CopyKind::h2d);
    uploaded_ = true;
  }
  in_flight_ = true;
}

void SlotPool::end_step() {
  in_flight_ = false;
  for (size_t slot = 0; slot < state_.size(); ++slot) {
    if (state_[slot].state != State::tombstone) continue;
    state_[slot].state = State::free;
    free_.push_back(static_cast<int>(slot));
  }
}

Status SlotPool::settle() {
  TC_CHECK(!in_flight_);
  copies_->record(*filled_);
  TC_RETURN_IF_ERROR(copies_->synchronize());
  for (Slot& s : state_)
    if (s.state == State::filling) s.due = true;
  return {};
}

}  // namespace thermocline
