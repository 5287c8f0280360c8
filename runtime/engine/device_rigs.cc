#include "runtime/engine/device_rigs.h"

#include <algorithm>
#include <cmath>

#include "kernels_cpu/indexer.h"
#include "runtime/base/timing.h"
#include "runtime/kv/kv_store.h"

namespace thermocline {
namespace {

using gpu::DeviceMatrix;
using Held = std::vector<gpu::DeviceBuffer>;

constexpr double kMoreThanCaches = 256e6;  // bytes; the largest L2 of gpu_sheets() is half of it
constexpr int64_t kRope = 64, kKeysOfAPage = 64, kIndexRatio = 4;

}  // namespace

Result<DeviceShapes> device_shapes(const std::string& name) {
  if (name == "v4-flash") return DeviceShapes{4096, 2048, 64, 512, 1024, 129280, 6, 64, 128, 512, 128};
  if (name == "v4-pro") return DeviceShapes{7168, 3072, 128, 512, 1536, 129280, 6, 64, 128, 1024, 128};
  if (name == "tiny") return DeviceShapes{256, 128, 8, 128, 128, 1024, 4, 8, 64, 32, 64};
  return invalid("unknown shapes '" + name + "': use v4-flash, v4-pro or tiny");
}

Result<double> DeviceRun::seconds() {
  const Clock::time_point start = Clock::now();
  stream_->launch(*graph_);
  TC_RETURN_IF_ERROR(stream_->synchronize());
  return seconds_since(start);
}

Result<DeviceRig> DeviceRig::create(gpu::Device& device, const DeviceShapes& shapes) {
  DeviceRig rig(device, shapes);
  TC_ASSIGN(rig.stream_, device.new_stream());
  return rig;
}

int64_t DeviceRig::copies_of(double bytes) const {
  return interpreted() ? 1 : std::clamp<int64_t>(static_cast<int64_t>(std::ceil(kMoreThanCaches / bytes)), 2, 64);
}

// Random bytes would be NaN now and then; a pattern of small numbers in every format.
Result<std::byte*> DeviceRig::pattern(size_t bytes, Held& held) {
  TC_ASSIGN(gpu::DeviceBuffer buffer, device_->allocate(bytes));
  std::vector<uint8_t> some(std::min<size_t>(buffer.size(), size_t{1} << 20));
  std::mt19937 random(1);
  for (uint8_t& byte : some) byte = static_cast<uint8_t>(0x30 + random() % 12);
  for (size_t at = 0; at < buffer.size(); at += some.size())
    stream_->copy(buffer.data() + at, some.data(), std::min(some.size(), buffer.size() - at), gpu::CopyKind::h2d);
  TC_RETURN_IF_ERROR(stream_->synchronize());
  held.push_back(std::move(buffer));
  return held.back().data();
}

Result<std::byte*> DeviceRig::upload(const void* from, size_t bytes, Held& held) {
  TC_ASSIGN(gpu::DeviceBuffer buffer, device_->allocate(bytes));
  stream_->copy(buffer.data(), from, bytes, gpu::CopyKind::h2d);
  TC_RETURN_IF_ERROR(stream_->synchronize());
  held.push_back(std::move(buffer));
  return held.back().data();
}

template <class Fn>
Result<DeviceRun> DeviceRig::capture(DeviceRun run, int64_t launches, const KernelWork& each, const Fn& fn) {
  run.stream_ = stream_.get();
  run.launches_ = launches;
  stream_->begin_capture();
  for (int64_t i = 0; i < launches; ++i) {
    fn(i);
    run.work_ += each;
  }
  TC_ASSIGN(run.graph_, stream_->end_capture());
  return run;
}

Result<DeviceMatrix> DeviceRig::matrix(cpu::WeightFormat format, int64_t n, int64_t k, Held& held) {
  DeviceMatrix w;
  w.format = format;
  w.scale = format == cpu::WeightFormat::mxfp4 ? cpu::ScaleFormat::e8m0_rows
            : format == cpu::WeightFormat::fp8 ? cpu::ScaleFormat::f32_blocks
                                               : cpu::ScaleFormat::none;
  w.n = n;
  w.k = k;
  w.scale_tiles = format == cpu::WeightFormat::fp8 ? 4 : 1;
  TC_ASSIGN(const uint8_t* const tiles, array<uint8_t>(w.tile_plane_bytes(), held));
  TC_ASSIGN(const uint8_t* const scales, array<uint8_t>(std::max<int64_t>(w.scale_plane_bytes(), 1), held));
  w.tiles = {tiles, {w.tile_plane_bytes()}};
  w.scales = {scales, {w.scale_plane_bytes()}};
  return w;
}

Result<DeviceMatrices> DeviceRig::matrices(cpu::WeightFormat format, std::span<const Side> sides) {
  double bytes = 0;
  for (const Side& side : sides)
    bytes +=
        static_cast<double>(DeviceMatrix{{format, cpu::ScaleFormat::none, side.n, side.k}, {}, {}}.tile_plane_bytes());
  DeviceMatrices out;
  for (int64_t set = 0; set < copies_of(bytes); ++set)
    for (const Side& side : sides) {
      TC_ASSIGN(const DeviceMatrix w, matrix(format, side.n, side.k, out.held));
      out.all.push_back(w);
    }
  return out;
}

Result<DeviceRun> DeviceRig::gemm(const DeviceMatrices& weights, int64_t tokens) {
  DeviceRun run;
  int64_t n = 0, k = 0;
  for (const DeviceMatrix& w : weights.all) {
    n = std::max(n, w.n);
    k = std::max(k, w.k);
    run.work_ += {static_cast<double>(w.bytes()), 2.0 * static_cast<double>(w.n * w.k * tokens), 0};
  }
  TC_ASSIGN(bf16* const x, array<bf16>(tokens * k, run.held_));
  TC_ASSIGN(float* const y, array<float>(tokens * n, run.held_));
  return capture(std::move(run), static_cast<int64_t>(weights.all.size()), {}, [&](int64_t i) {
    const DeviceMatrix& w = weights.all[static_cast<size_t>(i)];
    gpu::GemmArgs args;
    args.num_jobs = 1;
    args.jobs[0] = {w, x, w.k, y, w.n, tokens, 0, w.row_groups(), true};
    device_->kernels().gemm(*stream_, args);
  });
}

Result<DeviceExperts> DeviceRig::experts() {
  DeviceExperts out;
  Held shapes_only;
  TC_ASSIGN(out.w1, matrix(cpu::WeightFormat::mxfp4, s_.inter, s_.dim, shapes_only));
  TC_ASSIGN(out.w2, matrix(cpu::WeightFormat::mxfp4, s_.dim, s_.inter, shapes_only));
  out.w3 = out.w1;
  out.expert_bytes = 2 * out.w1.bytes() + out.w2.bytes();
  out.slot_bytes = (out.expert_bytes + 4095) / 4096 * 4096;
  out.sets = copies_of(static_cast<double>(out.slot_bytes * s_.experts));
  TC_ASSIGN(uint8_t* const slots, array<uint8_t>(out.sets * s_.experts * out.slot_bytes, out.held));
  const auto place = [&](DeviceMatrix& w, int64_t at) {
    w.tiles = {slots + at, {w.tile_plane_bytes()}};
    w.scales = {slots + at + w.tile_plane_bytes(), {w.scale_plane_bytes()}};
  };
  place(out.w1, 0);
  place(out.w3, out.w1.bytes());
  place(out.w2, 2 * out.w1.bytes());
  return out;
}

// By set: every expert has `tokens` pairs of its own, in pieces of at most `item`.
Result<std::vector<gpu::ExpertItem*>> DeviceRig::expert_items(const DeviceExperts& weights, int64_t tokens,
                                                              int64_t item, Held& held) {
  std::vector<gpu::ExpertItem*> out;
  for (int64_t set = 0; set < weights.sets; ++set) {
    std::vector<gpu::ExpertItem> items;
    for (int64_t e = 0; e < s_.experts; ++e)
      for (int64_t first = 0; first < tokens; first += item)
        items.push_back({static_cast<int32_t>(set * s_.experts + e), static_cast<int32_t>(e * tokens + first),
                         static_cast<int32_t>(std::min(item, tokens - first))});
    TC_ASSIGN(gpu::ExpertItem* const data, values(items, held));
    out.push_back(data);
  }
  return out;
}

Result<DeviceRun> DeviceRig::moe(const DeviceExperts& weights, int64_t tokens) {
  DeviceRun run;
  const int64_t pairs = tokens * s_.experts,
                item = tokens <= 8    ? 8
                       : tokens <= 16 ? 16
                                      : 64,
                items = s_.experts * ((tokens + item - 1) / item);
  TC_ASSIGN(const std::vector<gpu::ExpertItem*> of_set, expert_items(weights, tokens, item, run.held_));
  TC_ASSIGN(bf16* const x, array<bf16>(pairs * s_.dim, run.held_));
  TC_ASSIGN(bf16* const h, array<bf16>(pairs * s_.inter, run.held_));
  TC_ASSIGN(bf16* const y, array<bf16>(pairs * s_.dim, run.held_));
  const KernelWork each{static_cast<double>(s_.experts * weights.expert_bytes),
                        6.0 * static_cast<double>(pairs * s_.dim * s_.inter), 0};
  return capture(std::move(run), weights.sets, each, [&](int64_t set) {
    gpu::GateUpArgs up;
    up.w1 = weights.w1;
    up.w3 = weights.w3;
    up.slot_bytes = weights.slot_bytes;
    up.items = {of_set[static_cast<size_t>(set)], {items}};
    up.x = {x, {pairs, s_.dim}};
    up.h = {h, {pairs, s_.inter}};
    up.item_pairs = item;
    up.swiglu_limit = 10;
    device_->kernels().gate_up(*stream_, up);
    gpu::DownArgs down;
    down.w2 = weights.w2;
    down.slot_bytes = weights.slot_bytes;
    down.items = up.items;
    down.h = {h, {pairs, s_.inter}};
    down.y = {y, {pairs, s_.dim}};
    down.item_pairs = item;
    device_->kernels().down(*stream_, down);
  });
}

/// One sequence per token, `pos` long, all with the same pages.
Result<gpu::StepTables> DeviceRig::tables(int64_t tokens, int64_t pos, int64_t pages, Held& held) {
  const std::vector<gpu::TokenInfo> infos(static_cast<size_t>(tokens),
                                          {0, static_cast<int32_t>(pos), 0, static_cast<int32_t>(pos), 0, 1});
  std::vector<int32_t> table(static_cast<size_t>(pages));
  for (int64_t i = 0; i < pages; ++i) table[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  gpu::StepTables step;
  TC_ASSIGN(gpu::TokenInfo* const token_data, values(infos, held));
  TC_ASSIGN(gpu::SequenceInfo* const sequence, values(std::vector<gpu::SequenceInfo>(1), held));
  TC_ASSIGN(int32_t* const page_data, values(table, held));
  TC_ASSIGN(float* const angles, array<float>(tokens * kRope / 2, held));
  step.tokens = {token_data, {tokens}};
  step.sequences = {sequence, {1}};
  step.pages = {page_data, {pages}};
  step.cos = step.sin = {angles, {1, tokens, kRope / 2}};
  return step;
}

// As if every row were of the window: the same loads as chosen compressed rows.
Result<DeviceRun> DeviceRig::attention(int64_t tokens) {
  DeviceRun run;
  Held& held = run.held_;
  const int64_t rows = s_.window + s_.topk, row_bytes = fp8_row_bytes(s_.head_dim, kRope),
                pages = (rows + kWindowPageTokens - 1) / kWindowPageTokens, page_bytes = kWindowPageTokens * row_bytes;
  gpu::AttendMergeArgs merge;
  gpu::AttendArgs& attend = merge.attend;
  TC_ASSIGN(attend.step, tables(tokens, rows - 1, pages, held));
  TC_ASSIGN(uint8_t* const pool, array<uint8_t>(pages * page_bytes, held));
  TC_ASSIGN(bf16* const q, array<bf16>(tokens * s_.heads * s_.head_dim, held));
  attend.pages.window = {pool, {pages * page_bytes}};
  attend.pages.window_page_bytes = page_bytes;
  attend.pages.row_bytes = row_bytes;
  attend.q = {q, {tokens, s_.heads, s_.head_dim}};
  attend.splits = (rows + gpu::kAttentionSplit - 1) / gpu::kAttentionSplit;
  TC_ASSIGN(float* const partial, array<float>(tokens * attend.splits * s_.heads * (s_.head_dim + 2), held));
  attend.partial = {partial, {tokens * attend.splits, s_.heads, s_.head_dim + 2}};
  attend.tokens = tokens;
  attend.window = rows;
  attend.rope_dim = kRope;
  attend.scale = 0.05f;
  TC_ASSIGN(float* const sinks, array<float>(s_.heads, held));
  TC_ASSIGN(bf16* const out, array<bf16>(tokens * s_.heads * s_.head_dim, held));
  merge.sinks = {sinks, {s_.heads}};
  merge.out = {out, {tokens, s_.heads, s_.head_dim}};
  merge.rope_dim = kRope;
  const KernelWork each{static_cast<double>(tokens * rows * row_bytes),
                        4.0 * static_cast<double>(tokens * s_.heads * rows * s_.head_dim), 0};
  return capture(std::move(run), 4, each, [&](int64_t) {
    device_->kernels().attend(*stream_, attend);
    device_->kernels().attend_merge(*stream_, merge);
  });
}

Result<DeviceRun> DeviceRig::index(int64_t tokens, int64_t keys) {
  DeviceRun run;
  Held& held = run.held_;
  const int64_t tiles = s_.index_dim / cpu::kTileCols, group_bytes = cpu::key_group_bytes(tiles),
                pages = keys / kKeysOfAPage, page_bytes = kKeysOfAPage / cpu::kKeyGroup * group_bytes;
  gpu::IndexScoresArgs args;
  TC_ASSIGN(args.step, tables(tokens, kIndexRatio * keys - 1, pages, held));
  TC_ASSIGN(uint8_t* const pool, array<uint8_t>(pages * page_bytes, held));
  TC_ASSIGN(bf16* const q, array<bf16>(tokens * s_.index_heads * s_.index_dim, held));
  TC_ASSIGN(float* const gates, array<float>(tokens * s_.index_heads, held));
  TC_ASSIGN(float* const scores, array<float>(tokens * keys, held));
  TC_ASSIGN(int32_t* const selected, array<int32_t>(tokens * s_.topk, held));
  args.pages.keys = {pool, {pages * page_bytes}};
  args.pages.key_page_bytes = page_bytes;
  args.pages.rows_per_page = kKeysOfAPage;
  args.pages.index_group_bytes = group_bytes;
  args.q = {q, {tokens, s_.index_heads, s_.index_dim}};
  args.gates = {gates, {tokens, s_.index_heads}};
  args.scores = {scores, {tokens, keys}};
  args.ratio = kIndexRatio;
  args.topk = s_.topk;
  const int64_t key_bytes = tokens * (keys / cpu::kKeyGroup) * group_bytes;
  const KernelWork each{static_cast<double>(key_bytes),
                        2.0 * static_cast<double>(tokens * keys * s_.index_heads * s_.index_dim), 0};
  return capture(std::move(run), 4, each, [&](int64_t) {
    device_->kernels().index_scores(*stream_, args);
    device_->kernels().select(*stream_,
                              {args.step, {scores, {tokens, keys}}, {selected, {tokens, s_.topk}}, kIndexRatio});
  });
}

Result<DeviceRun> DeviceRig::copy(int64_t bytes) {
  DeviceRun run;
  TC_ASSIGN(std::byte* const from, array<std::byte>(bytes, run.held_));
  TC_ASSIGN(std::byte* const to, array<std::byte>(bytes, run.held_));
  return capture(std::move(run), 4, {2.0 * static_cast<double>(bytes), 0, 0},
                 [&](int64_t) { stream_->copy(to, from, static_cast<size_t>(bytes), gpu::CopyKind::d2d); });
}

Result<DeviceRun> DeviceRig::small_launches(int64_t count) {
  DeviceRun run;
  TC_ASSIGN(float* const x, array<float>(s_.dim, run.held_));
  TC_ASSIGN(float* const norm, array<float>(s_.dim, run.held_));
  TC_ASSIGN(bf16* const out, array<bf16>(s_.dim, run.held_));
  return capture(std::move(run), count, {}, [&](int64_t) {
    device_->kernels().norm_rows(*stream_, {{x, {1, s_.dim}}, {}, {norm, {s_.dim}}, {out, {1, s_.dim}}, 1e-6f, true});
  });
}

}  // namespace thermocline
