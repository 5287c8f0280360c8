// Copies of selected rows on the device: whatever tokens select and however few slots there are, a slot has the bytes
// of the row that the tables say, and no row has two.
#include <algorithm>
#include <numeric>

#include "kernels_gpu/simt/simt_device.h"
#include "tests/support/devices.h"

namespace thermocline {
namespace {

using gpu::kNoSlot;

/// Two layers of 8 pages of 4 rows each, of which the second is staged; a token of each of two sequences, and padding.
class HotRows : public test::DeviceTest {
 protected:
  static constexpr int64_t kRowBytes = 48, kPages = 8, kPerPage = 4, kEntries = 2 * kPerPage, kTopK = 12;
  static constexpr int64_t kFirst = kPerPage;  // the layer's entries in a page

  void open(int64_t slots) {
    slots_ = slots;
    std::vector<uint8_t> rows(static_cast<size_t>(kPages * kEntries * kRowBytes));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(i / kRowBytes * 7 + i % kRowBytes);
    rows_ = rows;
    args_.pages.rows = {up(rows), {static_cast<int64_t>(rows.size())}};
    args_.pages.row_page_bytes = kEntries * kRowBytes;
    args_.pages.row_offset = kFirst * kRowBytes;
    args_.pages.row_bytes = kRowBytes;
    args_.pages.rows_per_page = kPerPage;
    args_.pages.hot = {zeros<uint8_t>(slots * kRowBytes), {slots * kRowBytes}};
    args_.pages.slot_of = {up(std::vector<int32_t>(kPages * kEntries, kNoSlot)), {kPages * kEntries}};
    args_.pages.page_entries = kEntries;
    args_.pages.first_entry = kFirst;
    args_.entry_of = {up(std::vector<int32_t>(static_cast<size_t>(slots), kNoSlot)), {slots}};
    args_.used = {zeros<uint32_t>(slots), {slots}};
    args_.hand = {zeros<uint32_t>(1), {1}};
    args_.counts = {zeros<uint32_t>(3), {3}};
    args_.ratio = 4;
  }

  /// Sequence 0 has pages 0 .. 3, sequence 1 pages 2 .. 5: rows of two of them are selected by both.
  void stage(uint32_t number, const std::vector<int32_t>& first, const std::vector<int32_t>& second) {
    const std::vector<gpu::TokenInfo> tokens = {
        {0, 4 * static_cast<int32_t>(kTopK) + 8, 0, 0, 0, 1}, {0, 4 * static_cast<int32_t>(kTopK) + 8, 1, 0, 1, 1}, {}};
    args_.step = step(tokens, {{0, 0, 0, 0}, {1, 0, 0, 4}}, {0, 1, 2, 3, 2, 3, 4, 5});
    args_.step.step = {up(std::vector<uint32_t>{number}), {1}};
    std::vector<int32_t> selected = first;
    selected.insert(selected.end(), second.begin(), second.end());
    selected.resize(3 * kTopK);
    args_.selected = {up(selected), {3, kTopK}};
    kernels().stage_rows(*stream_, args_);
    wanted_.clear();
    for (int s = 0; s < 2; ++s)
      for (const int32_t row : s == 0 ? first : second)
        wanted_.push_back((2 * s + row / kPerPage) * kEntries + kFirst + row % kPerPage);
  }

  /// Holds the tables to each other and to the rows; the number of wanted rows that have a copy.
  int64_t check() {
    const std::vector<int32_t> slot_of = down(args_.pages.slot_of.pointer, kPages * kEntries);
    const std::vector<int32_t> entry_of = down(args_.entry_of.pointer, slots_);
    const std::vector<uint8_t> hot = down(args_.pages.hot.pointer, slots_ * kRowBytes);
    std::vector<int> owners(static_cast<size_t>(slots_));
    for (int64_t entry = 0; entry < kPages * kEntries; ++entry) {
      const int32_t slot = slot_of[static_cast<size_t>(entry)];
      EXPECT_TRUE(slot == kNoSlot || (slot >= 0 && slot < slots_)) << "entry " << entry << ": " << slot;
      if (slot < 0 || slot >= slots_) continue;
      EXPECT_GE(entry % kEntries, kFirst) << "another layer's";
      EXPECT_EQ(entry_of[static_cast<size_t>(slot)], entry);
      EXPECT_EQ(++owners[static_cast<size_t>(slot)], 1) << "slot " << slot;
      EXPECT_TRUE(std::equal(&rows_[static_cast<size_t>(entry * kRowBytes)],
                             &rows_[static_cast<size_t>((entry + 1) * kRowBytes - 1)] + 1,
                             &hot[static_cast<size_t>(slot * kRowBytes)]))
          << "entry " << entry;
    }
    return std::count_if(wanted_.begin(), wanted_.end(),
                         [&](int64_t entry) { return slot_of[static_cast<size_t>(entry)] >= 0; });
  }
  /// Steps that select at random, each held to check(); `each(copies)` of the wanted rows after it.
  template <class Each>
  void select_at_random(int64_t slots, const Each& each) {
#ifdef TC_SANITIZED
    const uint32_t steps = 6;
#else
    const uint32_t steps = 40;
#endif
    open(slots);
    std::mt19937 random(static_cast<uint32_t>(slots));
    for (uint32_t number = 1; number <= steps && !HasFailure(); ++number) {
      const auto first = some_rows(random), second = some_rows(random);
      stage(number, first, second);
      each(check());
    }
  }
  std::vector<int32_t> some_rows(std::mt19937& random) {
    std::vector<int32_t> rows(4 * kPerPage);
    std::iota(rows.begin(), rows.end(), 0);
    std::shuffle(rows.begin(), rows.end(), random);
    rows.resize(kTopK);
    std::sort(rows.begin(), rows.end());
    return rows;
  }

  gpu::StageRowsArgs args_;
  int64_t slots_ = 0;
  std::vector<uint8_t> rows_;
  std::vector<int64_t> wanted_;
};

TEST_F(HotRows, TablesAndBytesAgreeAfterEverySelection) {
  for (const int64_t slots : {1, 3, 16, 40}) {
    select_at_random(slots, [](int64_t) {});
    const std::vector<uint32_t> counts = down(args_.counts.pointer, 3);
    EXPECT_TRUE(slots == 40 || counts[2] > 0) << "more rows in a step than slots";
    EXPECT_GT(counts[1], 0u);
  }
}

// Blocks that run at once may take each other's slots: a row that is found can lose its own before it is marked.
TEST_F(HotRows, WhereThereIsRoomEveryRowOfBlocksInTurnHasACopy) {
  stream_.reset();
  device_ = gpu::simt::make_device({.memory_bytes = size_t{1} << 30, .workers = 1}).value();
  stream_ = device_->new_stream().value();
  select_at_random(40, [](int64_t copies) { EXPECT_EQ(copies, 2 * kTopK); });
  EXPECT_EQ(down(args_.counts.pointer, 3)[2], 0u) << "none was left out";
}

TEST_F(HotRows, WhatIsSelectedAgainIsNotCopiedAgain) {
  open(40);
  std::vector<int32_t> rows(kTopK);
  std::iota(rows.begin(), rows.end(), 0);
  stage(2, rows, rows);  // in a step 1 slots that nobody used would be those of the step before, and spared
  EXPECT_EQ(down(args_.counts.pointer, 3)[1], 20u) << "rows 8 .. 11 of the first are 0 .. 3 of the second";
  stage(3, rows, rows);
  EXPECT_EQ(down(args_.counts.pointer, 3)[1], 20u);
  EXPECT_EQ(check(), 2 * kTopK);
}

TEST_F(HotRows, ForgottenRowsAreCopiedAnew) {
  open(40);
  std::vector<int32_t> rows(kTopK);
  std::iota(rows.begin(), rows.end(), 0);
  stage(2, rows, rows);
  // Page 1 gets other rows: its entries are taken away, its slots are not.
  for (size_t i = 0; i < kEntries * kRowBytes; ++i) rows_[static_cast<size_t>(kEntries * kRowBytes) + i] ^= 0x55;
  args_.pages.rows.pointer = up(rows_);
  const std::vector<int32_t> none(kEntries, kNoSlot);
  stream_->copy(args_.pages.slot_of.pointer + kEntries, none.data(), sizeof(int32_t) * kEntries, gpu::CopyKind::h2d);
  sync();
  stage(3, rows, rows);
  EXPECT_EQ(check(), 2 * kTopK);
  EXPECT_EQ(down(args_.counts.pointer, 3)[1], 24u);
  for (uint32_t number = 4; number < 60; ++number) {  // until the slots of before have gone round
    std::mt19937 random(number);
    stage(number, some_rows(random), some_rows(random));
    check();
  }
}

}  // namespace
}  // namespace thermocline
