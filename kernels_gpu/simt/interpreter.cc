#include "kernels_gpu/simt/interpreter.h"

#include <sys/mman.h>

#include <bit>
#include <boost/context/fiber.hpp>
#include <boost/context/fixedsize_stack.hpp>
#include <cstring>
#include <deque>

#include "runtime/base/check.h"
#include "runtime/base/number_formats.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define TC_ASAN_FIBERS 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define TC_TSAN_FIBERS 1
#endif

// The checks and the arithmetic of a block touch nothing another thread writes, and are most of the work: without this
// a suite takes twice as long under ThreadSanitizer.
#ifdef TC_TSAN_FIBERS
#define TC_UNINSTRUMENTED __attribute__((no_sanitize("thread")))
#else
#define TC_UNINSTRUMENTED
#endif

namespace thermocline::gpu::simt {
namespace {

#if defined(TC_ASAN_FIBERS) || defined(TC_TSAN_FIBERS)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

thread_local BlockRunner* runner = nullptr;

/// Ends the fibers of a block in which another lane failed.
struct Abort {};

}  // namespace

// --- who touched what ---

AccessLog::AccessLog(const std::byte* begin, size_t bytes) : begin_(begin), bytes_(bytes) {
  mapped_ = (bytes / kGranule + 1) * sizeof(Entry);
  void* const p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TC_CHECK(p != MAP_FAILED);
  entries_ = static_cast<Entry*>(p);  // all zero: an access of the host before anything else
}

AccessLog::~AccessLog() { munmap(entries_, mapped_); }

TC_UNINSTRUMENTED
bool AccessLog::touch(const void* p, size_t bytes, bool write, const StreamClock& clock, std::string& complaint) {
  if (bytes == 0 || !covers(p)) return true;
  constexpr uint64_t kSequence = (uint64_t{1} << 48) - 1;
  const auto unknown = [&](uint64_t access) { return (access & kSequence) > clock.seen[access >> 48]; };
  const size_t offset = static_cast<size_t>(static_cast<const std::byte*>(p) - begin_);
  const uint64_t mine = static_cast<uint64_t>(clock.stream) << 48 | clock.seen[clock.stream];
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    Entry& e = entries_[g];
    const uint64_t writer = e.writer.load(std::memory_order_relaxed);
    const uint64_t reader = e.reader.load(std::memory_order_relaxed);
    const bool after_write = unknown(writer), after_read = write && unknown(reader);
    if (after_write || after_read) {
      const uint64_t other = after_write ? writer : reader;
      complaint = std::string(write ? "writes" : "reads") + " device memory at " + std::to_string(g * kGranule) +
                  " that stream " + std::to_string(other >> 48) + (after_write ? " wrote" : " read") +
                  " with no event between them";
      return false;
    }
    (write ? e.writer : e.reader).store(mine, std::memory_order_relaxed);
  }
  return true;
}

void AccessLog::forget(const void* p, size_t bytes) {
  const size_t offset = static_cast<size_t>(static_cast<const std::byte*>(p) - begin_);
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    entries_[g].writer.store(0, std::memory_order_relaxed);
    entries_[g].reader.store(0, std::memory_order_relaxed);
  }
}

// --- fibers ---

enum class LaneState : uint8_t { ready, at_op, at_barrier, done };

struct BlockRunner::Lane {
  boost::context::fiber fiber, scheduler;
  LaneState state = LaneState::done;
  bool started = false;
  WarpOp* op = nullptr;
  int arrays = 0;  // shared arrays declared so far
  std::vector<AsyncCopy> copies;
  std::deque<size_t> groups;  // ends of committed groups in copies
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  void* tsan = nullptr;
};

struct BlockRunner::Impl {
  std::deque<Lane> lanes;  // by thread; a Lane never moves
  const std::function<void()>* body = nullptr;
  AccessLog* log = nullptr;
  const StreamClock* clock = nullptr;
  bool aborting = false, quitting = false;
  std::string fault;

  struct Array {
    size_t element_bytes = 0;
    SharedBlock block;
    std::vector<SharedShadow> shadow;
    const char* name = "";
  };
  std::deque<Array> arrays;  // those of the block are the first `used_arrays`
  int used_arrays = 0;
  size_t used_bytes = 0;
  std::unique_ptr<std::byte[]> shared{new std::byte[kMaxSharedBytes + 128]};
  uint32_t epoch = 1;
  std::array<uint32_t, kMaxBlock / kWarp> warp_epoch{};

  // Of the thread's own stack, for the sanitizers.
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* tsan = nullptr;
};

BlockRunner::BlockRunner() : impl_(std::make_unique<Impl>()) {}

BlockRunner::~BlockRunner() {
  impl_->quitting = true;
  for (size_t t = 0; t < impl_->lanes.size(); ++t) {
    resume(static_cast<int>(t));
#ifdef TC_TSAN_FIBERS
    __tsan_destroy_fiber(impl_->lanes[t].tsan);
#endif
  }
}

BlockRunner& BlockRunner::current() { return *runner; }

// From a fiber to the scheduler.
void BlockRunner::yield() {
  Lane& lane = impl_->lanes[static_cast<size_t>(thread_)];
#ifdef TC_ASAN_FIBERS
  __sanitizer_start_switch_fiber(&lane.fake_stack, impl_->stack, impl_->stack_bytes);
#endif
#ifdef TC_TSAN_FIBERS
  __tsan_switch_to_fiber(impl_->tsan, 0);
#endif
  lane.scheduler = std::move(lane.scheduler).resume();
#ifdef TC_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(lane.fake_stack, &impl_->stack, &impl_->stack_bytes);
#endif
}

// From the scheduler to a fiber, until it waits or ends.
void BlockRunner::resume(int thread) {
  Lane& lane = impl_->lanes[static_cast<size_t>(thread)];
  thread_ = thread;
#ifdef TC_ASAN_FIBERS
  __sanitizer_start_switch_fiber(&impl_->fake_stack, lane.stack, kStackBytes);
#endif
#ifdef TC_TSAN_FIBERS
  impl_->tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(lane.tsan, 0);
#endif
  lane.fiber = std::move(lane.fiber).resume();
#ifdef TC_ASAN_FIBERS
  __sanitizer_finish_switch_fiber(impl_->fake_stack, nullptr, nullptr);
#endif
}

void BlockRunner::run(const LaunchShape& shape, Dim block, const std::function<void()>& body, AccessLog* log,
                      const StreamClock* clock) {
  Impl& i = *impl_;
  runner = this;
  shape_ = &shape;
  block_ = block;
  i.body = &body;
  i.log = log;
  i.clock = clock;
  i.aborting = false;
  i.fault.clear();
  i.used_arrays = 0;
  i.used_bytes = 0;
  i.epoch = 1;
  i.warp_epoch.fill(1);
  while (static_cast<int>(i.lanes.size()) < shape.block) {
    Lane& lane = i.lanes.emplace_back();
    const int thread = static_cast<int>(i.lanes.size()) - 1;
    boost::context::fixedsize_stack allocator(kStackBytes);
    const boost::context::stack_context stack = allocator.allocate();
    lane.stack = static_cast<std::byte*>(stack.sp) - stack.size;
#ifdef TC_TSAN_FIBERS
    lane.tsan = __tsan_create_fiber(0);
#endif
    lane.fiber = boost::context::fiber(std::allocator_arg, boost::context::preallocated(stack.sp, stack.size, stack),
                                       allocator, [this, thread](boost::context::fiber&& scheduler) {
                                         Lane& me = impl_->lanes[static_cast<size_t>(thread)];
                                         me.scheduler = std::move(scheduler);
#ifdef TC_ASAN_FIBERS
                                         __sanitizer_finish_switch_fiber(nullptr, &impl_->stack, &impl_->stack_bytes);
#endif
                                         while (!impl_->quitting) {
                                           try {
                                             (*impl_->body)();
                                           } catch (const Abort&) {
                                           } catch (const Fault& fault) {
                                             if (impl_->fault.empty()) impl_->fault = fault.what();
                                           }
                                           me.state = LaneState::done;
                                           yield();
                                         }
#ifdef TC_ASAN_FIBERS
                                         __sanitizer_start_switch_fiber(nullptr, impl_->stack, impl_->stack_bytes);
#endif
#ifdef TC_TSAN_FIBERS
                                         __tsan_switch_to_fiber(impl_->tsan, 0);
#endif
                                         return std::move(me.scheduler);
                                       });
  }
  for (int t = 0; t < shape.block; ++t) {
    Lane& lane = i.lanes[static_cast<size_t>(t)];
    lane.state = LaneState::ready;
    lane.started = false;
    lane.arrays = 0;
    lane.copies.clear();
    lane.groups.clear();
  }
  for (bool running = true; running;) {
    for (int warp = 0; warp < shape.block / kWarp; ++warp) {
      do {
        for (int t = warp * kWarp; t < (warp + 1) * kWarp; ++t) {
          Lane& lane = i.lanes[static_cast<size_t>(t)];
          if (lane.state != LaneState::ready) continue;
          lane.started = true;
          resume(t);
          if (!i.fault.empty()) unwind();
        }
      } while (resolve_warp(warp));
    }
    // Every lane ended or waits at the barrier.
    int ended = -1, waiting = -1;
    for (int t = 0; t < shape.block; ++t)
      (i.lanes[static_cast<size_t>(t)].state == LaneState::done ? ended : waiting) = t;
    if (waiting >= 0 && ended >= 0) {
      thread_ = ended;
      i.fault = describe(ended) + ": ended while thread " + std::to_string(waiting) + " waits at block_sync";
      unwind();
    }
    running = waiting >= 0;
    if (running) {
      ++i.epoch;
      for (int t = 0; t < shape.block; ++t) i.lanes[static_cast<size_t>(t)].state = LaneState::ready;
    }
  }
  runner = nullptr;
}

// A lane failed: the others leave their fibers, and the block ends.
void BlockRunner::unwind() {
  impl_->aborting = true;
  for (int t = 0; t < shape_->block; ++t) {
    Lane& lane = impl_->lanes[static_cast<size_t>(t)];
    if (lane.state != LaneState::done && lane.started) resume(t);
    lane.state = LaneState::done;
  }
  runner = nullptr;
  throw Fault(impl_->fault);
}

std::string BlockRunner::describe(int thread) const {
  const auto dim = [](const Dim& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  return std::string(shape_->kernel) + ", block " + dim(block_) + ", warp " + std::to_string(thread / kWarp) +
         ", lane " + std::to_string(thread % kWarp);
}

void BlockRunner::fail(const std::string& what) const { throw Fault(describe(thread_) + ": " + what); }

void BlockRunner::block_sync() {
  impl_->lanes[static_cast<size_t>(thread_)].state = LaneState::at_barrier;
  yield();
  if (impl_->aborting) throw Abort{};
}

void BlockRunner::collective(WarpOp& op) {
  Lane& lane = impl_->lanes[static_cast<size_t>(thread_)];
  if (!(op.mask >> (thread_ % kWarp) & 1)) fail(std::string(op.name) + " by a lane that is not in its mask");
  lane.op = &op;
  lane.state = LaneState::at_op;
  yield();
  if (impl_->aborting) throw Abort{};
}

// --- collectives ---

namespace {

void shuffle(WarpOp* const* ops, uint32_t mask) {
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) ops[lane]->result = ops[ops[lane]->source] ? ops[ops[lane]->source]->value : 0;
}

void ballot(WarpOp* const* ops, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((mask >> lane & 1) && ops[lane]->value) votes |= 1u << lane;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) ops[lane]->result = votes;
}

void ldmatrix(WarpOp* const* ops) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int j = 0; j < 4; ++j) {
      const auto element = [&](int row, int column) {
        uint16_t x;
        std::memcpy(&x, static_cast<const std::byte*>(ops[8 * j + row]->row) + 2 * column, 2);
        return static_cast<uint32_t>(x);
      };
      const int g = lane / 4, c = 2 * (lane % 4);
      ops[lane]->out[j] =
          ops[lane]->value ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
    }
}

// The fragment layouts of the PTX manual: lane = 4 g + c holds rows g and g + 8 of A and column g of B.
template <int kK, class Element>
TC_UNINSTRUMENTED void mma(float* const* d, const uint32_t* const* a, const uint32_t* const* b,
                           const Element& element) {
  constexpr int kPerRegister = kK / 8;  // elements in 32 bits
  float left[kK][16], right[kK][8], sum[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, c = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < kPerRegister; ++e) {
        const int k = half * kK / 2 + c * kPerRegister + e;
        left[k][g] = element(a[lane][2 * half], e);
        left[k][g + 8] = element(a[lane][2 * half + 1], e);
        right[k][g] = element(b[lane][half], e);
      }
    for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][2 * c + i % 2] = d[lane][i];
  }
  for (int k = 0; k < kK; ++k)
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) sum[m][n] += left[k][m] * right[k][n];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) d[lane][i] = sum[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

}  // namespace

void mma_bf16_16816(float* const d[kWarp], const uint32_t* const a[kWarp], const uint32_t* const b[kWarp]) {
  mma<16>(d, a, b, [](uint32_t word, int e) { return bf16_to_float(static_cast<bf16>(word >> (16 * e))); });
}

void mma_e4m3_16832(float* const d[kWarp], const uint32_t* const a[kWarp], const uint32_t* const b[kWarp]) {
  mma<32>(d, a, b, [](uint32_t word, int e) { return e4m3_to_float(static_cast<uint8_t>(word >> (8 * e))); });
}

// Carries out every collective whose lanes are all there. False when no lane of the warp can go on.
TC_UNINSTRUMENTED
bool BlockRunner::resolve_warp(int warp) {
  Impl& i = *impl_;
  Lane* lanes[kWarp];
  WarpOp* ops[kWarp] = {};
  for (int l = 0; l < kWarp; ++l) {
    lanes[l] = &i.lanes[static_cast<size_t>(warp * kWarp + l)];
    if (lanes[l]->state == LaneState::at_op) ops[l] = lanes[l]->op;
  }
  bool resolved = false, waiting = false;
  for (int l = 0; l < kWarp; ++l) {
    if (!ops[l] || lanes[l]->state != LaneState::at_op) continue;
    const WarpOp& op = *ops[l];
    const auto fits = [&](int other) {
      return ops[other] && ops[other]->kind == op.kind && ops[other]->mask == op.mask;
    };
    bool all = true;
    for (int other = 0; other < kWarp; ++other) all = all && (!(op.mask >> other & 1) || fits(other));
    if (!all) {
      waiting = true;
      continue;
    }
    float* d[kWarp];
    const uint32_t *a[kWarp], *b[kWarp];
    if (op.kind == WarpOp::Kind::mma_bf16 || op.kind == WarpOp::Kind::mma_e4m3 || op.kind == WarpOp::Kind::ldmatrix)
      TC_CHECK_EQ(op.mask, ~0u);
    switch (op.kind) {
      case WarpOp::Kind::sync:
        ++i.warp_epoch[static_cast<size_t>(warp)];
        break;
      case WarpOp::Kind::shuffle:
        shuffle(ops, op.mask);
        break;
      case WarpOp::Kind::ballot:
        ballot(ops, op.mask);
        break;
      case WarpOp::Kind::ldmatrix:
        ldmatrix(ops);
        break;
      case WarpOp::Kind::mma_bf16:
      case WarpOp::Kind::mma_e4m3:
        for (int other = 0; other < kWarp; ++other) {
          d[other] = ops[other]->d;
          a[other] = ops[other]->a;
          b[other] = ops[other]->b;
        }
        (op.kind == WarpOp::Kind::mma_bf16 ? mma_bf16_16816 : mma_e4m3_16832)(d, a, b);
    }
    const uint32_t mask = op.mask;
    for (int other = 0; other < kWarp; ++other)
      if (mask >> other & 1) {
        lanes[other]->state = LaneState::ready;
        ops[other] = nullptr;
      }
    resolved = true;
  }
  if (resolved || !waiting) return resolved;
  // Lanes wait for one that cannot come: it has ended, waits at the barrier, or is at another collective.
  for (int l = 0; l < kWarp; ++l) {
    if (!ops[l]) continue;
    for (int other = 0; other < kWarp; ++other) {
      if (!(ops[l]->mask >> other & 1) ||
          (ops[other] && ops[other]->kind == ops[l]->kind && ops[other]->mask == ops[l]->mask))
        continue;
      const char* const where = lanes[other]->state == LaneState::done         ? "has ended"
                                : lanes[other]->state == LaneState::at_barrier ? "waits at block_sync"
                                                                               : ops[other]->name;
      thread_ = warp * kWarp + other;
      i.fault = describe(thread_) + ": missing from " + ops[l]->name + " of lane " + std::to_string(l) + ": it " +
                (ops[other] ? "is at " : "") + where;
      unwind();
    }
  }
  return false;
}

// --- memory ---

SharedBlock BlockRunner::shared(size_t element_bytes, int64_t elements, const char* name) {
  Impl& i = *impl_;
  const int number = i.lanes[static_cast<size_t>(thread_)].arrays++;
  if (number == i.used_arrays) {
    ++i.used_arrays;
    if (static_cast<int>(i.arrays.size()) < i.used_arrays) i.arrays.emplace_back();
    Impl::Array& array = i.arrays[static_cast<size_t>(number)];
    const size_t bytes = (element_bytes * static_cast<size_t>(elements) + 127) / 128 * 128;
    if (i.used_bytes + bytes > kMaxSharedBytes)
      fail("shared memory of " + std::to_string(i.used_bytes + bytes) + " bytes; a block may have " +
           std::to_string(kMaxSharedBytes));
    std::byte* const base =
        reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(i.shared.get()) + 127) / 128 * 128);
    array.element_bytes = element_bytes;
    array.name = name;
    array.shadow.assign(static_cast<size_t>(elements), {});
    array.block = {base + i.used_bytes, array.shadow.data(), elements};
    i.used_bytes += bytes;
    std::memset(array.block.data, 0xff, bytes);  // NaN in every float format
  }
  const Impl::Array& array = i.arrays[static_cast<size_t>(number)];
  if (array.element_bytes != element_bytes || array.block.elements != elements)
    fail(std::string("shared array ") + name + " differs between threads");
  return array.block;
}

TC_UNINSTRUMENTED
void BlockRunner::check_shared(const SharedBlock& block, int64_t index, int64_t count, bool write, const char* name) {
  const Impl& i = *impl_;
  const auto element = [&](int64_t at) { return std::string(name) + "[" + std::to_string(at) + "]"; };
  if (index < 0 || index + count > block.elements)
    fail(element(index + count - 1) + " is outside the array of " + std::to_string(block.elements));
  const int warp = thread_ / kWarp;
  const uint32_t warp_epoch = i.warp_epoch[static_cast<size_t>(warp)];
  constexpr int16_t kSeveralWarps = -1000;
  for (int64_t at = index; at < index + count; ++at) {
    SharedShadow& s = block.shadow[at];
    if (!write && s.writer < 0) fail("reads " + element(at) + ", which nobody has written");
    const bool race = s.writer >= 0 && s.writer != thread_ && s.writer_epoch == i.epoch &&
                      (s.writer / kWarp != warp || s.writer_warp_epoch == warp_epoch);
    if (race)
      fail("race: " + element(at) + " was written by thread " + std::to_string(s.writer) + " with no barrier since");
    const int reader_warp = s.reader >= 0 ? s.reader / kWarp : -s.reader - 2;
    const bool reader_now = s.reader != -1 && s.reader_epoch == i.epoch &&
                            (s.reader == kSeveralWarps || reader_warp != warp || s.reader_warp_epoch == warp_epoch);
    if (write) {
      if (reader_now && s.reader != thread_)
        fail("race: " + element(at) + " was read by " +
             (s.reader >= 0 ? "thread " + std::to_string(s.reader) : std::string("several threads")) +
             " with no barrier since");
      s.writer = static_cast<int16_t>(thread_);
      s.writer_epoch = i.epoch;
      s.writer_warp_epoch = warp_epoch;
    } else {
      if (!reader_now)
        s.reader = static_cast<int16_t>(thread_);
      else if (s.reader == kSeveralWarps || reader_warp != warp)
        s.reader = kSeveralWarps;
      else if (s.reader != thread_)
        s.reader = static_cast<int16_t>(-warp - 2);
      s.reader_epoch = i.epoch;
      s.reader_warp_epoch = warp_epoch;
    }
  }
}

void BlockRunner::check_device(const void* p, size_t bytes, bool write) {
  if (!impl_->log) return;
  std::string complaint;
  if (!impl_->log->touch(p, bytes, write, *impl_->clock, complaint)) fail("race between streams: " + complaint);
}

void BlockRunner::async_copy(const AsyncCopy& copy) {
  impl_->lanes[static_cast<size_t>(thread_)].copies.push_back(copy);
}

void BlockRunner::async_commit() {
  Lane& lane = impl_->lanes[static_cast<size_t>(thread_)];
  lane.groups.push_back(lane.copies.size());
}

void BlockRunner::async_wait(int newest_allowed) {
  Lane& lane = impl_->lanes[static_cast<size_t>(thread_)];
  size_t done = 0;
  while (static_cast<int>(lane.groups.size()) > newest_allowed) {
    for (; done < lane.groups.front(); ++done) {
      const AsyncCopy& copy = lane.copies[done];
      if (copy.count > 0) check_shared(copy.block, copy.index, copy.count, true, copy.name);
      std::memset(copy.to, 0, 16);
      if (copy.valid > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    }
    lane.groups.pop_front();
  }
  if (done == 0) return;
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<ptrdiff_t>(done));
  for (size_t& end : lane.groups) end -= done;
}

}  // namespace thermocline::gpu::simt
