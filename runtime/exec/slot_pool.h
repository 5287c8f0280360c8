// SlotPool: the routed experts that live in device memory, in uniform slots without quotas (architecture D4). A slot
// holds one expert as its packed tiles lie on the host, so filling it is copying. The device's table says which expert
// has which slot; the partition kernel reads it, and it changes between steps only:
//
//   free -> filling (h2d beside the next step) -> resident -> tombstone (still read by the step in flight) -> free
//
// A slot that a step in flight may read is never written: eviction during a step takes effect at its fence. A fill
// started between steps n and n + 1 is in the table of step n + 2, whatever the speed of the copy, so residency depends
// on decisions alone. Used by the thread that drives the step.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels_gpu/kernels.h"
#include "runtime/experts/expert_store.h"
#include "scheduler/placement/expert_policy.h"

namespace thermocline {

/// Where an expert's planes lie in a slot; the same for every expert.
struct SlotLayout {
  explicit SlotLayout(const cpu::ExpertWeights& any);
  struct Plane {
    int64_t offset = 0, bytes = 0;
  };
  Plane tiles[3], scales[3];  // w1, w3, w2
  int64_t bytes = 0;          // of a slot, in whole 4 KiB
};

class SlotPool {
 public:
  /// `slots` for residents and `staging` beyond them for experts that pass through, all of one shape.
  /// Errors: out_of_memory.
  static Result<std::unique_ptr<SlotPool>> create(gpu::Device& device, std::unique_ptr<ExpertStore> store, int slots,
                                                  int staging);

  ~SlotPool() {
    if (copies_) (void)copies_->synchronize();
  }  // its memory is written until then

  int slots() const { return slots_; }
  int staging() const { return staging_; }
  const SlotLayout& layout() const { return layout_; }
  /// Shapes of w1, w3, w2.
  const cpu::PackedShape* shapes() const { return shapes_; }
  const std::byte* slot_data(int slot) const { return memory_.data() + slot * layout_.bytes; }
  /// The device's table [layers, experts] as of the last begin_step.
  gpu::DeviceView<const int32_t, 1> device_table(int layer) const;
  /// The table of the step in flight, or of the last one.
  std::span<const int32_t> step_table(int layer) const;

  /// What a policy sees; experts on their way count as resident.
  sched::Residency residency() const;
  /// Starts bringing an expert in. False: no free slot, or it is there already.
  bool fill(const sched::ExpertId& id);
  /// Takes an expert out of the next step's table. False: not resident.
  bool evict(const sched::ExpertId& id);
  /// The same as fill, from a copy of the expert that is on the device already; queued on `stream`.
  bool fill_from_device(const sched::ExpertId& id, const std::byte* source, gpu::Stream& stream);
  /// Copies an expert to a staging slot.
  void stage(const sched::ExpertId& id, int staging_slot, gpu::Stream& stream);

  /// Publishes what has been filled and queues the table's upload on the step's stream. Waits for fills that are due.
  void begin_step(gpu::Stream& compute);
  /// The step has finished on the device: its tombstones are free.
  void end_step();
  /// Every fill is in the next step's table. Only without a step in flight.
  Status settle();

  struct Counters {
    int64_t fills = 0, evictions = 0, h2d_bytes = 0, d2d_bytes = 0;
  };
  const Counters& counters() const { return counters_; }
  gpu::Stream& copies() { return *copies_; }

 private:
  enum class State : uint8_t { free, filling, resident, tombstone };
  struct Slot {
    State state = State::free;
    sched::ExpertId id;
    bool due = false;  // filling: belongs in the next table
  };

  SlotPool(std::unique_ptr<ExpertStore> store, int slots, int staging);
  int32_t& entry(const sched::ExpertId& id) { return mirror_[static_cast<size_t>(id.layer * experts_ + id.expert)]; }
  void copy_expert(const sched::ExpertId& id, std::byte* to, gpu::Stream& stream);
  int take_free(const sched::ExpertId& id);

  const std::unique_ptr<ExpertStore> store_;
  const int experts_, slots_, staging_;
  const SlotLayout layout_;
  const cpu::PackedShape shapes_[3];
  std::unique_ptr<gpu::Stream> copies_;
  std::unique_ptr<gpu::Event> filled_;
  gpu::DeviceBuffer memory_, table_;
  gpu::PinnedBuffer upload_;      // the table of the step in flight
  std::vector<int32_t> mirror_;   // of the next step; filling slots are not in it
  std::vector<int32_t> planned_;  // as a policy sees it
  int planned_residents_ = 0;
  std::vector<Slot> state_;
  std::vector<int> free_;
  bool in_flight_ = false, uploaded_ = false;
  Counters counters_;
};

}  // namespace thermocline
