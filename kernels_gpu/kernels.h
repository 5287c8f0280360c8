// The GPU kernels of a DeepSeek-V4 step: what each takes, and the table through which a stream's device runs them. No
// CUDA header, so every build includes it. The same .cu sources are compiled by nvcc (cuda_kernels) and by the host
// compiler for the SIMT interpreter (simt_kernels).
//
// Launchers allocate and await nothing, so a step can be captured as a graph: what changes from step to step
// (positions, page tables, the step's number) lies in device memory. A token's results depend neither on the other
// tokens of the launch nor on their number: K is never split, and every sum has an order of its own.
//
// A struct's comment ends with what a launch moves and computes at V4-Flash's shapes, and what should bound it on a
// card: HBM (weights), L2 (what tokens share), latency (small launches, about 2-3 us each), tensor cores.
//
// M tokens, D dim, S hyper-connection streams, E experts, k active ones, I their inner width, H heads, c head dim,
// V vocabulary. Activations between kernels are f32 with bf16 values, inputs of linears bf16.
#pragma once

#include "kernels_cpu/packed_matrix.h"
#include "kernels_gpu/device/device_view.h"
#include "runtime/base/number_formats.h"
#include "runtime/hw/device.h"

namespace thermocline::gpu {

/// A token of the step. pos < 0: padding of a batch bucket, computed and never stored.
struct TokenInfo {
  int32_t id = 0, pos = -1;
  int32_t sequence = 0;                    // index into SequenceInfo
  int32_t first_pos = 0, first_token = 0;  // of its segment
  int32_t segment_tokens = 0;
};

/// A sequence of the step: where its pages and rings are.
struct SequenceInfo {
  int32_t ring = 0;                                // ring number
  int32_t first_window_page = 0;                   // logical number of the first entry
  int32_t window_table = 0, compressed_table = 0;  // offsets of its block tables in `pages`
};

/// The step's tokens, in device memory.
struct StepTables {
  DeviceView<const TokenInfo, 1> tokens;  // [M]
  DeviceView<const SequenceInfo, 1> sequences;
  DeviceView<const int32_t, 1> pages;   // block tables, page numbers
  DeviceView<const float, 3> cos, sin;  // [2 + ratios, M, rd / 2]: plain, compressed, then by ratio: of the row
                                        // a token completes
  DeviceView<const uint32_t, 1> step;   // [1] the step's number
};

/// The rows of one layer in the page pools. Compressed rows and index keys have pools of their own or share one.
struct LayerPages {
  DeviceView<uint8_t, 1> window, rows, keys;  // the pools
  int64_t window_page_bytes = 0, row_page_bytes = 0, key_page_bytes = 0;
  int64_t window_offset = 0, row_offset = 0, key_offset = 0;  // of the layer in a page
  int64_t row_bytes = 0, index_group_bytes = 0, rows_per_page = 1;

  // Where `rows` is pinned host memory: copies of some of the layer's rows in device memory.
  DeviceView<uint8_t, 1> hot;      // [slots] rows
  DeviceView<int32_t, 1> slot_of;  // [pages, page_entries] where a row's copy is, or kNoSlot; empty: `rows` is it
  int64_t page_entries = 0, first_entry = 0;  // of a page in slot_of; of the layer in those
};
inline constexpr int32_t kNoSlot = -1;

/// A packed weight in device memory: one slice, whatever the host's NUMA layout.
struct DeviceMatrix : cpu::PackedShape {
  DeviceView<const uint8_t, 1> tiles, scales;
};

// --- embedding and hyper-connections ---

/// Every stream starts as the token's embedding. 2 D + 4 S D bytes a token; no FLOPs; latency.
struct EmbedArgs {
  DeviceView<const bf16, 2> rows;  // [M, D] gathered by the host: the table stays in host memory
  DeviceView<float, 3> streams;    // [M, S, D] out
};

/// mixes[i, o] = fn[o] . streams[row i]; column O: the sum of squares.
/// 4 O S D bytes of fn (1.6 MB, from L2 for all tokens but the first), 2 O S D FLOPs a token; latency, then L2.
struct HcMixArgs {
  DeviceView<const float, 2> streams;  // [M, S D]
  DeviceView<const float, 2> fn;       // [O, S D]
  DeviceView<const int32_t, 1> rows;   // [R] which tokens; empty: all
  DeviceView<float, 2> mixes;          // [R, O + 1] out
};

/// Reads S streams as one, norms it, and lays it out as the inputs of the linears. 4 S D + 4 D bytes, 2 S D FLOPs and
/// `iterations` Sinkhorn rounds on one warp a token; latency.
struct HcReadArgs {
  DeviceView<const float, 3> streams;      // [M, S, D]
  DeviceView<const float, 2> mixes;        // [M, (2 + S) S + 1]
  DeviceView<const float, 1> scale, base;  // [3], [(2 + S) S]
  DeviceView<const float, 1> norm;         // [D]
  DeviceView<float, 2> post;               // [M, S] out
  DeviceView<float, 2> comb;               // [M, S S] out
  DeviceView<bf16, 2> plain, linear;       // [M, D] out: as it is; e4m3 per 128
  float norm_eps = 0, hc_eps = 0;
  int iterations = 0;
  bool round_linear = true;
};

/// The head's variant: S mixing weights by a sigmoid, for the wanted rows. As HcReadArgs; latency.
struct HeadReadArgs {
  DeviceView<const float, 3> streams;      // [M, S, D]
  DeviceView<const float, 2> mixes;        // [R, S + 1]
  DeviceView<const float, 1> scale, base;  // [1], [S]
  DeviceView<const float, 1> norm;         // [D]
  DeviceView<const int32_t, 1> rows;       // [R]
  DeviceView<bf16, 2> hidden;              // [R, D] out
  float norm_eps = 0, hc_eps = 0;
};

/// streams[j] <- post[j] y + sum_i comb[i, j] streams[i], where y is the attention's result or the experts' sum.
/// 8 S D bytes and 2 (k + 1) D of pair rows, 2 S S D FLOPs a token; latency, from about 500 tokens HBM.
struct HcWriteArgs {
  DeviceView<float, 3> streams;           // [M, S, D]
  DeviceView<const float, 2> post, comb;  // [M, S], [M, S S]
  DeviceView<const float, 2> y;           // [M, D]; empty: the sum of experts
  DeviceView<const bf16, 2> pairs;        // [M k, D] a row per (token, expert), from whichever device
  DeviceView<const int32_t, 2> pair_of;   // [M, k] the token's pairs by rising expert
  DeviceView<const bf16, 2> shared;       // [M, D] the shared expert, added last
};

/// bf16 inputs of a linear from f32 values; e4m3 per 128 columns where it is to be rounded. 6 bytes an element;
/// latency.
struct LinearInputArgs {
  DeviceView<const float, 2> x;
  DeviceView<bf16, 2> out;
  bool round_linear = true;
};

/// One MTP input: embeddings normed, and every stream normed. 4 to 6 bytes an element; latency.
struct NormRowsArgs {
  DeviceView<const float, 2> x;      // [R, D]
  DeviceView<const bf16, 2> x_bf16;  // or this
  DeviceView<const float, 1> norm;   // [D]
  DeviceView<bf16, 2> linear;        // [R, D] out
  float eps = 0;
  bool round_linear = true;
};

/// out[t, s] = a[t, s] + b[t], rounded to bf16. 8 bytes an element; latency.
struct AddRowsArgs {
  DeviceView<float, 3> a;        // [M, S, D] in and out
  DeviceView<const float, 2> b;  // [M, D]
};

// --- GEMM ---

struct GemmJob {
  DeviceMatrix w;
  const bf16* x = nullptr;  // [rows, K] with a stride, so that a group of columns can be an input
  int64_t x_stride = 0;
  float* y = nullptr;  // [rows, N] with a stride
  int64_t y_stride = 0;
  int64_t rows = 0;
  int64_t first_group = 0, groups = 0;  // row groups of w
  bool round = true;                    // results to bf16
};

inline constexpr int kMaxGemmJobs = 8;

/// Packed tiles times bf16 rows, all jobs of one format in a launch.
/// A warp owns 16 outputs over all of K: tiles come by cp.async rings, are the A operand of mma.m16n8k16 as they lie,
/// and every tile's sum is scaled on its own. Traffic: every tile once per 64 rows (16 for few rows). FLOPs: 2 N K
/// rows. Bound: HBM bandwidth up to about 64 rows, tensor cores beyond.
struct GemmArgs {
  GemmJob jobs[kMaxGemmJobs];
  int num_jobs = 0;
};

// --- attention ---

/// Norms, rotates, rounds and stores the raw rows; norms the query latents; adds positions to the compressor gates.
/// About 15 KB a token; latency.
struct RowsArgs {
  StepTables step;
  LayerPages pages;
  DeviceView<const float, 2> kv, qr;           // [M, c], [M, Q]
  DeviceView<const float, 1> kv_norm, q_norm;  // [c], [Q]
  DeviceView<bf16, 2> qr_linear;               // [M, Q] out
  DeviceView<float, 2> z, index_z;             // [M, width] in and out; empty: none
  DeviceView<const float, 2> ape, index_ape;   // [ratio, width]
  int ratio = 0, rope_dim = 0;
  float eps = 0;
  bool round_linear = true;
};

/// Norms and rotates every query head. 6 H c bytes a token (196 KB), 6 H c FLOPs; latency, then L2.
struct QueryArgs {
  StepTables step;
  DeviceView<const float, 3> q;  // [M, H, c]
  DeviceView<bf16, 3> out;       // [M, H, c] out
  int rope_table = 0, rope_dim = 0;
  float eps = 0;
};

/// Index queries: rotated, Hadamard, e2m1 per 32. Gates scaled. 6 Hi ci bytes, Hi ci log2(ci) FLOPs a token; latency.
struct IndexQueryArgs {
  StepTables step;
  DeviceView<const float, 3> q;  // [M, Hi, ci]
  DeviceView<bf16, 3> out;       // [M, Hi, ci] out
  DeviceView<float, 2> gates;    // [M, Hi] in and out
  float gate_scale = 0;
  int rope_dim = 0;
};

/// Pools the window a token completes into a compressed row (and an index key), then keeps the last tokens in the ring.
/// 8 ratio width bytes a completed row, 16 width a kept token; latency.
struct CompressArgs {
  StepTables step;
  LayerPages pages;
  DeviceView<const float, 2> a, z;              // [M, width]
  DeviceView<const float, 2> index_a, index_z;  // empty: none
  DeviceView<const float, 1> norm, index_norm;
  DeviceView<float, 1> rings;  // [rings, ring_floats]
  int64_t ring_floats = 0, ring_offset = 0, ring_slots = 0;
  int ratio = 0, rope_table = 0, rope_dim = 0;
  int64_t row_width = 0, index_width = 0;  // c, ci
  float eps = 0;
};

/// Scores of every visible key of tokens that see more than topk. 68 bytes a key of 128 dims and token (128 K context:
/// 2.2 MB a layer), 2 Hi ci FLOPs a key; tensor cores and the heads' sum in shared memory, HBM for one token.
struct IndexScoresArgs {
  StepTables step;
  LayerPages pages;
  DeviceView<const bf16, 3> q;       // [M, Hi, ci]
  DeviceView<const float, 2> gates;  // [M, Hi]
  DeviceView<float, 2> scores;       // [tokens of this launch, max rows] out
  int ratio = 0;
  int64_t topk = 0;
  int64_t first_token = 0;  // of this launch
};

/// The exact topk of each token in rising order; all rows where they are no more. A tie goes to the lower row.
/// The token's scores five times from L2; latency of one block a token.
struct SelectArgs {
  StepTables step;
  DeviceView<const float, 2> scores;  // [tokens of this launch, max rows]
  DeviceView<int32_t, 2> selected;    // [M, topk] out
  int ratio = 0;
  int64_t first_token = 0;  // of this launch
};

/// Copies selected rows that no slot holds from host memory to slots that no token of the last step used, as long as
/// there are any. Which rows have a copy changes no result. row_bytes a missing row over PCIe (at most topk: 0.3 MB a
/// token); latency of a warp a row.
struct StageRowsArgs {
  StepTables step;
  LayerPages pages;
  DeviceView<const int32_t, 2> selected;  // [M, topk]
  DeviceView<int32_t, 1> entry_of;        // [slots] the entry of slot_of whose row a slot holds; kNoSlot: none
  DeviceView<uint32_t, 1> used;           // [slots] the step that needed it last
  DeviceView<uint32_t, 1> hand;           // [1] the slot after the last one that was looked at
  DeviceView<uint32_t, 1> counts;  // [3] added to: rows in slots, rows copied, rows that attention reads in host memory
  int ratio = 0;
};

/// Attention of 16 heads of a token over the window and its compressed rows, in splits of kAttentionSplit rows.
/// fp8_row_bytes a row (640 rows: 0.38 MB, from L2 for all heads but the first 16), 4 H c FLOPs a row; L2 for few
/// tokens, tensor cores for many.
struct AttendArgs {
  StepTables step;
  LayerPages pages;
  DeviceView<const bf16, 3> q;            // [M, H, c]
  DeviceView<const int32_t, 2> selected;  // [M, topk]; csa
  DeviceView<float, 3> partial;           // [tokens x splits, H, c + 2] out: values, maximum, sum
  int64_t first_token = 0, tokens = 0;    // of this launch
  int64_t splits = 1;
  int64_t window = 0;
  int ratio = 0;         // 0: window only
  bool selects = false;  // csa
  int rope_dim = 0;      // dims of a row that are bf16
  float scale = 0;
};

/// Joins the splits in order, divides, rotates back: the input of the output projection. 4 H c bytes a split; latency.
struct AttendMergeArgs {
  AttendArgs attend;
  DeviceView<const float, 1> sinks;  // [H]
  DeviceView<bf16, 3> out;           // [M, H, c] out
  int rope_table = 0, rope_dim = 0;
};

inline constexpr int64_t kAttentionSplit = 128;

// --- mixture of experts ---

/// Router: sqrt(softplus), the k experts with the highest biased score (a tie goes to the lower id), weights.
/// 4 E bytes and k rounds over E a token; latency.
struct RouteArgs {
  StepTables step;
  DeviceView<const float, 2> scores;     // [M, E]
  DeviceView<const float, 1> bias;       // [E]; empty: none
  DeviceView<const int32_t, 2> tid2eid;  // [V, k]; hash layers
  DeviceView<int32_t, 2> ids;            // [M, k] out
  DeviceView<float, 2> weights;          // [M, k] out
  float route_scale = 0;
};

/// Some pairs of one resident expert.
struct ExpertItem {
  int32_t slot = 0, first_pair = 0, count = 0;
};

/// A pair the CPU computes; its result is row `pair`.
struct MissPair {
  int32_t expert = 0, token = 0, pair = 0;
  float weight = 0;
};

/// Sorts (token, expert) pairs by expert and splits them: experts with a slot, in items of at most `item_pairs` pairs,
/// and those without one, for the CPU. One block: latency.
struct PartitionArgs {
  StepTables step;
  DeviceView<const int32_t, 2> ids;      // [M, k]
  DeviceView<const float, 2> weights;    // [M, k]
  DeviceView<const int32_t, 1> slot_of;  // [E] the layer's slots; -1: not resident
  DeviceView<int32_t, 1> pair_token;     // [M k] out
  DeviceView<float, 1> pair_weight;      // [M k] out
  DeviceView<int32_t, 2> pair_of;        // [M, k] out, by rising expert
  DeviceView<ExpertItem, 1> items;       // out
  DeviceView<int32_t, 1> counts;         // [2] out: items, pairs of the CPU
  DeviceView<MissPair, 1> misses;        // pinned, out
  int64_t item_pairs = 16;
};

/// Hands a layer's missing pairs to the CPU: the rows of x they need, then the layer's flag. Pinned memory; with no
/// miss only the flag. 2 D bytes a token over PCIe (8 KB); latency.
struct PublishArgs {
  StepTables step;
  DeviceView<const bf16, 2> x;          // [M, D]
  DeviceView<const int32_t, 1> counts;  // [2]
  DeviceView<bf16, 2> host_x;           // pinned [M, D] out
  DeviceView<uint32_t, 1> flag;         // pinned [2] out: the number of pairs, then the step's number
  DeviceView<uint32_t, 1> arrived;      // [1] blocks done; left at zero
};

/// Hands what a router asked ahead said to the CPU, then its flag. 4 k bytes a token over PCIe; latency.
struct TellArgs {
  StepTables step;
  DeviceView<const int32_t, 2> ids;  // [M, k]
  DeviceView<int32_t, 2> host_ids;   // pinned [M, k] out
  DeviceView<uint32_t, 1> flag;      // pinned [1] out: the step's number
};

/// Waits until the CPU has answered (a layer without misses does not) and takes its rows. 2 D bytes a miss over PCIe.
struct FetchArgs {
  StepTables step;
  DeviceView<const int32_t, 1> counts;   // [2]
  DeviceView<const MissPair, 1> misses;  // pinned
  DeviceView<const bf16, 2> host_y;      // pinned [M k, D], row i of miss i
  DeviceView<const uint32_t, 1> answer;  // pinned [1]: the step's number once host_y is there
  DeviceView<bf16, 2> y;                 // [M k, D] out, by pair
};

/// gate, up and SwiGLU of resident experts (or the shared one): h = weight * swiglu(w1 x, w3 x), as the input of w2.
/// A block owns 128 outputs of an item. w1 and w3 of every item (8.9 MB an expert), 4 I D FLOPs a pair; HBM, from about
/// 64 pairs an expert tensor cores.
struct GateUpArgs {
  DeviceMatrix w1, w3;  // of slot 0
  int64_t slot_bytes = 0;
  DeviceView<const ExpertItem, 1> items;
  DeviceView<const int32_t, 1> counts;      // [0]: items; empty: all of them
  DeviceView<const int32_t, 1> pair_token;  // empty: pair i is token i
  DeviceView<const float, 1> pair_weight;   // empty: 1
  DeviceView<const bf16, 2> x;              // [M, D]
  DeviceView<bf16, 2> h;                    // [pairs, I] out
  int64_t item_pairs = 16;                  // the most an item has: 8, 16 or 64
  float swiglu_limit = 0;
  bool round_linear = true;
};

/// y = w2 h, a row per pair. w2 of every item (4.5 MB), 2 I D FLOPs a pair; HBM, as GateUpArgs.
struct DownArgs {
  DeviceMatrix w2;
  int64_t slot_bytes = 0;
  DeviceView<const ExpertItem, 1> items;
  DeviceView<const int32_t, 1> counts;
  DeviceView<const bf16, 2> h;  // [pairs, I]
  DeviceView<bf16, 2> y;        // [pairs, D] out
  int64_t item_pairs = 16;
};

/// The most likely token of each row, the lower id among equals; -1 where a logit is NaN or infinite. 4 V bytes a row;
/// latency of one block.
struct ArgmaxArgs {
  DeviceView<const float, 2> logits;  // [R, V]
  DeviceView<int32_t, 1> ids;         // [R] out
};

struct KernelTable {
  void (*embed)(Stream&, const EmbedArgs&) = nullptr;
  void (*hc_mix)(Stream&, const HcMixArgs&) = nullptr;
  void (*hc_read)(Stream&, const HcReadArgs&) = nullptr;
  void (*head_read)(Stream&, const HeadReadArgs&) = nullptr;
  void (*hc_write)(Stream&, const HcWriteArgs&) = nullptr;
  void (*linear_input)(Stream&, const LinearInputArgs&) = nullptr;
  void (*norm_rows)(Stream&, const NormRowsArgs&) = nullptr;
  void (*add_rows)(Stream&, const AddRowsArgs&) = nullptr;
  void (*gemm)(Stream&, const GemmArgs&) = nullptr;
  void (*rows)(Stream&, const RowsArgs&) = nullptr;
  void (*queries)(Stream&, const QueryArgs&) = nullptr;
  void (*index_queries)(Stream&, const IndexQueryArgs&) = nullptr;
  void (*compress)(Stream&, const CompressArgs&) = nullptr;
  void (*index_scores)(Stream&, const IndexScoresArgs&) = nullptr;
  void (*select)(Stream&, const SelectArgs&) = nullptr;
  void (*stage_rows)(Stream&, const StageRowsArgs&) = nullptr;
  void (*attend)(Stream&, const AttendArgs&) = nullptr;
  void (*attend_merge)(Stream&, const AttendMergeArgs&) = nullptr;
  void (*route)(Stream&, const RouteArgs&) = nullptr;
  void (*partition)(Stream&, const PartitionArgs&) = nullptr;
  void (*publish)(Stream&, const PublishArgs&) = nullptr;
  void (*tell)(Stream&, const TellArgs&) = nullptr;
  void (*fetch)(Stream&, const FetchArgs&) = nullptr;
  void (*gate_up)(Stream&, const GateUpArgs&) = nullptr;
  void (*down)(Stream&, const DownArgs&) = nullptr;
  void (*argmax)(Stream&, const ArgmaxArgs&) = nullptr;
};

const KernelTable& simt_kernels();
const KernelTable& cuda_kernels();  // builds with the CUDA toolkit

}  // namespace thermocline::gpu
