// The SIMT interpreter: what a warp and a block do, streams and copies, and the faults it exists to catch, each planted
// in a small kernel. Built with the checks on, whatever the rest of the build does.
#include "kernels_gpu/simt/simt_device.h"

#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "kernels_gpu/device/simt.cuh"
#include "kernels_gpu/launch.h"
#include "tests/support/fixtures.h"

static_assert(thermocline::gpu::dev::kChecks, "planted faults need TC_SIMT_CHECKS");

namespace thermocline::gpu {
namespace {
using namespace dev;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

class Simt : public ::testing::Test {
 protected:
  void SetUp() override {
    device_ = simt::make_device({.memory_bytes = 1 << 20, .workers = 2}).value();
    stream_ = device_->new_stream().value();
  }
  template <class T>
  DeviceView<T, 1> view(const DeviceBuffer& buffer) {
    return {reinterpret_cast<T*>(buffer.data()), {static_cast<int64_t>(buffer.size() / sizeof(T))}};
  }
  std::vector<float> download(const DeviceBuffer& buffer) {
    std::vector<float> out(buffer.size() / sizeof(float));
    stream_->copy(out.data(), buffer.data(), buffer.size(), CopyKind::d2h);
    const Status status = stream_->synchronize();
    EXPECT_TRUE(status.ok()) << (status.ok() ? "" : status.error().message);
    return out;
  }
  /// What the stream complains about.
  std::string fault() {
    const Status status = stream_->synchronize();
    return status.ok() ? "no fault" : status.error().message;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

struct Out {
  DeviceView<float, 1> out;
  int mode = 0;
};

// --- what works ---

TC_KERNEL(64) sums(const Out args) {
  TC_SHARED(float, scratch, 33);
  const float mine = static_cast<float>(block_x() * 1000 + thread());
  const float sum = block_sum(mine, scratch);
  if (thread() == 0) args.out(block_x()) = sum;
}

TEST_F(Simt, BlocksRunInParallelAndBarriersJoinWarps) {
  DeviceBuffer out = device_->allocate(40 * sizeof(float)).value();
  launch(*stream_, "sums", sums, {40}, 64, Out{view<float>(out)});
  const std::vector<float> got = download(out);
  for (int b = 0; b < 40; ++b) EXPECT_EQ(got[static_cast<size_t>(b)], static_cast<float>(b * 64000 + 63 * 32));
}

TC_KERNEL(32) votes(const Out args) {
  const uint32_t odd = ballot(kFullMask, lane() % 2 == 1);
  const int next = shuffle(kFullMask, lane(), lane() + 1);
  float x = 0;
  if (lane() < 16)  // half a warp has its own collective
    x = shuffle(0xffffu, static_cast<float>(lane()), 15 - lane());
  warp_sync();
  args.out(lane()) = static_cast<float>(next) + (odd == 0xaaaaaaaau ? 100.0f : 0.0f) + 1000 * x;
}

TEST_F(Simt, ShufflesAndVotesOfAWholeAndOfHalfAWarp) {
  DeviceBuffer out = device_->allocate(32 * sizeof(float)).value();
  launch(*stream_, "votes", votes, {1}, 32, Out{view<float>(out)});
  const std::vector<float> got = download(out);
  for (int l = 0; l < 32; ++l)
    EXPECT_EQ(got[static_cast<size_t>(l)], static_cast<float>((l + 1) % 32 + 100 + (l < 16 ? 1000 * (15 - l) : 0)));
}

// D = A B with A [16, 16] and B [16, 8] given by formulas; fragments as the PTX manual lays them out.
float a_value(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); }
float b_value(int k, int column) { return static_cast<float>((k * 5 + column * 2) % 9 - 4); }

TC_KERNEL(32) multiply(const Out args) {
  TC_SHARED(bf16, matrix, 16 * 16);
  for (int i = lane(); i < 256; i += 32) matrix[i] = float_to_bf16(a_value(i / 16, i % 16));
  warp_sync();
  const int g = lane() / 4, c = lane() % 4;
  uint32_t a[4];
  // Matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15: the A fragment's registers.
  ldmatrix_x4(a, matrix, (lane() / 8 % 2 * 8 + lane() % 8) * 16 + lane() / 16 * 8);
  const auto pair = [&](int k) {
    return static_cast<uint32_t>(float_to_bf16(b_value(k, g))) | static_cast<uint32_t>(float_to_bf16(b_value(k + 1, g)))
                                                                     << 16;
  };
  const uint32_t b[2] = {pair(2 * c), pair(2 * c + 8)};
  float d[4] = {1, 1, 1, 1};
  mma_bf16_16816(d, a, b);
  for (int i = 0; i < 4; ++i) args.out((g + i / 2 * 8) * 8 + 2 * c + i % 2) = d[i];
}

TEST_F(Simt, TensorCoreFragments) {
  DeviceBuffer out = device_->allocate(128 * sizeof(float)).value();
  launch(*stream_, "multiply", multiply, {1}, 32, Out{view<float>(out)});
  const std::vector<float> got = download(out);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float expected = 1;
      for (int k = 0; k < 16; ++k) expected += a_value(row, k) * b_value(k, column);
      EXPECT_EQ(got[static_cast<size_t>(row * 8 + column)], expected);
    }
}

TC_KERNEL(32) multiply_e4m3(const Out args) {
  const int g = lane() / 4, c = lane() % 4;
  const auto word = [](const auto& value) {
    uint32_t w = 0;
    for (int e = 0; e < 4; ++e) w |= static_cast<uint32_t>(float_to_e4m3(value(e))) << (8 * e);
    return w;
  };
  uint32_t a[4], b[2];
  for (int half = 0; half < 2; ++half) {
    a[2 * half] = word([&](int e) { return a_value(g, 16 * half + 4 * c + e); });
    a[2 * half + 1] = word([&](int e) { return a_value(g + 8, 16 * half + 4 * c + e); });
    b[half] = word([&](int e) { return b_value(16 * half + 4 * c + e, g); });
  }
  float d[4] = {};
  mma_e4m3_16832(d, a, b);
  for (int i = 0; i < 4; ++i) args.out((g + i / 2 * 8) * 8 + 2 * c + i % 2) = d[i];
}

TEST_F(Simt, Fp8TensorCoreFragments) {
  DeviceBuffer out = device_->allocate(128 * sizeof(float)).value();
  launch(*stream_, "multiply_e4m3", multiply_e4m3, {1}, 32, Out{view<float>(out)});
  const std::vector<float> got = download(out);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float expected = 0;
      for (int k = 0; k < 32; ++k) expected += a_value(row, k) * b_value(k, column);
      EXPECT_EQ(got[static_cast<size_t>(row * 8 + column)], expected);
    }
}

TC_KERNEL(32) transpose(const Out args) {
  TC_SHARED(bf16, matrix, 4 * 8 * 8);
  for (int i = lane(); i < 256; i += 32) matrix[i] = static_cast<bf16>(i);
  warp_sync();
  uint32_t out[4];
  ldmatrix_x4<true>(out, matrix, lane() * 8);
  for (int j = 0; j < 4; ++j) {
    args.out(j * 64 + lane() / 4 * 8 + lane() % 4 * 2) = static_cast<float>(out[j] & 0xffff);
    args.out(j * 64 + lane() / 4 * 8 + lane() % 4 * 2 + 1) = static_cast<float>(out[j] >> 16);
  }
}

TEST_F(Simt, LdmatrixTransposes) {
  DeviceBuffer out = device_->allocate(256 * sizeof(float)).value();
  launch(*stream_, "transpose", transpose, {1}, 32, Out{view<float>(out)});
  const std::vector<float> got = download(out);
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column)
        EXPECT_EQ(got[static_cast<size_t>(j * 64 + column * 8 + row)], static_cast<float>(j * 64 + row * 8 + column));
}

struct Copy {
  DeviceView<const float, 1> in;
  DeviceView<float, 1> out;
  int mode = 0;
};

// Mode 0 as it should be; 1: reads without waiting; 2: reads another lane's bytes without a barrier.
TC_KERNEL(32) async(const Copy args) {
  TC_SHARED(float, stage, 128);
  cp_async16(stage, 4 * thread(), args.in.read(4 * thread(), 4));
  cp_async_commit();
  if (args.mode != 1) cp_async_wait<0>();
  if (args.mode == 0) block_sync();
  const int from = args.mode == 1 ? thread() : (thread() + 1) % 32;
  for (int i = 0; i < 4; ++i) args.out(4 * thread() + i) = stage[4 * from + i];
}

TEST_F(Simt, AsyncCopiesArriveWhenWaitedFor) {
  DeviceBuffer in = device_->allocate(512).value(), out = device_->allocate(512).value();
  std::vector<float> values(128);
  std::iota(values.begin(), values.end(), 0.0f);
  stream_->copy(in.data(), values.data(), 512, CopyKind::h2d);
  launch(*stream_, "async", async, {1}, 32, Copy{view<const float>(in), view<float>(out)});
  const std::vector<float> got = download(out);
  for (size_t i = 0; i < 128; ++i) EXPECT_EQ(got[i], values[(i + 4) % 128]);
}

TC_KERNEL(64) count(const Out args) {
  TC_SHARED(int32_t, counter, 1);
  if (thread() == 0) counter[0] = 0;
  block_sync();
  atomic_add(counter, 0, 1);
  block_sync();
  if (thread() == 0) atomic_add(args.out, 0, static_cast<float>(static_cast<int32_t>(counter[0])));
}

TEST_F(Simt, AtomicsOfBlocksAndDevice) {
  DeviceBuffer out = device_->allocate(sizeof(float)).value();
  const float zero = 0;
  stream_->copy(out.data(), &zero, sizeof(zero), CopyKind::h2d);
  launch(*stream_, "count", count, {10}, 64, Out{view<float>(out)});
  EXPECT_EQ(download(out)[0], 640);
}

// --- what is caught ---

TC_KERNEL(64) shared_faults(const Out args) {
  TC_SHARED(float, x, 64);
  const int t = thread();
  switch (args.mode) {
    case 0:  // two writers
      x[t / 2] = static_cast<float>(t);
      break;
    case 1:  // a missing barrier: another thread's element
      x[t] = static_cast<float>(t);
      args.out(t) = x[63 - t];
      break;
    case 2:  // out of bounds
      x[t + 1] = 0;
      break;
    case 3:  // never written
      if (t < 8) x[t] = 0;
      block_sync();
      args.out(t) = x[t];
      break;
    case 4:  // a read, then a write of the same element with no barrier
      x[t] = 0;
      block_sync();
      args.out(t) = x[(t + 1) % 64];
      x[t] = 1;
      break;
    case 5:  // out of bounds of device memory
      args.out(64 + t) = 0;
      break;
    case 6:  // a barrier orders warps, warp_sync does not
      x[t] = 0;
      warp_sync();
      args.out(t) = x[63 - t];
      break;
    case 7:  // but lanes of one warp it does: no fault
      x[t] = 2;
      warp_sync();
      args.out(t) = x[t ^ 1];
      break;
    default:
      break;
  }
}

struct Planted {
  const char* name;
  int mode;
  const char* complaint;
};

class SharedMemory : public Simt, public ::testing::WithParamInterface<Planted> {};

TEST_P(SharedMemory, IsChecked) {
  DeviceBuffer out = device_->allocate(64 * sizeof(float)).value();
  launch(*stream_, "shared_faults", shared_faults, {1}, 64, Out{view<float>(out), GetParam().mode});
  const std::string complaint = fault();
  EXPECT_NE(complaint.find(GetParam().complaint), std::string::npos) << complaint;
  if (std::string_view(GetParam().complaint) != "no fault") {
    EXPECT_NE(complaint.find("shared_faults, block (0, 0, 0), warp "), std::string::npos) << complaint;
    // It sticks: later work is skipped, and says why.
    launch(*stream_, "shared_faults", shared_faults, {1}, 64, Out{view<float>(out), 7});
    EXPECT_EQ(fault(), complaint);
  }
}

INSTANTIATE_TEST_SUITE_P(Planted, SharedMemory,
                         ::testing::Values(Planted{"TwoWriters", 0,
                                                   "race: x[0] was written by thread 0 with no barrier since"},
                                           Planted{"MissingBarrier", 1, "which nobody has written"},
                                           Planted{"OutOfBounds", 2, "x[64] is outside the array of 64"},
                                           Planted{"Uninitialised", 3, "reads x[8], which nobody has written"},
                                           Planted{"WriteAfterRead", 4, "race: x["},
                                           Planted{"DeviceOutOfBounds", 5, "element 64 is outside a device view of 64"},
                                           Planted{"WarpSyncIsNoBarrier", 6, "which nobody has written"},
                                           Planted{"WarpSyncOrdersItsLanes", 7, "no fault"}),
                         [](const auto& test) { return std::string(test.param.name); });

TC_KERNEL(64) late_reader(const Out args) {
  TC_SHARED(float, x, 64);
  x[thread()] = 0;
  block_sync();
  x[thread()] = 1;  // read below by another warp, with no barrier since
  args.out(thread()) = x[63 - thread()];
}

TEST_F(Simt, AMissingBarrierAfterEarlierOnesIsARace) {
  DeviceBuffer out = device_->allocate(64 * sizeof(float)).value();
  launch(*stream_, "late_reader", late_reader, {1}, 64, Out{view<float>(out)});
  EXPECT_NE(fault().find("race: x["), std::string::npos);
}

TEST_F(Simt, AnAsyncCopyReadTooEarlyOrByOthersIsCaught) {
  DeviceBuffer in = device_->allocate(512).value(), out = device_->allocate(512).value();
  launch(*stream_, "async", async, {1}, 32, Copy{view<const float>(in), view<float>(out), 1});
  EXPECT_NE(fault().find("which nobody has written"), std::string::npos);
  std::unique_ptr<Stream> other = device_->new_stream().value();
  launch(*other, "async", async, {1}, 32, Copy{view<const float>(in), view<float>(out), 2});
  const Status status = other->synchronize();
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("stage["), std::string::npos) << status.error().message;
}

TC_KERNEL(64) divergence(const Out args) {
  const int t = thread();
  switch (args.mode) {
    case 0:  // lane 5 of warp 1 leaves before a shuffle of all
      if (t == 37) return;
      args.out(t) = shuffle(kFullMask, 1.0f, 0);
      break;
    case 1:  // half the warp is at another collective
      if (lane() < 16)
        args.out(t) = shuffle(kFullMask, 1.0f, 0);
      else
        args.out(t) = static_cast<float>(ballot(kFullMask, true));
      break;
    case 2:  // a thread leaves before the barrier
      if (t == 3) return;
      block_sync();
      break;
    case 3:  // some lanes wait at the barrier, others at a collective
      if (lane() == 9)
        block_sync();
      else
        warp_sync();
      break;
    case 4:  // a lane outside its mask
      args.out(t) = shuffle(0xffu, 1.0f, 0);
      break;
    case 5:  // a source outside the mask
      if (lane() < 8) args.out(t) = shuffle(0xffu, 1.0f, 20);
      break;
    default:
      break;
  }
}

class Divergence : public Simt, public ::testing::WithParamInterface<Planted> {};

TEST_P(Divergence, IsReportedWithKernelBlockAndLane) {
  DeviceBuffer out = device_->allocate(64 * sizeof(float)).value();
  launch(*stream_, "divergence", divergence, {1}, 64, Out{view<float>(out), GetParam().mode});
  const std::string complaint = fault();
  EXPECT_NE(complaint.find(GetParam().complaint), std::string::npos) << complaint;
  EXPECT_NE(complaint.find("divergence, block (0, 0, 0)"), std::string::npos) << complaint;
}

INSTANTIATE_TEST_SUITE_P(
    Planted, Divergence,
    ::testing::Values(Planted{"EndedLane", 0, "warp 1, lane 5: missing from shuffle of lane 0: it has ended"},
                      Planted{"OtherCollective", 1, "lane 16: missing from shuffle of lane 0: it is at ballot"},
                      Planted{"EndedThread", 2, "lane 3: ended while thread"},
                      Planted{"AtTheBarrier", 3, "lane 9: missing from warp_sync of lane 0: it waits at block_sync"},
                      Planted{"OutsideItsMask", 4, "shuffle by a lane that is not in its mask"},
                      Planted{"SourceOutsideTheMask", 5, "shuffle from a lane that is not in its mask"}),
    [](const auto& test) { return std::string(test.param.name); });

TC_KERNEL(32) big(const Out args) {
  TC_SHARED(float, x, 30000);
  x[thread()] = 0;
  args.out(0) = x[thread()];
}

TEST_F(Simt, ABlockHasNoMoreSharedMemoryThanTheSmallestCard) {
  DeviceBuffer out = device_->allocate(4).value();
  launch(*stream_, "big", big, {1}, 32, Out{view<float>(out)});
  EXPECT_NE(fault().find("shared memory of 120064 bytes; a block may have 101376"), std::string::npos);
}

// --- streams ---

TC_KERNEL(32) add_one(const Out args) { args.out(thread()) += 1.0f; }

TEST_F(Simt, AMissingEventWaitIsCaughtOnEveryRun) {
  if (kThreadSanitizer) GTEST_SKIP() << "ThreadSanitizer sees the planted race too";
  DeviceBuffer out = device_->allocate(32 * sizeof(float)).value();
  std::unique_ptr<Stream> copies = device_->new_stream().value();
  std::unique_ptr<Event> done = device_->new_event().value();
  const std::vector<float> zeros(32), ones(32, 1.0f);
  for (const bool waits : {true, false}) {
    copies->copy(out.data(), (waits ? zeros : ones).data(), 128, CopyKind::h2d);
    copies->record(*done);
    if (waits) stream_->wait(*done);
    if (!waits) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // that it happens to work is no excuse
    launch(*stream_, "add_one", add_one, {1}, 32, Out{view<float>(out)});
    const std::string complaint = fault();
    if (waits)
      EXPECT_EQ(complaint, "no fault");
    else
      EXPECT_NE(complaint.find("with no event between them"), std::string::npos) << complaint;
    ASSERT_TRUE(copies->synchronize().ok());
  }
}

TEST_F(Simt, ACopyOverWhatAKernelReadsIsCaught) {
  if (kThreadSanitizer) GTEST_SKIP() << "ThreadSanitizer sees the planted race too";
  DeviceBuffer out = device_->allocate(32 * sizeof(float)).value();
  std::unique_ptr<Stream> copies = device_->new_stream().value();
  const std::vector<float> zeros(32);
  stream_->copy(out.data(), zeros.data(), 128, CopyKind::h2d);
  launch(*stream_, "add_one", add_one, {1}, 32, Out{view<float>(out)});
  std::unique_ptr<Event> event = device_->new_event().value();
  stream_->record(*event);
  event->synchronize();  // the host knows; what it queues now is ordered
  copies->copy(out.data(), zeros.data(), 128, CopyKind::h2d);
  EXPECT_TRUE(copies->synchronize().ok());
  launch(*stream_, "add_one", add_one, {1}, 32, Out{view<float>(out)});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  copies->copy(out.data(), zeros.data(), 128, CopyKind::h2d);  // and this is not
  const Status status = copies->synchronize();
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("a copy of 128 bytes writes device memory at 0 that stream"), std::string::npos)
      << status.error().message;
}

TEST_F(Simt, AGraphRunsAgainWithTheMemoryOfTheMoment) {
  DeviceBuffer out = device_->allocate(32 * sizeof(float)).value();
  std::vector<float> host(32, 5.0f);
  stream_->begin_capture();
  stream_->copy(out.data(), host.data(), 128, CopyKind::h2d);
  launch(*stream_, "add_one", add_one, {1}, 32, Out{view<float>(out)});
  std::unique_ptr<Graph> graph = stream_->end_capture().value();
  for (const float start : {5.0f, 7.0f}) {
    std::fill(host.begin(), host.end(), start);
    stream_->launch(*graph);
    ASSERT_TRUE(stream_->synchronize().ok());
    EXPECT_EQ(download(out)[31], start + 1);
  }
}

TEST_F(Simt, MemoryHasACapacityAndComesBack) {
  const Result<DeviceBuffer> too_much = device_->allocate(2 << 20);
  ASSERT_FALSE(too_much.has_value());
  EXPECT_EQ(too_much.error().code, ErrorCode::out_of_memory);
  EXPECT_EQ(device_->free_bytes(), size_t{1} << 20);
  {
    std::vector<DeviceBuffer> pieces;
    for (int i = 0; i < 16; ++i) pieces.push_back(device_->allocate(65536).value());
    EXPECT_EQ(device_->free_bytes(), 0u);
    pieces.erase(pieces.begin() + 3);
    EXPECT_EQ(device_->free_bytes(), 65536u);
  }
  EXPECT_EQ(device_->free_bytes(), size_t{1} << 20);
  // Freed memory reads as NaN: use after free shows.
  DeviceBuffer again = device_->allocate(64).value();
  for (const float x : download(again)) EXPECT_TRUE(std::isnan(x));
  auto small = simt::make_device({.memory_bytes = 1 << 16, .pinned_bytes = 1 << 16, .workers = 1}).value();
  const PinnedBuffer half = small->allocate_pinned(1 << 15).value();
  EXPECT_EQ(small->allocate_pinned((1 << 15) + 1).error().code, ErrorCode::out_of_memory);
  EXPECT_TRUE(small->allocate_pinned(1 << 15).has_value());
  device_->seal();
  EXPECT_DEATH((void)device_->allocate(64), "settled before ready");
}

TEST_F(Simt, CopiesTakeTheTimeOfTheModelledLink) {
  auto slow = simt::make_device({.memory_bytes = 1 << 20, .workers = 1, .copy_gb_per_s = 0.01}).value();
  auto stream = slow->new_stream().value();
  DeviceBuffer buffer = slow->allocate(1 << 18).value();
  const std::vector<std::byte> host(1 << 18);
  const auto start = std::chrono::steady_clock::now();
  stream->copy(buffer.data(), host.data(), host.size(), CopyKind::h2d);
  ASSERT_TRUE(stream->synchronize().ok());
  EXPECT_GE(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 0.026);  // 262,144 / 1e7
}

}  // namespace
}  // namespace thermocline::gpu
