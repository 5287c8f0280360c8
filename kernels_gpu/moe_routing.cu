// Who computes what of a mixture-of-experts layer: the router, the split of its pairs by the device's slot table, and
// the hand-over of the missing ones to the CPU and back.
#include "kernels_gpu/device/device_view.h"
#include "kernels_gpu/device/numbers.cuh"
#include "kernels_gpu/launch.h"

namespace thermocline::gpu {
namespace {
using namespace dev;

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

TC_DEVICE float sqrt_softplus(float x) { return sqrtf(max_of(x, 0.0f) + log1pf(expf(-absolute(x)))); }

// One warp a token. A lane holds every 32nd expert; k rounds of an argmax, ties to the lower id.
TC_KERNEL(32)
route_kernel(const RouteArgs args) {
  TC_SHARED(float, scores, kMaxExperts);
  TC_SHARED(int32_t, chosen, kMaxTopK);
  const int token = block_x();
  const int64_t experts = args.scores.shape[1], k = args.ids.shape[1];
  for (int64_t e = lane(); e < experts; e += 32) scores[e] = sqrt_softplus(args.scores(token, e));
  warp_sync();
  const TokenInfo info = args.step.tokens(token);
  if (args.tid2eid.pointer) {
    for (int64_t j = lane(); j < k; j += 32) chosen[j] = args.tid2eid(info.id, j);
  } else {
    uint32_t taken = 0;  // bit i: this lane's i-th expert
    for (int64_t j = 0; j < k; ++j) {
      float best = -INFINITY;
      int id = 0x7fffffff;
      int i = 0;
      for (int64_t e = lane(); e < experts; e += 32, ++i) {
        const float biased =
            static_cast<float>(scores[e]) + (args.bias.pointer ? static_cast<float>(args.bias(e)) : 0.0f);
        if (!(taken >> i & 1) && (id == 0x7fffffff || biased > best)) {
          best = biased;
          id = static_cast<int>(e);
        }
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = shuffle_xor(kFullMask, best, offset);
        const int other_id = shuffle_xor(kFullMask, id, offset);
        if (other_id != 0x7fffffff && (id == 0x7fffffff || other > best || (other == best && other_id < id))) {
          best = other;
          id = other_id;
        }
      }
      if (id % 32 == lane()) taken |= 1u << (id / 32);
      if (lane() == 0) chosen[j] = id;
    }
  }
  warp_sync();
  if (lane() == 0) {
    float sum = 0;
    for (int64_t j = 0; j < k; ++j) sum = add(sum, scores[static_cast<int32_t>(chosen[j])]);
    for (int64_t j = 0; j < k; ++j) {
      const int32_t id = chosen[j];
      args.ids(token, j) = id;
      args.weights(token, j) = mul(static_cast<float>(scores[id]) / sum, args.route_scale);
    }
  }
}

// One block. Thread e counts and places the pairs of expert e (every block_threads()-th expert).
TC_KERNEL(1024)
partition_kernel(const PartitionArgs args) {
  TC_SHARED(int32_t, count, kMaxExperts);
  TC_SHARED(int32_t, pairs_before, kMaxExperts + 1);
  TC_SHARED(int32_t, items_before, kMaxExperts + 1);
  TC_SHARED(int32_t, misses_before, kMaxExperts + 1);
  const int64_t experts = args.slot_of.shape[0], tokens = args.ids.shape[0], k = args.ids.shape[1];
  for (int64_t e = thread(); e < experts; e += block_threads()) {
    int32_t n = 0;
    for (int64_t token = 0; token < tokens; ++token) {
      const TokenInfo info = args.step.tokens(token);
      if (info.pos < 0) continue;  // padding
      for (int64_t j = 0; j < k; ++j) n += args.ids(token, j) == e;
    }
    count[e] = n;
  }
  block_sync();
  if (warp() == 0) {  // three running sums at once, 32 experts at a time
    int32_t pairs = 0, items = 0, misses = 0;
    for (int64_t base = 0; base < experts; base += 32) {
      const int64_t e = base + lane();
      const int32_t n = e < experts ? static_cast<int32_t>(count[e]) : 0;
      const bool resident = e < experts && static_cast<int32_t>(args.slot_of(e)) >= 0;
      int32_t sums[3] = {n, resident ? static_cast<int32_t>((n + args.item_pairs - 1) / args.item_pairs) : 0,
                         resident ? 0 : n};
      const int32_t own[3] = {sums[0], sums[1], sums[2]};
      for (int offset = 1; offset < 32; offset *= 2)
        for (int i = 0; i < 3; ++i) {
          const int32_t below = shuffle(kFullMask, sums[i], max_of(lane() - offset, 0));
          if (lane() >= offset) sums[i] += below;
        }
      if (e < experts) {
        pairs_before[e] = pairs + sums[0] - own[0];
        items_before[e] = items + sums[1] - own[1];
        misses_before[e] = misses + sums[2] - own[2];
      }
      pairs += shuffle(kFullMask, sums[0], 31);
      items += shuffle(kFullMask, sums[1], 31);
      misses += shuffle(kFullMask, sums[2], 31);
    }
    if (lane() == 0) {
      args.counts(0) = items;
      args.counts(1) = misses;
    }
  }
  for (int64_t i = thread(); i < tokens * k; i += block_threads()) {
    const TokenInfo info = args.step.tokens(i / k);
    if (info.pos < 0) args.pair_of(i / k, i % k) = 0;  // read for a row nobody wants
  }
  block_sync();
  for (int64_t e = thread(); e < experts; e += block_threads()) {
    const int32_t n = count[e], slot = args.slot_of(e);
    int32_t pair = pairs_before[e], miss = misses_before[e], item = items_before[e];
    if (n == 0) continue;
    for (int32_t first = 0; slot >= 0 && first < n; first += static_cast<int32_t>(args.item_pairs), ++item)
      args.items(item) = ExpertItem{slot, pair + first, min_of(n - first, static_cast<int32_t>(args.item_pairs))};
    for (int64_t token = 0; token < tokens; ++token) {
      const TokenInfo info = args.step.tokens(token);
      if (info.pos < 0) continue;
      for (int64_t j = 0; j < k; ++j) {
        if (args.ids(token, j) != e) continue;
        const float weight = args.weights(token, j);
        args.pair_token(pair) = static_cast<int32_t>(token);
        args.pair_weight(pair) = weight;
        if (slot < 0)
          args.misses(miss++) = MissPair{static_cast<int32_t>(e), static_cast<int32_t>(token), pair, weight};
        // The place among the token's experts by rising id; an expert named twice keeps its order.
        int64_t place = 0;
        for (int64_t other = 0; other < k; ++other) {
          const int32_t id = args.ids(token, other);
          place += id < e || (id == e && other < j);
        }
        args.pair_of(token, place) = pair++;
      }
    }
  }
}

// A block copies its token's row if the CPU needs it; the last one raises the flag.
TC_KERNEL(128)
publish_kernel(const PublishArgs args) {
  const int64_t token = block_x(), width = args.x.shape[1];
  const int32_t misses = args.counts(1);
  if (misses > 0)
    for (int64_t at = 8 * thread(); at < width; at += 8 * block_threads())
      *reinterpret_cast<Vec4*>(args.host_x.write(token * width + at, 8)) =
          *reinterpret_cast<const Vec4*>(args.x.read(token * width + at, 8));
  fence_system();
  block_sync();
  if (thread() == 0 && atomic_add(args.arrived, 0, 1u) == static_cast<uint32_t>(grid_x()) - 1) {
    fence_system();
    args.arrived(0) = 0;
    args.flag(0) = static_cast<uint32_t>(misses);
    store_release_system(args.flag.write(1, 1), args.step.step(0));
  }
}

TC_KERNEL(32)
tell_kernel(const TellArgs args) {
  const int64_t k = args.ids.shape[1];
  for (int64_t i = lane(); i < args.ids.shape[0] * k; i += 32) args.host_ids(i / k, i % k) = args.ids(i / k, i % k);
  fence_system();
  warp_sync();
  if (lane() == 0) store_release_system(args.flag.write(0, 1), args.step.step(0));
}

TC_KERNEL(128)
fetch_kernel(const FetchArgs args) {
  const int32_t misses = args.counts(1);
  if (misses == 0) return;  // the whole grid: nobody waits
  const uint32_t step = args.step.step(0);
  if (thread() == 0)
    while (load_acquire_system(args.answer.pointer) != step) pause();
  block_sync();
  const int64_t width = args.y.shape[1];
  for (int64_t i = block_x(); i < misses; i += grid_x()) {
    const MissPair miss = args.misses(i);
    for (int64_t at = 8 * thread(); at < width; at += 8 * block_threads())
      *reinterpret_cast<Vec4*>(args.y.write(miss.pair * width + at, 8)) =
          *reinterpret_cast<const Vec4*>(args.host_y.read(i * width + at, 8));
  }
}

}  // namespace

void TC_BACKEND::route(Stream& stream, const RouteArgs& args) {
  TC_CHECK(args.scores.shape[1] <= kMaxExperts && args.ids.shape[1] <= kMaxTopK);
  launch(stream, "route", route_kernel, {args.scores.shape[0]}, 32, args);
}
void TC_BACKEND::partition(Stream& stream, const PartitionArgs& args) {
  TC_CHECK(args.slot_of.shape[0] <= kMaxExperts);
  const int threads = static_cast<int>((args.slot_of.shape[0] + 31) / 32 * 32);
  launch(stream, "partition", partition_kernel, {1}, threads, args);
}
void TC_BACKEND::publish(Stream& stream, const PublishArgs& args) {
  TC_CHECK(args.x.shape[1] % 8 == 0);
  launch(stream, "publish", publish_kernel, {args.x.shape[0]}, 128, args);
}
void TC_BACKEND::tell(Stream& stream, const TellArgs& args) { launch(stream, "tell", tell_kernel, {1}, 32, args); }
void TC_BACKEND::fetch(Stream& stream, const FetchArgs& args) {
  const int64_t pairs = args.y.shape[0];
  launch(stream, "fetch", fetch_kernel, {pairs < 32 ? pairs : 32}, 128, args);
}

}  // namespace thermocline::gpu
