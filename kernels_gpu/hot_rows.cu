// Copies of selected rows on the device, where the rows themselves are in host memory (LayerPages::hot). A slot belongs
// to the row in `entry_of`, and that row's entry in slot_of says so; between launches both always agree.
#include "kernels_gpu/device/pages.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kStageThreads = 256;
constexpr int32_t kOnItsWay = -2;  // in slot_of, within a launch: some warp looks for a slot
constexpr int kTries = 16;         // slots that are looked at for one row
constexpr int kGentleTries = 12;   // of those: rows of the step before are left alone

/// One lane: a slot that the step does not need, taken from whoever has it; kNoSlot when none of kTries was one.
TC_DEVICE int32_t take_slot(const StageRowsArgs& args, uint32_t now) {
  const uint32_t slots = static_cast<uint32_t>(args.entry_of.shape[0]);
  for (int i = 0; i < kTries; ++i) {
    const int32_t slot = static_cast<int32_t>(atomic_add(args.hand, 0, 1u) % slots);
    const uint32_t last = atomic_add(args.used, slot, 0u);
    if (last == now || (last + 1 == now && i < kGentleTries)) continue;
    if (atomic_compare_exchange(args.used, slot, last, now) != last) continue;
    const int32_t before = args.entry_of(slot);
    if (before >= 0) atomic_compare_exchange(args.pages.slot_of, before, slot, kNoSlot);
    return slot;
  }
  return kNoSlot;
}

// A block a token, a warp a row: its first lane finds the slot, all of them copy.
TC_KERNEL(kStageThreads)
stage_rows_kernel(const StageRowsArgs args) {
  const int64_t token = block_x();
  const TokenInfo info = args.step.tokens(token);
  if (info.pos < 0) return;  // the whole block
  const int64_t visible = (static_cast<int64_t>(info.pos) + 1) / args.ratio;
  const int64_t count = min_of(visible, args.selected.shape[1]);
  const uint32_t now = args.step.step(0);
  uint32_t found = 0, copied = 0, left = 0;
  for (int64_t i = warp(); i < count; i += kStageThreads / 32) {
    const RowPlace place = row_place(args.step, args.pages, info, static_cast<int32_t>(args.selected(token, i)));
    const int64_t entry = slot_entry(args.pages, place);
    int32_t slot = kNoSlot;  // to copy to
    if (lane() == 0) {
      const int32_t there = atomic_compare_exchange(args.pages.slot_of, entry, kNoSlot, kOnItsWay);
      if (there >= 0) {
        atomic_exchange(args.used, there, now);
        ++found;
      } else if (there == kNoSlot) {
        slot = take_slot(args, now);
        ++(slot >= 0 ? copied : left);
        if (slot < 0) atomic_exchange(args.pages.slot_of, entry, kNoSlot);
      }
    }
    slot = shuffle(kFullMask, slot, 0);
    if (slot < 0) continue;  // the whole warp
    const DeviceView<uint8_t, 1> from = home_row(args.pages, place), to = hot_row(args.pages, slot);
    for (int64_t at = 16 * lane(); at < args.pages.row_bytes; at += 512)
      *reinterpret_cast<Vec4*>(to.write(at, 16)) = *reinterpret_cast<const Vec4*>(from.read(at, 16));
    if (lane() == 0) {
      args.entry_of(slot) = static_cast<int32_t>(entry);
      atomic_exchange(args.pages.slot_of, entry, slot);
    }
  }
  if (lane() != 0) return;
  if (found > 0) atomic_add(args.counts, 0, found);
  if (copied > 0) atomic_add(args.counts, 1, copied);
  if (left > 0) atomic_add(args.counts, 2, left);
}

}  // namespace

void TC_BACKEND::stage_rows(Stream& stream, const StageRowsArgs& args) {
  TC_CHECK(args.pages.row_bytes % 16 == 0 && args.entry_of.shape[0] > 0);
  TC_CHECK(args.pages.slot_of.shape[0] <= INT32_MAX, "entries are numbered by int32_t");
  launch(stream, "stage_rows", stage_rows_kernel, {args.selected.shape[0]}, kStageThreads, args);
}

}  // namespace thermocline::gpu
