#include "runtime/engine/kernel_rigs.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace thermocline {
namespace {

using cpu::PackedMatrix;
using cpu::PackedShape;
using cpu::ScaleFormat;
using cpu::WeightFormat;

constexpr int64_t kPattern = 1 << 16;

// Codes that are numbers in their format: e4m3 without NaN, any nibbles, bf16 of order one.
std::vector<uint8_t> tile_pattern(WeightFormat format) {
  std::vector<uint8_t> bytes(kPattern);
  std::mt19937 random(1);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random() % 126);
  if (format == WeightFormat::bf16) {
    const std::vector<float> values = random_rows(kPattern / 2);
    for (size_t i = 0; i < values.size(); ++i) {
      const bf16 word = float_to_bf16(values[i]);
      std::memcpy(&bytes[2 * i], &word, sizeof word);
    }
  }
  return bytes;
}

std::vector<uint8_t> scale_pattern(ScaleFormat format) {
  std::vector<uint8_t> bytes(kPattern);
  std::mt19937 random(2);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(118 + random() % 4);
  if (format != ScaleFormat::e8m0_rows)
    for (size_t i = 0; i < bytes.size(); i += 4) {
      const float scale = 0x1p-7f;
      std::memcpy(&bytes[i], &scale, sizeof scale);
    }
  return bytes;
}

void fill_share(std::byte* data, int64_t bytes, const WorkerPool::Team& team, const std::vector<uint8_t>& pattern) {
  const int64_t begin = bytes * team.rank / team.size, end = bytes * (team.rank + 1) / team.size;
  for (int64_t at = begin; at < end;) {
    const int64_t from = at % kPattern, count = std::min(kPattern - from, end - at);
    std::memcpy(data + at, pattern.data() + from, static_cast<size_t>(count));
    at += count;
  }
}

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

std::vector<float> random_rows(int64_t count) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = round_bf16(normal(random));
  return x;
}

PackedShape mxfp4_shape(int64_t n, int64_t k) { return {WeightFormat::mxfp4, ScaleFormat::e8m0_rows, n, k}; }
PackedShape fp8_shape(int64_t n, int64_t k) { return {WeightFormat::fp8, ScaleFormat::f32_blocks, n, k, 4}; }
PackedShape bf16_shape(int64_t n, int64_t k) { return {WeightFormat::bf16, ScaleFormat::none, n, k}; }

Result<RandomWeights> RandomWeights::create(WorkerPool& pool, std::span<const PackedShape> shapes,
                                            std::span<const int64_t> unit, uint64_t bytes) {
  RandomWeights w;
  w.shapes_ = static_cast<int64_t>(shapes.size());
  const int nodes = pool.nodes();
  std::vector<PackedMatrix> set;
  int64_t set_bytes = 0;  // on a node
  for (size_t i = 0; i < shapes.size(); ++i) {
    PackedMatrix m;
    static_cast<PackedShape&>(m) = shapes[i];
    m.nodes = nodes;
    m.groups_per_node = (m.row_groups() + nodes * unit[i] - 1) / (nodes * unit[i]) * unit[i];
    set.push_back(m);
    set_bytes += align64(m.slice_groups() * m.group_tile_bytes()) + align64(m.slice_groups() * m.group_scale_bytes());
  }
  TC_CHECK(nodes > 0 && set_bytes > 0);
  const int64_t sets = std::max<int64_t>(1, static_cast<int64_t>(bytes) / nodes / set_bytes);
  for (int node = 0; node < nodes; ++node) {
    TC_ASSIGN(NumaBuffer arena, NumaBuffer::allocate(static_cast<uint64_t>(sets * set_bytes), pool.os_node(node)));
    w.arenas_.push_back(std::move(arena));
    w.node_offsets_.push_back(w.arenas_.back().data() - w.arenas_[0].data());
  }
  std::byte* at = w.arenas_[0].data();
  for (int64_t s = 0; s < sets; ++s)
    for (PackedMatrix m : set) {
      m.node_offsets = w.node_offsets_.data();
      m.tiles = reinterpret_cast<const uint8_t*>(at);
      at += align64(m.slice_groups() * m.group_tile_bytes());
      m.scales = reinterpret_cast<const uint8_t*>(at);
      at += align64(m.slice_groups() * m.group_scale_bytes());
      w.matrices_.push_back(m);
    }
  w.fill(pool);
  return w;
}

// Each node's slice by its own workers, so that it lies there even where the system refuses to bind it.
void RandomWeights::fill(WorkerPool& pool) {
  std::array<std::vector<uint8_t>, 3> tiles;
  std::array<std::vector<uint8_t>, 2> scales = {scale_pattern(ScaleFormat::e8m0_rows),
                                                scale_pattern(ScaleFormat::f32_blocks)};
  for (const WeightFormat f : {WeightFormat::mxfp4, WeightFormat::fp8, WeightFormat::bf16})
    tiles[static_cast<size_t>(f)] = tile_pattern(f);
  pool.run([&](int worker) {
    const WorkerPool::Team& team = pool.team(worker);
    const ptrdiff_t offset = node_offsets_[static_cast<size_t>(team.node)];
    for (const PackedMatrix& m : matrices_) {
      const auto place = [&](const uint8_t* plane) {
        return reinterpret_cast<std::byte*>(const_cast<uint8_t*>(plane)) + offset;
      };
      fill_share(place(m.tiles), m.slice_groups() * m.group_tile_bytes(), team, tiles[static_cast<size_t>(m.format)]);
      fill_share(place(m.scales), m.slice_groups() * m.group_scale_bytes(), team,
                 scales[m.scale != ScaleFormat::e8m0_rows]);
    }
  });
}

void RandomWeights::touch(WorkerPool& pool) const {
  constexpr int64_t kPage = 4096;
  pool.run([&](int worker) {
    const WorkerPool::Team& team = pool.team(worker);
    const NumaBuffer& arena = arenas_[static_cast<size_t>(team.node)];
    const auto bytes = static_cast<int64_t>(arena.size());
    const int64_t end = bytes * (team.rank + 1) / team.size;
    for (int64_t at = bytes * team.rank / team.size; at < end; at += kPage)
      (void)*static_cast<const volatile std::byte*>(arena.data() + at);
  });
}

Result<MoeRig> MoeRig::create(const cpu::CpuContext& cpu, const Shape& shape, uint64_t weight_bytes) {
  MoeRig rig(cpu, shape);
  const PackedShape shapes[] = {mxfp4_shape(shape.inter_dim, shape.dim), mxfp4_shape(shape.inter_dim, shape.dim),
                                mxfp4_shape(shape.dim, shape.inter_dim)};
  const int64_t unit[] = {cpu::kMoeUnit, cpu::kMoeUnit, 1};
  const auto bytes = static_cast<uint64_t>(shapes[0].bytes() + shapes[1].bytes() + shapes[2].bytes());
  const uint64_t most = std::clamp(weight_bytes, bytes * static_cast<uint64_t>(shape.top_k),
                                   bytes * static_cast<uint64_t>(shape.experts));
  TC_ASSIGN(rig.weights_, RandomWeights::create(cpu.pool, shapes, unit, most));
  const int64_t sets = rig.weights_.sets();
  for (int64_t e = 0; e < shape.experts; ++e)
    rig.experts_.push_back(
        {rig.weights_.matrix(e % sets, 0), rig.weights_.matrix(e % sets, 1), rig.weights_.matrix(e % sets, 2)});
  return rig;
}

Status MoeRig::prepare(int64_t tokens, cpu::Activation activation) {
  weights_.touch(cpu_.pool);
  tokens_ = tokens;
  format_ = {activation, activation != cpu::Activation::int8};
  TC_ASSIGN(x_, cpu::GemmInput::allocate(tokens, s_.dim));
  TC_ASSIGN(workspace_,
            cpu::MoeWorkspace::allocate(cpu_.pool.size(), tokens, s_.top_k, s_.experts, s_.dim, s_.inter_dim));
  const std::vector<float> rows = random_rows(tokens * s_.dim);
  cpu::prepare(cpu_, TensorView<const float, 2>(rows.data(), {tokens, s_.dim}), format_, x_);
  out_.assign(static_cast<size_t>(tokens * s_.dim), 0);
  gates_.assign(static_cast<size_t>(tokens * s_.top_k), 0.25f);
  ids_.assign(gates_.size(), 0);
  return {};
}

KernelWork MoeRig::run_uniform() {
  std::vector<bool> seen(experts_.size());
  int64_t distinct = 0;
  for (size_t i = 0; i < ids_.size(); ++i) {
    const size_t k = static_cast<size_t>(s_.top_k);
    const auto token = ids_.begin() + static_cast<ptrdiff_t>(i / k * k), at = ids_.begin() + static_cast<ptrdiff_t>(i);
    do *at = static_cast<int32_t>(random_() % experts_.size());
    while (std::find(token, at, *at) != at);
    distinct += !seen[static_cast<size_t>(*at)];
    seen[static_cast<size_t>(*at)] = true;
  }
  return run(distinct);
}

KernelWork MoeRig::run_in_turn() {
  for (size_t i = 0; i < ids_.size(); ++i)
    ids_[i] =
        static_cast<int32_t>((next_ + static_cast<int64_t>(i) % s_.top_k) % static_cast<int64_t>(experts_.size()));
  next_ += s_.top_k;
  return run(s_.top_k);
}

KernelWork MoeRig::run(int64_t distinct) {
  KernelWork work;
  work.bytes = static_cast<double>(distinct) * static_cast<double>(expert_bytes());
  const double ops = 2.0 * static_cast<double>(tokens_ * s_.top_k * 3 * s_.dim * s_.inter_dim);
  (format_.activation == cpu::Activation::int8 ? work.int8_ops : work.flops) = ops;
  cpu::moe(cpu_, experts_, nullptr, x_, x_, {ids_.data(), {tokens_, s_.top_k}}, {gates_.data(), {tokens_, s_.top_k}},
           {s_.swiglu_limit, true, format_, format_}, workspace_, out_.data());
  return work;
}

Result<GemmRig> GemmRig::create(const cpu::CpuContext& cpu, std::vector<PackedShape> shapes, uint64_t weight_bytes) {
  GemmRig rig(cpu);
  const std::vector<int64_t> unit(shapes.size(), 1);
  TC_ASSIGN(rig.weights_, RandomWeights::create(cpu.pool, shapes, unit, weight_bytes));
  rig.shapes_ = std::move(shapes);
  return rig;
}

Status GemmRig::prepare(int64_t tokens) {
  weights_.touch(cpu_.pool);
  tokens_ = tokens;
  inputs_.clear();
  int64_t widest = 0;
  for (const PackedShape& shape : shapes_) {
    TC_ASSIGN(cpu::GemmInput x, cpu::GemmInput::allocate(tokens, shape.k));
    const std::vector<float> rows = random_rows(tokens * shape.k);
    cpu::prepare(cpu_, TensorView<const float, 2>(rows.data(), {tokens, shape.k}), {cpu_.table.activation, true}, x);
    inputs_.push_back(std::move(x));
    widest = std::max(widest, shape.n);
  }
  y_.assign(static_cast<size_t>(tokens * widest), 0);
  return {};
}

KernelWork GemmRig::run() {
  KernelWork work;
  const int64_t set = next_++ % weights_.sets();
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const PackedMatrix& w = weights_.matrix(set, static_cast<int64_t>(i));
    cpu::gemm(cpu_, w, inputs_[i], y_.data(), true);
    work += {static_cast<double>(w.bytes()), 2.0 * static_cast<double>(w.n * w.k * tokens_), 0};
  }
  return work;
}

}  // namespace thermocline
