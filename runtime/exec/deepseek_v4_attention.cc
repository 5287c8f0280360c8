// The attention half of a DeepSeek-V4 layer, in the order the data moves: projections of x, cached rows, queries,
// compressed rows, the indexer's choice, attention, the grouped output projection. Source: spec sections 3.6 - 3.8.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels_cpu/indexer.h"
#include "kernels_cpu/ref/ops.h"
#include "runtime/base/number_formats.h"
#include "runtime/exec/deepseek_v4_step.h"

namespace thermocline {
namespace ref = cpu::ref;
using cpu::Attention;
using deepseek_v4::CompressorWeights;
using sched::Phase;
using sched::Segment;

void DeepseekV4Step::attention(int index, const LayerWeights& w, const Segments& segments) {
  const LayerKind kind = g_.kind(index);
  const bool scores = kind == LayerKind::csa && must_score(index, segments);
  project_inputs(index, w, scores);    // b.qr, b.kv, b.a, b.z, b.index_g
  store_raw_rows(index, w, segments);  // b.qr_input
  project_queries(index, w, scores);   // b.q, b.index_q
  if (kind != LayerKind::swa) compress(index, w, segments);
  clock_.lap(Phase::dense);
  if (scores) index_select(index, segments);
  if (kind == LayerKind::csa && !scores) select_all(index, segments);
  clock_.lap(Phase::index);
  attend(index, w, segments);  // b.o
  clock_.lap(Phase::attention);
  project_output(w);  // b.y
}

// Everything that multiplies x, in one region.
void DeepseekV4Step::project_inputs(int index, const LayerWeights& w, bool scores) {
  cpu::GemmJob jobs[7] = {job(w.wq_a, linear_x(), b_.qr.data(), true), job(w.wkv, linear_x(), b_.kv.data(), true)};
  size_t count = 2;
  // Compressors and index weights take x as it is; float32 results, as the pooling is in float32.
  const auto add_compressor = [&](const CompressorWeights& c, float* a, float* z) {
    jobs[count++] = job(c.wkv, b_.plain_x, a, false);
    jobs[count++] = job(c.wgate, b_.plain_x, z, false);
  };
  if (g_.kind(index) != LayerKind::swa) add_compressor(w.compressor, b_.a.data(), b_.z.data());
  if (g_.kind(index) == LayerKind::csa) add_compressor(w.index_compressor, b_.index_a.data(), b_.index_z.data());
  if (scores) jobs[count++] = job(w.index_weights_proj, b_.plain_x, b_.index_g.data(), true);
  cpu::gemm(cpu_, std::span(jobs, count));
}

// A normed and rotated row; overwrites it.
void DeepseekV4Step::store_row(float* row, std::byte* out) const {
  const int64_t nope = g_.nope_head_dim();
  if (!round_.results) {
    std::memcpy(out, row, static_cast<size_t>(g_.head_dim) * sizeof(float));
  } else if (options_.fp8_rows) {
    cpu::store_fp8_row(row, nope, g_.rope_head_dim, reinterpret_cast<uint8_t*>(out));
  } else {
    if (round_.cached_rows) ref::fake_fp8(row, nope, cpu::kFp8Block);
    bf16* target = reinterpret_cast<bf16*>(out);
    for (int64_t i = 0; i < g_.head_dim; ++i) target[i] = float_to_bf16(row[i]);
  }
}

void DeepseekV4Step::store_key(const float* key, int64_t row, std::byte* group) const {
  const int64_t c = g_.index_head_dim, r = row % cpu::kKeyGroup;
  if (round_.cached_rows)
    cpu::store_index_key(key, c, r, reinterpret_cast<uint8_t*>(group));
  else
    std::copy_n(key, c, reinterpret_cast<float*>(group) + r * c);
}

void DeepseekV4Step::store_raw_rows(int index, const LayerWeights& w, const Segments& segments) {
  const int table = g_.compress_ratios[index] > 0;
  const int64_t pairs = g_.rope_head_dim / 2, nope = g_.nope_head_dim();
  b_.qr_input.reshape(cpu_.table, linear_.activation, tokens_, g_.q_lora_rank);
  for_tokens(segments, [&](int64_t token, int64_t pos, SequenceKv& kv, int) {
    float* row = &b_.kv[token * g_.head_dim];
    cpu::rms_norm(cpu_.table, row, w.kv_norm, g_.head_dim, g_.norm_eps, round_.results, row);
    ref::rope(row + nope, &b_.cos[table][token * pairs], &b_.sin[table][token * pairs], pairs, false, round_.results);
    store_row(row, kv.raw_row(index, pos));
    float* qr = &b_.qr[token * g_.q_lora_rank];
    cpu::rms_norm(cpu_.table, qr, w.q_norm, g_.q_lora_rank, g_.norm_eps, round_.results, qr);
    cpu::store_row(linear_, qr, g_.q_lora_rank, b_.qr_input.row({0, tokens_}, token));
    const auto add_position = [&](const CompressorWeights& c, float* z) {
      const int64_t width = c.wkv.n;
      const float* ape = c.ape + pos % g_.compress_ratios[index] * width;
      for (int64_t d = 0; d < width; ++d) z[token * width + d] += ape[d];
    };
    if (table) add_position(w.compressor, b_.z.data());
    if (w.index_compressor.ape) add_position(w.index_compressor, b_.index_z.data());
  });
}

void DeepseekV4Step::project_queries(int index, const LayerWeights& w, bool scores) {
  const cpu::GemmJob jobs[2] = {job(w.wq_b, b_.qr_input, b_.q.data(), true),
                                scores ? job(w.index_wq_b, b_.qr_input, b_.index_q.data(), true) : cpu::GemmJob()};
  cpu::gemm(cpu_, std::span(jobs, scores ? 2 : 1));
  const int table = g_.compress_ratios[index] > 0;
  const int64_t pairs = g_.rope_head_dim / 2, c = g_.head_dim, ci = g_.index_head_dim;
  const float gate_scale =
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(ci)) / std::sqrt(static_cast<double>(g_.index_n_heads)));
  const auto head = [&](int64_t i) {
    const int64_t token = i / g_.n_heads;
    float* q = &b_.q[i * c];
    ref::head_norm(q, c, g_.norm_eps, round_.results);
    ref::rope(q + g_.nope_head_dim(), &b_.cos[table][token * pairs], &b_.sin[table][token * pairs], pairs, false,
              round_.results);
  };
  const auto index_head = [&](int64_t i) {
    const int64_t token = i / g_.index_n_heads;
    float* q = &b_.index_q[i * ci];
    ref::rope(q + ci - 2 * pairs, &b_.cos[1][token * pairs], &b_.sin[1][token * pairs], pairs, false, round_.results);
    if (round_.cached_rows) {
      ref::hadamard(q, ci);
      ref::round_to_bf16(q, ci);
      ref::fake_fp4(q, ci);
      cpu::pack_index_query(q, ci, &b_.index_query[i * b_.key_tiles]);
    }
    b_.index_g[i] *= gate_scale;
    if (round_.results) b_.index_g[i] = round_bf16(b_.index_g[i]);
  };
  const int64_t heads = tokens_ * g_.n_heads;
  cpu_.pool.split(heads + (scores ? tokens_ * g_.index_n_heads : 0), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) i < heads ? head(i) : index_head(i - heads);
  });
}

// Emits every row whose window these segments complete.
void DeepseekV4Step::compress(int index, const LayerWeights& w, const Segments& segments) {
  const int64_t ratio = g_.compress_ratios[index], parts = g_.kind(index) == LayerKind::csa ? 2 : 1;
  const auto first_row = [&](const Segment& s) { return s.first_pos / ratio; };
  const auto rows_of = [&](const Segment& s) { return (s.first_pos + s.num_tokens) / ratio - first_row(s); };
  int64_t rows = 0;
  for (const Segment& segment : segments) rows += rows_of(segment);
  cpu_.pool.split(rows * parts, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = i / parts;
      size_t s = 0;
      for (; row >= rows_of(segments[s]); ++s) row -= rows_of(segments[s]);
      const bool indexer = i % parts == 1;
      compress_row(index, segments[s], indexer ? w.index_compressor : w.compressor, indexer,
                   first_row(segments[s]) + row, worker);
    }
  });
  keep_projections(index, segments);
}

// The projections of the last tokens wait in the step's buffers until it is over: rows of later steps pool them, and a
// step that stops leaves the rings as they were.
void DeepseekV4Step::keep_projections(int index, const Segments& segments) {
  for_segments(segments, [&](const Segment& segment, int64_t first, int64_t last, int) {
    const KvLayout::Ring& ring = sequences_[segment.sequence]->layout().ring(index);
    first = std::max(first, segment.first_token + segment.num_tokens - ring.slots);
    for (int64_t token = first; token < last; ++token) {
      float* out = ring_row(ring, token);
      out = std::copy_n(&b_.a[token * ring.width], ring.width, out);
      out = std::copy_n(&b_.z[token * ring.width], ring.width, out);
      out = std::copy_n(b_.index_a.data() + token * ring.index_width, ring.index_width, out);
      std::copy_n(b_.index_z.data() + token * ring.index_width, ring.index_width, out);
    }
  });
}

void DeepseekV4Step::fill_rings(const Segments& segments) {
  for_segments(segments, [&](const Segment& segment, int64_t first, int64_t last, int) {
    const SequenceKv& kv = *sequences_[segment.sequence];
    for (int layer = 0; layer < g_.n_layers; ++layer) {
      const KvLayout::Ring& ring = kv.layout().ring(layer);  // without slots where nothing is compressed
      for (int64_t token = std::max(first, segment.first_token + segment.num_tokens - ring.slots); token < last;
           ++token)
        std::copy_n(ring_row(ring, token), ring.slot_floats(),
                    kv.ring_slot(layer, segment.first_pos + token - segment.first_token));
    }
  });
}

// Row `r`: tokens before the segment come from the ring, its own from the projections; with overlapping windows the
// previous window gives its first half of the channels, this one its second.
void DeepseekV4Step::compress_row(int index, const Segment& segment, const CompressorWeights& w, bool indexer,
                                  int64_t r, int worker) {
  const int ratio = g_.compress_ratios[index];
  SequenceKv& kv = *sequences_[segment.sequence];
  const KvLayout::Ring& ring = kv.layout().ring(index);
  const int64_t width = indexer ? ring.index_width : ring.width, row_width = indexer ? g_.index_head_dim : g_.head_dim;
  const bool overlap = width != row_width;
  const float* a_chunk = indexer ? b_.index_a.data() : b_.a.data();
  const float* z_chunk = indexer ? b_.index_z.data() : b_.z.data();
  const int64_t pairs = g_.rope_head_dim / 2;
  const float** a = &b_.window[worker * 2 * b_.window_entries];
  const float** z = a + b_.window_entries;
  int64_t entries = 0;
  for (int64_t pos = std::max<int64_t>(0, overlap ? (r - 1) * ratio : r * ratio); pos < (r + 1) * ratio; ++pos) {
    const int64_t half = overlap && pos >= r * ratio ? row_width : 0;
    if (pos >= segment.first_pos) {
      const int64_t token = segment.first_token + pos - segment.first_pos;
      a[entries] = a_chunk + token * width + half;
      z[entries] = z_chunk + token * width + half;
    } else {
      const float* slot = kv.ring_slot(index, pos) + (indexer ? 2 * ring.width : 0);
      a[entries] = slot + half;
      z[entries] = slot + width + half;
    }
    ++entries;
  }
  float* row = &b_.row[worker * b_.row_floats];
  float* angles = row + row_width;
  ref::compress_window(a, z, entries, row_width, row);
  if (round_.results) ref::round_to_bf16(row, row_width);
  cpu::rms_norm(cpu_.table, row, w.norm, row_width, g_.norm_eps, round_.results, row);
  ref::rope_angles(frequencies_[1], r * ratio, angles, angles + pairs);
  ref::rope(row + row_width - 2 * pairs, angles, angles + pairs, pairs, false, round_.results);
  if (indexer && round_.cached_rows) {
    ref::hadamard(row, row_width);
    ref::round_to_bf16(row, row_width);
    ref::fake_fp4(row, row_width);
  }
  if (!indexer)
    store_row(row, kv.compressed_row(index, r));
  else
    store_key(row, r, kv.index_group(index, r / cpu::kKeyGroup));
}

// Whether some token of the step sees more compressed rows than it may attend to.
bool DeepseekV4Step::must_score(int index, const Segments& segments) const {
  int64_t most = 0;
  for (const Segment& segment : segments)
    most = std::max(most, (segment.first_pos + segment.num_tokens) / g_.compress_ratios[index]);
  return most > g_.index_topk;
}

void DeepseekV4Step::select_all(int index, const Segments& segments) {
  for (const Segment& segment : segments)
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      const int64_t token = segment.first_token + i;
      const int32_t visible = static_cast<int32_t>((segment.first_pos + i + 1) / g_.compress_ratios[index]);
      b_.selected_count[token] = visible;
      std::iota(&b_.selected[token * g_.index_topk], &b_.selected[token * g_.index_topk] + visible, 0);
    }
}

// Each token of a CSA layer picks the index_topk compressed rows it attends to.
void DeepseekV4Step::index_select(int index, const Segments& segments) {
  const int ratio = g_.compress_ratios[index];
  if (tokens_ >= cpu_.pool.size()) {
    for_tokens(segments, [&](int64_t token, int64_t pos, SequenceKv& kv, int worker) {
      const int64_t visible = (pos + 1) / ratio, count = std::min(visible, g_.index_topk);
      float* scores = &b_.index_scores[worker * b_.index_rows];
      score_keys(index, kv, token, 0, (visible + cpu::kKeyGroup - 1) / cpu::kKeyGroup, worker, scores);
      b_.selected_count[token] = static_cast<int32_t>(count);
      cpu::select_topk(scores, visible, count, &b_.index_order[worker * b_.index_rows],
                       &b_.selected[token * g_.index_topk]);
    });
    return;
  }
  for (const Segment& segment : segments)  // fewer tokens than workers: the keys of each token are split instead
    for (int64_t i = 0; i < segment.num_tokens; ++i)
      index_select_together(index, *sequences_[segment.sequence], segment.first_token + i,
                            (segment.first_pos + i + 1) / ratio);
}

// One token's choice among `visible` rows by all workers.
void DeepseekV4Step::index_select_together(int index, const SequenceKv& kv, int64_t token, int64_t visible) {
  const int64_t count = std::min(visible, g_.index_topk), groups = (visible + cpu::kKeyGroup - 1) / cpu::kKeyGroup;
  float* scores = b_.index_scores.data();
  int32_t *order = b_.index_order.data(), *out = &b_.selected[token * g_.index_topk];
  b_.selected_count[token] = static_cast<int32_t>(count);
  const NearKeys near(kv, index, groups);
  const bool by_node = near.fair(cpu_.pool);  // a region of its own: the choice is by parts of neighbouring rows
  if (by_node) cpu_.pool.run([&](int worker) { score_near_keys(index, kv, near, token, worker, scores); });
  if (visible <= StepBuffers::kSplitTopKRows || count == visible) {
    if (!by_node)
      cpu_.pool.split(groups, [&](int64_t begin, int64_t end, int worker) {
        score_keys(index, kv, token, begin, end, worker, scores);
      });
    return cpu::select_topk(scores, visible, count, order, out);
  }
  cpu::SplitTopK top(scores, visible, count, cpu_.pool.size(), b_.index_topk.data(), order, out);
  cpu_.pool.run([&](int worker) {
    const auto group = [&](int part) { return (top.first(part) + cpu::kKeyGroup - 1) / cpu::kKeyGroup; };
    if (!by_node) score_keys(index, kv, token, group(worker), group(worker + 1), worker, scores);
    top.count(worker);
  });
  top.find();
  cpu_.pool.run([&](int worker) { top.gather(worker); });
  top.choose();
  cpu_.pool.run([&](int worker) { top.write(worker); });
}

// Scores of key groups [begin, end): scores[row], rows counted from the sequence's first.
void DeepseekV4Step::score_keys(int index, const SequenceKv& kv, int64_t token, int64_t begin, int64_t end, int worker,
                                float* scores) {
  for (int64_t first = begin; first < end; first += key_block()) {
    const int64_t count = std::min(key_block(), end - first);
    score_block(token, count, worker, scores + first * cpu::kKeyGroup,
                [&](int64_t i) { return kv.index_group(index, first + i); });
  }
}

// Those of a worker's share of the groups on its node: scored page after page together, as groups of a page alone are
// too few to read ahead, and put where they belong.
void DeepseekV4Step::score_near_keys(int index, const SequenceKv& kv, const NearKeys& near, int64_t token, int worker,
                                     float* scores) {
  alignas(64) float block[StepBuffers::kIndexBlock * cpu::kKeyGroup];
  const WorkerPool::Team& team = cpu_.pool.team(worker);
  const NearKeys::Share share = near.share(team);
  for (int64_t first = share.begin; first < share.end; first += key_block()) {
    const int64_t count = std::min(key_block(), share.end - first);
    const auto group = [&](int64_t i) { return near.group(team.node, first + i); };
    score_block(token, count, worker, block, [&](int64_t i) { return kv.index_group(index, group(i)); });
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(block + i * cpu::kKeyGroup, cpu::kKeyGroup, scores + group(i) * cpu::kKeyGroup);
  }
}

// Scores of `count` key groups, at most key_block(), that lie at keys_at(0), keys_at(1) ..; out [count, kKeyGroup].
template <class KeysAt>
void DeepseekV4Step::score_block(int64_t token, int64_t count, int worker, float* out, const KeysAt& keys_at) {
  const void** keys = &b_.rows[worker * b_.row_stride()];
  const float* gates = &b_.index_g[token * g_.index_n_heads];
  const int64_t c = g_.index_head_dim;
  if (round_.cached_rows) {
    for (int64_t i = 0; i < count; ++i) keys[i] = keys_at(i);
    return cpu_.table.index_scores_fp4(&b_.index_query[token * g_.index_n_heads * b_.key_tiles], gates,
                                       g_.index_n_heads, reinterpret_cast<const uint8_t* const*>(keys), count,
                                       b_.key_tiles, out);
  }
  for (int64_t i = 0; i < count * cpu::kKeyGroup; ++i)
    keys[i] = reinterpret_cast<const float*>(keys_at(i / cpu::kKeyGroup)) + i % cpu::kKeyGroup * c;
  cpu::index_scores_f32(cpu_.table, &b_.index_q[token * g_.index_n_heads * c], g_.index_n_heads, keys,
                        count * cpu::kKeyGroup, c, gates,
                        &b_.index_dots[worker * g_.index_n_heads * StepBuffers::kIndexBlock], out);
}

// What a token attends to: raw rows of its window, then compressed rows, each in rising order.
DeepseekV4Step::RowList DeepseekV4Step::row_list(int index, int64_t token, const Segments& segments) const {
  size_t i = 0;
  while (token >= segments[i].first_token + segments[i].num_tokens) ++i;
  const int64_t pos = segments[i].first_pos + token - segments[i].first_token;
  RowList list{*sequences_[segments[i].sequence], std::max<int64_t>(0, pos - g_.window_size + 1)};
  list.window = pos + 1 - list.first_pos;
  const LayerKind kind = g_.kind(index);
  if (kind == LayerKind::csa) {
    list.selected = &b_.selected[token * g_.index_topk];
    list.compressed = b_.selected_count[token];
  } else if (kind == LayerKind::hca) {
    list.compressed = (pos + 1) / g_.compress_ratios[index];
  }
  return list;
}

// rows[0 ..] <- rows [first, last) of the list as attention reads them: where they lie, or FP8 unpacked to `unpacked`.
void DeepseekV4Step::gather_rows(int index, const RowList& list, int64_t first, int64_t last, const void** rows,
                                 bf16* unpacked) const {
  for (int64_t i = first; i < last; ++i) {
    const int64_t r = i - list.window;
    rows[i - first] = r < 0 ? list.kv.raw_row(index, list.first_pos + i)
                            : list.kv.compressed_row(index, list.selected ? list.selected[r] : r);
  }
  if (!options_.fp8_rows) return;
  cpu_.table.unpack_fp8_rows(rows, last - first, g_.nope_head_dim(), g_.rope_head_dim, unpacked);
  for (int64_t i = 0; i < last - first; ++i) rows[i] = unpacked + i * g_.head_dim;
}

void DeepseekV4Step::attend(int index, const LayerWeights& w, const Segments& segments) {
  Attention a;
  a.c = g_.head_dim;
  a.bf16_rows = a.round = round_.results;
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.c)));
  if (tokens_ > cpu_.pool.size()) return attend_apart(index, w, segments, a);
  int64_t most = 0;
  for (int64_t token = 0; token < tokens_; ++token) most = std::max(most, row_list(index, token, segments).count());
  const int64_t count = options_.fp8_rows && most > b_.slot_rows ? 1 : tokens_;
  for (int64_t token = 0; token < tokens_; token += count) attend_together(index, w, segments, token, count, a);
}

// More tokens than workers: each gathers the rows of its own tokens, once for all the heads it has of one.
void DeepseekV4Step::attend_apart(int index, const LayerWeights& w, const Segments& segments, const Attention& all) {
  constexpr int64_t kBlock = StepBuffers::kHeadBlock;
  const int64_t units = (g_.n_heads + kBlock - 1) / kBlock;
  cpu_.pool.split(tokens_ * units, [&](int64_t begin, int64_t end, int worker) {
    const void** rows = &b_.rows[worker * b_.row_stride()];
    bf16* unpacked = b_.unpacked.data() + worker * b_.slot_rows * g_.head_dim;
    Attention a = all;
    a.rows = rows;
    for (int64_t unit = begin; unit < end;) {
      const int64_t token = unit / units, head = unit % units * kBlock, last = std::min(end, (token + 1) * units);
      const RowList list = row_list(index, token, segments);
      a.n = list.count();
      a.heads = static_cast<int>(std::min<int64_t>(g_.n_heads, (last - token * units) * kBlock) - head);
      if (options_.fp8_rows && a.n > b_.slot_rows) {
        attend_row_blocks(index, w, list, token, head, a, worker);
      } else {
        gather_rows(index, list, 0, a.n, rows, unpacked);
        attend_heads(index, w, token, head, a, worker);
      }
      unit = last;
    }
  });
}

// Tokens [first, first + count), no more than workers: rows are gathered once, by all workers; heads are shared out.
void DeepseekV4Step::attend_together(int index, const LayerWeights& w, const Segments& segments, int64_t first,
                                     int64_t count, const Attention& all) {
  const int64_t parts = cpu_.pool.size();  // of a token's rows
  cpu_.pool.split(count * parts, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = i / parts, part = i % parts;
      const RowList list = row_list(index, first + slot, segments);
      const int64_t from = list.count() * part / parts, to = list.count() * (part + 1) / parts;
      gather_rows(index, list, from, to, &b_.rows[slot * b_.row_stride()] + from,
                  b_.unpacked.data() + (slot * b_.slot_rows + from) * g_.head_dim);
    }
  });
  const int64_t share = count * g_.n_heads / parts;  // heads of one token that a worker should take together
  const int64_t heads_per_unit = std::clamp<int64_t>(share, 1, StepBuffers::kHeadBlock);
  const int64_t units = (g_.n_heads + heads_per_unit - 1) / heads_per_unit;
  const auto attention_of = [&](int64_t slot) {
    Attention a = all;
    a.rows = &b_.rows[slot * b_.row_stride()];
    a.n = row_list(index, first + slot, segments).count();
    return a;
  };
  if (heads_per_unit < StepBuffers::kHeadBlock && b_.max_rows > cpu::kRowBlock) {
    for (int64_t slot = 0; slot < count; ++slot) attend_split(index, w, first + slot, attention_of(slot));
    return;
  }
  cpu_.pool.split(count * units, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit % units * heads_per_unit;
      Attention a = attention_of(unit / units);
      a.heads = static_cast<int>(std::min<int64_t>(heads_per_unit, g_.n_heads - head));
      attend_heads(index, w, first + unit / units, head, a, worker);
    }
  });
}

// Heads [head, head + all.heads) of a token over gathered rows.
void DeepseekV4Step::attend_heads(int index, const LayerWeights& w, int64_t token, int64_t head, const Attention& all,
                                  int worker) {
  float* scores = &b_.attention[worker * b_.attention_floats];
  float* partial = scores + b_.attention_heads * (b_.max_rows + 1);
  for (int h = 0; h < all.heads; h += StepBuffers::kHeadBlock) {
    Attention a = all;
    const int64_t at = (token * g_.n_heads + head + h) * a.c;
    a.heads = std::min(StepBuffers::kHeadBlock, all.heads - h);
    a.q = &b_.q[at];
    cpu::attention(cpu_.table, a, w.attn_sink + head + h, scores, partial, &b_.o[at]);
    for (int i = 0; i < a.heads; ++i) rotate_back(index, token, &b_.o[at + i * a.c]);
  }
}

// The same of more FP8 rows than a slot holds: gathered block by block, for the scores and again for the values.
void DeepseekV4Step::attend_row_blocks(int index, const LayerWeights& w, const RowList& list, int64_t token,
                                       int64_t first_head, const Attention& all, int worker) {
  const int64_t c = all.c, at = (token * g_.n_heads + first_head) * c;
  const void** rows = &b_.rows[worker * b_.row_stride()];
  float* scores = &b_.attention[worker * b_.attention_floats];
  float* denominators = scores + b_.attention_heads * b_.max_rows;
  float* partial = denominators + b_.attention_heads;
  const auto for_blocks = [&](const auto& fn) {
    for (int64_t block = 0; block < all.blocks(); ++block) {
      const int64_t first = block * cpu::kRowBlock, count = std::min(cpu::kRowBlock, all.n - first);
      gather_rows(index, list, first, first + count, rows + first, b_.unpacked.data() + worker * b_.slot_rows * c);
      for (int h = 0; h < all.heads; h += StepBuffers::kHeadBlock) {
        Attention a = all;
        a.heads = std::min(StepBuffers::kHeadBlock, all.heads - h);
        a.q = &b_.q[at + h * c];
        fn(a, h, block, first, count);
      }
    }
  };
  for_blocks([&](const Attention& a, int h, int64_t, int64_t first, int64_t count) {
    cpu::attention_scores(cpu_.table, a, first, count, scores + h * a.n);
  });
  for (int h = 0; h < all.heads; ++h)
    denominators[h] = cpu::attention_softmax(cpu_.table, all, w.attn_sink[first_head + h], scores + h * all.n);
  for_blocks([&](const Attention& a, int h, int64_t block, int64_t, int64_t) {
    float* out = &b_.o[at + h * c];
    cpu::attention_values(cpu_.table, a, block, scores + h * a.n, block == 0 ? out : partial);
    for (int64_t i = 0; block > 0 && i < a.heads * c; ++i) out[i] += partial[i];
  });
  for (int h = 0; h < all.heads; ++h) {
    cpu::attention_finish(cpu_.table, all, denominators[h], &b_.o[at + h * c]);
    rotate_back(index, token, &b_.o[at + h * c]);
  }
}

// Few tokens, many rows: blocks of rows are split over the workers too. The same sums in the same order as
// attend_heads'.
void DeepseekV4Step::attend_split(int index, const LayerWeights& w, int64_t token, const Attention& all) {
  const int64_t c = g_.head_dim, heads = g_.n_heads, blocks = all.blocks();
  const int64_t per_unit = std::clamp<int64_t>(heads * blocks / cpu_.pool.size(), 1, StepBuffers::kHeadBlock);
  const int64_t units = (heads + per_unit - 1) / per_unit, at = token * heads * c;
  const auto for_blocks = [&](const auto& fn) {
    cpu_.pool.split(units * blocks, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks * per_unit;
        Attention a = all;
        a.heads = static_cast<int>(std::min(per_unit, heads - head));
        a.q = &b_.q[at + head * c];
        fn(a, head, i % blocks);
      }
    });
  };
  for_blocks([&](const Attention& a, int64_t head, int64_t block) {
    const int64_t first = block * cpu::kRowBlock;
    cpu::attention_scores(cpu_.table, a, first, std::min(cpu::kRowBlock, a.n - first), &b_.split_scores[head * a.n]);
  });
  cpu_.pool.split(heads, [&](int64_t begin, int64_t end, int) {
    for (int64_t h = begin; h < end; ++h)
      b_.denominators[h] = cpu::attention_softmax(cpu_.table, all, w.attn_sink[h], &b_.split_scores[h * all.n]);
  });
  for_blocks([&](const Attention& a, int64_t head, int64_t block) {
    cpu::attention_values(cpu_.table, a, block, &b_.split_scores[head * a.n],
                          &b_.split_values[(block * heads + head) * c]);
  });
  cpu_.pool.split(heads, [&](int64_t begin, int64_t end, int) {
    for (int64_t h = begin; h < end; ++h) {
      float* out = &b_.o[at + h * c];
      std::copy_n(&b_.split_values[h * c], c, out);
      for (int64_t block = 1; block < blocks; ++block)
        for (int64_t d = 0; d < c; ++d) out[d] += b_.split_values[(block * heads + h) * c + d];
      cpu::attention_finish(cpu_.table, all, b_.denominators[h], out);
      rotate_back(index, token, out);
    }
  });
}

// The inverse RoPE of an attention result, by the query's own position.
void DeepseekV4Step::rotate_back(int index, int64_t token, float* out) const {
  const int table = g_.compress_ratios[index] > 0;
  const int64_t pairs = g_.rope_head_dim / 2;
  ref::rope(out + g_.nope_head_dim(), &b_.cos[table][token * pairs], &b_.sin[table][token * pairs], pairs, true,
            round_.results);
}

// Grouped low-rank output projection. wo_a takes its input as it is (the official code keeps it in bf16).
void DeepseekV4Step::project_output(const LayerWeights& w) {
  const int64_t groups = g_.o_groups, group_width = g_.n_heads * g_.head_dim / groups, rank = g_.o_lora_rank;
  cpu::prepare(cpu_, TensorView<const float, 2>(b_.o.data(), {tokens_ * groups, group_width}), plain_, b_.o_input,
               groups);
  output_jobs_.clear();
  for (int64_t group = 0; group < groups; ++group)
    output_jobs_.push_back({.w = &w.wo_a,
                            .x = &b_.o_input,
                            .rows = {group * tokens_, tokens_},
                            .y = b_.u.data() + group * rank,
                            .y_stride = groups * rank,
                            .round = round_.results,
                            .first_group = group * rank / cpu::kTileRows,
                            .groups = rank / cpu::kTileRows});
  cpu::gemm(cpu_, output_jobs_);
  cpu::prepare(cpu_, TensorView<const float, 2>(b_.u.data(), {tokens_, groups * rank}), linear_, b_.u_input);
  const cpu::GemmJob out = job(w.wo_b, b_.u_input, b_.y.data(), true);
  cpu::gemm(cpu_, std::span(&out, 1));
}

}  // namespace thermocline
