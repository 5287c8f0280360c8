// As kernel_rigs.h, what a step does around its matrices: attention over cached rows, the index, and the work on each
// element between products. All carried out as DeepseekV4Step does.
#pragma once

#include <vector>

#include "kernels_cpu/attention.h"
#include "kernels_cpu/indexer.h"
#include "runtime/engine/kernel_rigs.h"

namespace thermocline {

/// 128 + 512 rows a token, 64 heads of 512. FP8 rows are unpacked once a token, by all workers where they are more than
/// the tokens.
class AttentionRig {
 public:
  static Result<AttentionRig> create(const cpu::CpuContext& cpu, int64_t tokens, bool fp8);
  KernelWork run();

 private:
  static constexpr int64_t kRows = 128 + 512, kHeads = 64, kDim = 512, kRope = 64, kUnit = 8, kCached = 1 << 16;
  static constexpr size_t kLists = 8;

  AttentionRig(const cpu::CpuContext& cpu, int64_t tokens, bool fp8);
  void list_rows();
  void unpack(int64_t begin, int64_t end, int64_t to);

  cpu::CpuContext cpu_;
  int64_t tokens_;
  bool fp8_;
  int64_t row_bytes_;
  NumaBuffer cache_;
  std::vector<float> q_, sinks_, out_, scratch_;
  std::vector<bf16> unpacked_;
  std::vector<std::vector<const void*>> lists_;
  std::vector<const void*> read_rows_;  // a list, its rows unpacked
  size_t next_ = 0;
};

/// Keys of 128 in FP4, scored by 64 heads.
class IndexRig {
 public:
  /// `lists` caches of `keys` keys, scanned in turn.
  static Result<IndexRig> create(const cpu::CpuContext& cpu, int64_t keys, int64_t lists);
  /// The scores of one token, its keys split over the workers.
  KernelWork scan();
  /// The 512 best keys of one token by all workers, or of some tokens, each by one worker.
  KernelWork select_one();
  KernelWork select_many(int64_t tokens);

 private:
  static constexpr int64_t kHeads = 64, kDim = 128, kTiles = kDim / 32, kTopK = 512;

  IndexRig(const cpu::CpuContext& cpu, int64_t keys) : cpu_(cpu), keys_(keys) {}
  KernelWork work(int64_t tokens) const;
  void score(const uint8_t* const* groups, int64_t begin, int64_t end, float* out) const;
  const std::vector<const uint8_t*>& next_list() { return lists_[next_++ % lists_.size()]; }

  cpu::CpuContext cpu_;
  int64_t keys_;
  NumaBuffer cache_;
  std::vector<std::vector<const uint8_t*>> lists_;  // groups of a cache
  std::vector<cpu::Int8Chunk> query_;
  std::vector<float> gates_, scores_;  // [workers, keys]
  std::vector<int32_t> order_, selected_, topk_;
  size_t next_ = 0;
};

/// What a layer does to a token's elements between products, at V4-Flash's shapes.
class ElementRig {
 public:
  static constexpr int64_t kStreams = 4, kDim = 4096, kExperts = 256;
  static constexpr int64_t kHeads = 64, kHeadDim = 512, kRope = 64, kQueryRank = 1024, kGroups = 8, kOutputRank = 8192;
  /// Elements of a token's residual streams, mixed twice a layer, and of its rows.
  static constexpr int64_t kStreamElements = 2 * kStreams * kDim;
  static constexpr int64_t kRowElements = kQueryRank + kHeadDim + 2 * kHeads * kHeadDim + kOutputRank;

  static Result<ElementRig> create(const cpu::CpuContext& cpu, int64_t max_tokens);
  /// Mixing the streams into a block's input and its output into them, for both blocks; choosing the experts.
  void streams(int64_t tokens);
  /// Norms, rotations and roundings of queries, cached row, attention's result and the output's inner rows.
  void rows(int64_t tokens);

 private:
  explicit ElementRig(const cpu::CpuContext& cpu);
  void read(int64_t tokens);
  void write(int64_t tokens);
  void route(int64_t tokens);

  static constexpr int64_t kWidth = kStreams * kDim, kMixes = (2 + kStreams) * kStreams;

  cpu::CpuContext cpu_;
  cpu::InputFormat plain_, linear_;
  std::vector<float> mixer_;  // in a cache: its bytes are counted with the other weights'
  std::vector<float> streams_, mixes_, pre_, post_, comb_, x_, norm_, bias_, scores_, weights_, cos_, sin_;
  std::vector<float> qr_, kv_, q_, o_, u_;
  std::vector<int32_t> ids_;
  std::vector<uint8_t> cached_;
  cpu::GemmInput plain_x_, linear_x_, qr_x_, o_x_, u_x_;
};

}  // namespace thermocline
