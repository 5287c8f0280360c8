#include "scheduler/batch/batch.h"

#include <gtest/gtest.h>

namespace thermocline::sched {
namespace {

TEST(Batch, SegmentsCoverTheTokens) {
  Batch batch;
  const int32_t ids[] = {4, 5, 6};
  batch.add(0, 10, ids, 3);
  batch.add(2, 0, ids, 1);
  ASSERT_EQ(batch.segments.size(), 2u);
  EXPECT_EQ(batch.size(), 4);
  EXPECT_EQ(batch.segments[1].first_token, 3);
  EXPECT_EQ(batch.segments[1].sequence, 2);
  EXPECT_EQ(batch.token_ids, (std::vector<int32_t>{4, 5, 6, 4}));
}

TEST(ChunkPrefill, ChunksCoverTheRangeOnce) {
  EXPECT_EQ(chunk_prefill(0, 0, 4), std::vector<int64_t>{});
  EXPECT_EQ(chunk_prefill(0, 8, 4), (std::vector<int64_t>{4, 8}));
  EXPECT_EQ(chunk_prefill(5, 14, 4), (std::vector<int64_t>{9, 13, 14}));
}

}  // namespace
}  // namespace thermocline::sched
