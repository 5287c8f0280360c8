#include "runtime/engine/context_rigs.h"

#include <cmath>
#include <cstring>

#include "kernels_cpu/ref/ops.h"
#include "runtime/kv/kv_layout.h"

namespace thermocline {
namespace ref = cpu::ref;

AttentionRig::AttentionRig(const cpu::CpuContext& cpu, int64_t tokens, bool fp8)
    : cpu_(cpu),
      tokens_(tokens),
      fp8_(fp8),
      row_bytes_(fp8 ? fp8_row_bytes(kDim, kRope) : kDim * 2),
      q_(random_rows(tokens * kHeads * kDim)),
      sinks_(kHeads, 0.0f),
      out_(q_.size()),
      scratch_(static_cast<size_t>(cpu.pool.size() * kUnit * (kRows + kDim))),
      unpacked_(static_cast<size_t>(fp8 ? std::max<int64_t>(cpu.pool.size(), tokens) * kRows * kDim : 0)) {}

Result<AttentionRig> AttentionRig::create(const cpu::CpuContext& cpu, int64_t tokens, bool fp8) {
  AttentionRig rig(cpu, tokens, fp8);
  TC_ASSIGN(rig.cache_, NumaBuffer::allocate(static_cast<uint64_t>(kCached * rig.row_bytes_)));
  const std::vector<float> values = random_rows(1 << 16);
  for (int64_t r = 0; r < kCached; ++r) {
    const float* row = &values[static_cast<size_t>(r * kDim) % values.size()];
    std::byte* at = rig.cache_.data() + r * rig.row_bytes_;
    if (fp8) cpu::store_fp8_row(row, kDim - kRope, kRope, reinterpret_cast<uint8_t*>(at));
    for (int64_t d = 0; !fp8 && d < kDim; ++d) reinterpret_cast<bf16*>(at)[d] = float_to_bf16(row[d]);
  }
  rig.list_rows();
  rig.read_rows_ = rig.lists_[0];
  return rig;
}

// 128 neighbours, then rows from all over the context in rising order; another choice every run.
void AttentionRig::list_rows() {
  std::mt19937 random(4);
  lists_.assign(kLists, std::vector<const void*>(static_cast<size_t>(tokens_ * kRows)));
  for (auto& rows : lists_)
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t r = static_cast<int64_t>(i % kRows);
      const int64_t at =
          r < 128 ? kCached - 128 + r : (r - 128) * (kCached / 512) + static_cast<int64_t>(random() % 100);
      rows[i] = cache_.data() + at * row_bytes_;
    }
}

void AttentionRig::unpack(int64_t begin, int64_t end, int64_t to) {
  bf16* out = &unpacked_[static_cast<size_t>(to * kDim)];
  const void** rows = &read_rows_[static_cast<size_t>(begin)];
  cpu_.table.unpack_fp8_rows(rows, end - begin, kDim - kRope, kRope, out);
  for (int64_t i = 0; i < end - begin; ++i) rows[i] = out + i * kDim;
}

KernelWork AttentionRig::run() {
  read_rows_ = lists_[next_++ % kLists];
  const int64_t workers = cpu_.pool.size(), units = kHeads / kUnit;
  const bool together = tokens_ <= workers;
  if (fp8_ && together)
    cpu_.pool.split(tokens_ * kRows, [&](int64_t begin, int64_t end, int) { unpack(begin, end, begin); });
  cpu_.pool.split(tokens_ * units, [&](int64_t begin, int64_t end, int worker) {
    int64_t unpacked = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / units, at = (token * kHeads + i % units * kUnit) * kDim;
      if (fp8_ && !together && token != unpacked) unpack(token * kRows, (token + 1) * kRows, worker * kRows);
      unpacked = token;
      float* s = &scratch_[static_cast<size_t>(worker * kUnit * (kRows + kDim))];
      cpu::attention(cpu_.table,
                     {&q_[static_cast<size_t>(at)], kUnit, &read_rows_[static_cast<size_t>(token * kRows)], kRows, kDim,
                      true, 0.04f, true},
                     sinks_.data(), s, s + kUnit * kRows, &out_[static_cast<size_t>(at)]);
    }
  });
  return {0, 4.0 * static_cast<double>(tokens_ * kRows * kHeads * kDim), 0};
}

Result<IndexRig> IndexRig::create(const cpu::CpuContext& cpu, int64_t keys, int64_t lists) {
  IndexRig rig(cpu, keys);
  const int64_t group_bytes = cpu::key_group_bytes(kTiles), groups = keys / cpu::kKeyGroup;
  TC_ASSIGN(rig.cache_, NumaBuffer::allocate(static_cast<uint64_t>(lists * groups * group_bytes)));
  std::mt19937 random(1);
  std::vector<uint8_t> codes(1 << 16);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % 255);
  for (int64_t i = 0; i < lists * groups; ++i) {
    auto* const group = reinterpret_cast<uint8_t*>(rig.cache_.data() + i * group_bytes);
    std::memcpy(group, &codes[static_cast<size_t>(i * 64) % (codes.size() - kTiles * 256)], kTiles * 256);
    for (int64_t s = 0; s < kTiles * 16; ++s)
      group[kTiles * 256 + s] = static_cast<uint8_t>(124 + codes[static_cast<size_t>(i + s) % codes.size()] % 2);
    if (i % groups == 0) rig.lists_.emplace_back();
    rig.lists_.back().push_back(group);
  }
  std::vector<float> q(static_cast<size_t>(kDim));
  rig.query_.resize(kHeads * kTiles);
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t d = 0; d < kDim; ++d) q[static_cast<size_t>(d)] = kE2m1[static_cast<size_t>(h * 7 + d * 3) % 16];
    cpu::pack_index_query(q.data(), kDim, &rig.query_[static_cast<size_t>(h * kTiles)]);
  }
  const auto workers = static_cast<size_t>(cpu.pool.size());
  rig.gates_ = random_rows(kHeads);
  rig.scores_.resize(workers * static_cast<size_t>(keys));
  rig.order_.resize(rig.scores_.size());
  rig.selected_.resize(workers * kTopK);
  rig.topk_.resize(workers * static_cast<size_t>(cpu::SplitTopK::kPartScratch));
  return rig;
}

KernelWork IndexRig::work(int64_t tokens) const {
  const auto keys = static_cast<double>(tokens * keys_);
  return {keys * static_cast<double>(cpu::key_group_bytes(kTiles)) / cpu::kKeyGroup, 0,
          2 * keys * static_cast<double>(kHeads * kDim)};
}

void IndexRig::score(const uint8_t* const* groups, int64_t begin, int64_t end, float* out) const {
  if (begin < end)
    cpu_.table.index_scores_fp4(query_.data(), gates_.data(), kHeads, groups + begin, end - begin, kTiles,
                                out + begin * cpu::kKeyGroup);
}

KernelWork IndexRig::scan() {
  const uint8_t* const* groups = next_list().data();
  cpu_.pool.split(keys_ / cpu::kKeyGroup,
                  [&](int64_t begin, int64_t end, int) { score(groups, begin, end, scores_.data()); });
  return work(1);
}

KernelWork IndexRig::select_one() {
  const uint8_t* const* groups = next_list().data();
  cpu::SplitTopK top(scores_.data(), keys_, kTopK, cpu_.pool.size(), topk_.data(), order_.data(), selected_.data());
  cpu_.pool.run([&](int worker) {
    const auto group = [&](int part) { return (top.first(part) + cpu::kKeyGroup - 1) / cpu::kKeyGroup; };
    score(groups, group(worker), group(worker + 1), scores_.data());
    top.count(worker);
  });
  top.find();
  cpu_.pool.run([&](int worker) { top.gather(worker); });
  top.choose();
  cpu_.pool.run([&](int worker) { top.write(worker); });
  return work(1);
}

KernelWork IndexRig::select_many(int64_t tokens) {
  const uint8_t* const* groups = next_list().data();  // of one sequence
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int worker) {
    for (; begin < end; ++begin) {
      float* const scores = &scores_[static_cast<size_t>(worker * keys_)];
      score(groups, 0, keys_ / cpu::kKeyGroup, scores);
      cpu::select_topk(scores, keys_, kTopK, &order_[static_cast<size_t>(worker * keys_)],
                       &selected_[static_cast<size_t>(worker * kTopK)]);
    }
  });
  return work(tokens);
}

ElementRig::ElementRig(const cpu::CpuContext& cpu)
    : cpu_(cpu), plain_{cpu.table.activation, false}, linear_{cpu.table.activation, true} {}

Result<ElementRig> ElementRig::create(const cpu::CpuContext& cpu, int64_t max_tokens) {
  ElementRig rig(cpu);
  const auto filled = [&](int64_t width) { return random_rows(max_tokens * width); };
  const auto room = [&](int64_t width) { return std::vector<float>(static_cast<size_t>(max_tokens * width)); };
  rig.mixer_ = random_rows(kMixes * kWidth);
  rig.streams_ = filled(kWidth);
  rig.mixes_ = room(kMixes);
  rig.pre_ = room(kStreams);
  rig.post_ = room(kStreams);
  rig.comb_ = room(kStreams * kStreams);
  rig.x_ = room(kDim);
  rig.norm_ = std::vector<float>(kDim, 1.0f);
  rig.bias_ = std::vector<float>(std::max(kExperts, kMixes), 0.0f);
  rig.scores_ = filled(kExperts);
  rig.weights_ = room(6);
  rig.ids_.resize(rig.weights_.size());
  rig.cos_ = std::vector<float>(kRope / 2, 0.8f);
  rig.sin_ = std::vector<float>(kRope / 2, 0.6f);
  rig.qr_ = filled(kQueryRank);
  rig.kv_ = filled(kHeadDim);
  rig.q_ = filled(kHeads * kHeadDim);
  rig.o_ = filled(kHeads * kHeadDim);
  rig.u_ = filled(kOutputRank);
  rig.cached_.resize(static_cast<size_t>(max_tokens * fp8_row_bytes(kHeadDim, kRope)));
  TC_ASSIGN(rig.plain_x_, cpu::GemmInput::allocate(max_tokens, kDim));
  TC_ASSIGN(rig.linear_x_, cpu::GemmInput::allocate(max_tokens, kDim));
  TC_ASSIGN(rig.qr_x_, cpu::GemmInput::allocate(max_tokens, kQueryRank));
  TC_ASSIGN(rig.o_x_, cpu::GemmInput::allocate(max_tokens * kGroups, kHeads * kHeadDim / kGroups));
  TC_ASSIGN(rig.u_x_, cpu::GemmInput::allocate(max_tokens, kOutputRank));
  return rig;
}

void ElementRig::streams(int64_t tokens) {
  for (int block = 0; block < 2; ++block) {
    read(tokens);
    write(tokens);
  }
  route(tokens);
}

void ElementRig::read(int64_t tokens) {
  cpu_.pool.run([&](int worker) {
    const int64_t first = kMixes * worker / cpu_.pool.size(), last = kMixes * (worker + 1) / cpu_.pool.size();
    for (int64_t token = 0; token < tokens && first < last; ++token)
      cpu_.table.gemv_f32(&mixer_[static_cast<size_t>(first * kWidth)], &streams_[static_cast<size_t>(token * kWidth)],
                          last - first, kWidth, &mixes_[static_cast<size_t>(token * kMixes + first)]);
  });
  plain_x_.reshape(cpu_.table, plain_.activation, tokens, kDim);
  linear_x_.reshape(cpu_.table, linear_.activation, tokens, kDim);
  const float scales[3] = {1, 1, 1};
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float* in = &streams_[static_cast<size_t>(token * kWidth)];
      float *mixes = &mixes_[static_cast<size_t>(token * kMixes)], *x = &x_[static_cast<size_t>(token * kDim)],
            *pre = &pre_[static_cast<size_t>(token * kStreams)];
      const float scale = 1.0f / std::sqrt(cpu_.table.sum_squares(in, kWidth) / static_cast<float>(kWidth) + 1e-6f);
      for (int64_t n = 0; n < kMixes; ++n) mixes[n] *= scale;
      ref::hc_split(mixes, scales, bias_.data(), kStreams, 20, 1e-6f, pre,
                    &post_[static_cast<size_t>(token * kStreams)],
                    &comb_[static_cast<size_t>(token * kStreams * kStreams)]);
      ref::hc_read(in, pre, kStreams, kDim, true, x);
      cpu::rms_norm(cpu_.table, x, norm_.data(), kDim, 1e-6f, true, x);
      cpu::store_row(plain_, x, kDim, plain_x_.row({0, tokens}, token));
      cpu::store_row(linear_, x, kDim, linear_x_.row({0, tokens}, token));
    }
  });
}

void ElementRig::write(int64_t tokens) {
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* const post = &post_[static_cast<size_t>(token * kStreams)];
      std::fill_n(post, kStreams, 0.0f);  // so that streams do not grow from run to run
      ref::hc_write(&streams_[static_cast<size_t>(token * kWidth)], &x_[static_cast<size_t>(token * kDim)], post,
                    &comb_[static_cast<size_t>(token * kStreams * kStreams)], kStreams, kDim, true);
    }
  });
}

void ElementRig::route(int64_t tokens) {
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* scores = &scores_[static_cast<size_t>(token * kExperts)];
      for (int64_t e = 0; e < kExperts; ++e) scores[e] = ref::sqrt_softplus(scores[e]);
      ref::route(scores, bias_.data(), kExperts, 6, 1.5f, &ids_[static_cast<size_t>(token * 6)],
                 &weights_[static_cast<size_t>(token * 6)]);
    }
  });
}

void ElementRig::rows(int64_t tokens) {
  constexpr int64_t kNope = kHeadDim - kRope, kPairs = kRope / 2;
  qr_x_.reshape(cpu_.table, linear_.activation, tokens, kQueryRank);
  cpu_.pool.split(tokens, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float *row = &kv_[static_cast<size_t>(token * kHeadDim)], *qr = &qr_[static_cast<size_t>(token * kQueryRank)];
      cpu::rms_norm(cpu_.table, row, norm_.data(), kHeadDim, 1e-6f, true, row);
      ref::rope(row + kNope, cos_.data(), sin_.data(), kPairs, false, true);
      cpu::store_fp8_row(row, kNope, kRope, &cached_[static_cast<size_t>(token * fp8_row_bytes(kHeadDim, kRope))]);
      cpu::rms_norm(cpu_.table, qr, norm_.data(), kQueryRank, 1e-6f, true, qr);
      cpu::store_row(linear_, qr, kQueryRank, qr_x_.row({0, tokens}, token));
    }
  });
  cpu_.pool.split(tokens * kHeads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* const q = &q_[static_cast<size_t>(i * kHeadDim)];
      ref::head_norm(q, kHeadDim, 1e-6f, true);
      ref::rope(q + kNope, cos_.data(), sin_.data(), kPairs, false, true);
      ref::rope(&o_[static_cast<size_t>(i * kHeadDim)] + kNope, cos_.data(), sin_.data(), kPairs, true, true);
    }
  });
  cpu::prepare(cpu_, TensorView<const float, 2>(o_.data(), {tokens * kGroups, kHeads * kHeadDim / kGroups}), plain_,
               o_x_, kGroups);
  cpu::prepare(cpu_, TensorView<const float, 2>(u_.data(), {tokens, kOutputRank}), linear_, u_x_);
}

}  // namespace thermocline
