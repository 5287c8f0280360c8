#include "kernels_gpu/simt/simt_device.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <thread>

#include "kernels_gpu/kernels.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline::gpu::simt {
namespace {

constexpr size_t kAlignment = 256;                  // of every allocation, as cudaMalloc's
constexpr size_t kPoisonedBytes = size_t{4} << 20;  // of a fresh or freed allocation; more would touch idle memory

/// Threads that run the blocks of whatever kernels are under way.
class BlockWorkers {
 public:
  explicit BlockWorkers(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~BlockWorkers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  /// Runs every block, the caller's thread among the workers. Returns what went wrong, or nothing.
  std::string run(const LaunchShape& shape, const std::function<void()>& body, AccessLog* log, const StreamClock& clock,
                  BlockRunner& mine) {
    Job job{shape, body, log, clock, static_cast<int64_t>(shape.grid.x) * shape.grid.y * shape.grid.z};
    if (job.blocks == 0) return {};
    if (job.blocks > 1 && !threads_.empty()) {
      {
        const std::lock_guard lock(mutex_);
        jobs_.push_back(&job);
      }
      wake_.notify_all();
    }
    run_blocks(job, mine);
    std::unique_lock lock(mutex_);
    std::erase(jobs_, &job);
    idle_.wait(lock, [&] { return job.helpers == 0; });
    return job.fault;
  }

 private:
  struct Job {
    const LaunchShape& shape;
    const std::function<void()>& body;
    AccessLog* log;
    const StreamClock& clock;
    int64_t blocks;
    std::atomic<int64_t> next{0};
    int helpers = 0;         // guarded by mutex_
    std::string fault = {};  // guarded by mutex_
  };

  void run_blocks(Job& job, BlockRunner& runner) {
    for (int64_t i; (i = job.next.fetch_add(1)) < job.blocks;) {
      const int64_t plane = static_cast<int64_t>(job.shape.grid.x) * job.shape.grid.y;
      const Dim block{static_cast<int>(i % job.shape.grid.x), static_cast<int>(i % plane / job.shape.grid.x),
                      static_cast<int>(i / plane)};
      try {
        runner.run(job.shape, block, job.body, job.log, &job.clock);
      } catch (const Fault& fault) {
        const std::lock_guard lock(mutex_);
        if (job.fault.empty()) job.fault = fault.what();
        job.next = job.blocks;
      }
    }
  }

  void work() {
    BlockRunner runner;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (stop_) return;
      Job& job = *jobs_.front();
      ++job.helpers;
      lock.unlock();
      run_blocks(job, runner);
      lock.lock();
      --job.helpers;
      if (!jobs_.empty() && jobs_.front() == &job) jobs_.pop_front();  // no block is left
      idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Job*> jobs_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class SimtDevice;

/// What an event and the operations queued for it share: an event may go before its stream has reached it.
class EventState {
 public:
  bool done() const {
    const std::lock_guard lock(mutex_);
    return completed_ >= issued_;
  }
  uint64_t issue() {
    const std::lock_guard lock(mutex_);
    return ++issued_;
  }
  uint64_t issued() const {
    const std::lock_guard lock(mutex_);
    return issued_;
  }
  void complete(uint64_t ticket, const StreamClock& clock) {
    {
      const std::lock_guard lock(mutex_);
      completed_ = std::max(completed_, ticket);
      clock_ = clock;
    }
    changed_.notify_all();
  }
  StreamClock await(uint64_t ticket) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return completed_ >= ticket; });
    return clock_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t issued_ = 0, completed_ = 0;
  StreamClock clock_;
};

class SimtEvent : public Event {
 public:
  explicit SimtEvent(SimtDevice& device) : device_(device) {}
  bool done() const override { return state_->done(); }
  void synchronize() override;
  const std::shared_ptr<EventState>& state() const { return state_; }

 private:
  SimtDevice& device_;
  const std::shared_ptr<EventState> state_ = std::make_shared<EventState>();
};

class QueueStream;

class SimtDevice : public Device {
 public:
  static Result<std::unique_ptr<Device>> create(const SimtOptions& options, int index) {
    std::unique_ptr<SimtDevice> device(new SimtDevice(options, index));
    TC_ASSIGN(device->arena_, NumaBuffer::allocate(device->capacity_));
    device->log_ = std::make_unique<AccessLog>(device->arena_.data(), device->capacity_);
    device->holes_[0] = device->capacity_;
    return std::unique_ptr<Device>(std::move(device));
  }

  DeviceKind kind() const override { return DeviceKind::simt; }
  const std::string& name() const override { return name_; }
  const KernelTable& kernels() const override { return simt_kernels(); }
  size_t capacity() const override { return capacity_; }
  size_t free_bytes() const override {
    const std::lock_guard lock(mutex_);
    size_t most = 0;
    for (const auto& [at, bytes] : holes_) most = std::max(most, bytes);
    return most;
  }

  Status pin(void*, size_t) override { return {}; }
  Result<std::unique_ptr<Stream>> new_stream() override;
  Result<std::unique_ptr<Event>> new_event() override { return std::unique_ptr<Event>(new SimtEvent(*this)); }

  BlockWorkers& workers() { return workers_; }
  AccessLog& log() { return *log_; }
  const SimtOptions& options() const { return options_; }

  // The host's clock: what the driving thread knows to have finished.
  StreamClock host_clock() const {
    const std::lock_guard lock(mutex_);
    return host_;
  }
  void host_saw(const StreamClock& clock) {
    const std::lock_guard lock(mutex_);
    host_.merge(clock);
  }

 protected:
  Result<void*> take(size_t bytes) override {
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard lock(mutex_);
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {  // first fit
      if (hole->second < size) continue;
      const auto [at, room] = *hole;
      holes_.erase(hole);
      if (room > size) holes_[at + size] = room - size;
      std::byte* const p = arena_.data() + at;
      std::memset(p, 0xff, std::min(size, kPoisonedBytes));
      return static_cast<void*>(p);
    }
    return Error{ErrorCode::out_of_memory, "device memory: " + std::to_string(bytes) + " bytes do not fit in " +
                                               std::to_string(capacity_) + " of " + name_};
  }
  void give_back(void* data, size_t bytes) override {
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard lock(mutex_);
    std::memset(data, 0xff, std::min(size, kPoisonedBytes));  // what still reads it sees NaN
    log_->forget(data, size);
    size_t at = static_cast<size_t>(static_cast<std::byte*>(data) - arena_.data()), room = size;
    auto next = holes_.lower_bound(at);
    if (next != holes_.end() && next->first == at + room) {
      room += next->second;
      next = holes_.erase(next);
    }
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        at = before->first;
        room += before->second;
        holes_.erase(before);
      }
    }
    holes_[at] = room;
  }
  Result<void*> take_pinned(size_t bytes) override {
    {
      const std::lock_guard lock(mutex_);
      size_t used = 0;
      for (const NumaBuffer& buffer : pinned_) used += buffer.size();
      if (used + bytes > options_.pinned_bytes)
        return Error{ErrorCode::out_of_memory, "pinned memory: " + std::to_string(bytes) + " bytes on top of " +
                                                   std::to_string(used) + " exceed " +
                                                   std::to_string(options_.pinned_bytes) + " of " + name_};
    }
    TC_ASSIGN(NumaBuffer buffer, NumaBuffer::allocate(bytes));
    void* const p = buffer.data();
    const std::lock_guard lock(mutex_);
    pinned_.push_back(std::move(buffer));
    return p;
  }
  void give_back_pinned(void* data, size_t) override {
    const std::lock_guard lock(mutex_);
    pinned_.remove_if([&](const NumaBuffer& buffer) { return buffer.data() == data; });
  }

 private:
  friend class QueueStream;
  SimtDevice(const SimtOptions& options, int index)
      : options_(options),
        name_("SIMT interpreter " + std::to_string(index)),
        capacity_(options.memory_bytes / kAlignment * kAlignment),
        workers_(std::max(
            0, (options.workers > 0 ? options.workers : static_cast<int>(std::thread::hardware_concurrency())) - 1)) {}

  const SimtOptions options_;
  const std::string name_;
  const size_t capacity_;
  mutable std::mutex mutex_;
  NumaBuffer arena_;
  std::map<size_t, size_t> holes_;  // offset -> bytes
  std::list<NumaBuffer> pinned_;
  std::unique_ptr<AccessLog> log_;
  StreamClock host_;
  int streams_ = 0;
  BlockWorkers workers_;
};

void SimtEvent::synchronize() { device_.host_saw(state_->await(state_->issued())); }

/// Captured operations.
class SimtGraph : public Graph {
 public:
  std::vector<std::function<void()>> operations;
};

class QueueStream : public SimtStream {
 public:
  QueueStream(SimtDevice& device, int id) : device_(device) {
    clock_.stream = id;
    thread_ = std::thread([this] { work(); });
  }
  ~QueueStream() override {
    push([this] { stop_ = true; });
    thread_.join();
  }

  void enqueue(const LaunchShape& shape, std::function<void()> body) override {
    TC_CHECK(shape.block % kWarp == 0 && shape.block > 0 && shape.block <= kMaxBlock);
    add([this, shape, body = std::move(body)] {
      if (failed()) return;
      const std::string fault = device_.workers().run(shape, body, &device_.log(), clock_, *runner_);
      if (!fault.empty()) fail(fault);
    });
  }

  void copy(void* to, const void* from, size_t bytes, CopyKind kind) override {
    if (bytes == 0) return;
    add([this, to, from, bytes, kind] {
      if (failed()) return;
      std::string complaint;
      if (!device_.log().touch(from, bytes, false, clock_, complaint) ||
          !device_.log().touch(to, bytes, true, clock_, complaint))
        return fail("a copy of " + std::to_string(bytes) + " bytes " + complaint);
      std::memcpy(to, from, bytes);
      const double rate = device_.options().copy_gb_per_s;
      if (rate > 0 && kind != CopyKind::d2d)
        std::this_thread::sleep_for(std::chrono::duration<double, std::nano>(static_cast<double>(bytes) / rate));
    });
  }

  void record(Event& event) override {
    TC_CHECK(!capture_, "events are not part of a graph");
    const std::shared_ptr<EventState> state = static_cast<SimtEvent&>(event).state();
    add([this, state, ticket = state->issue()] { state->complete(ticket, clock_); });
  }
  void wait(Event& event) override {
    TC_CHECK(!capture_, "events are not part of a graph");
    const std::shared_ptr<EventState> state = static_cast<SimtEvent&>(event).state();
    add([this, state, ticket = state->issued()] { clock_.merge(state->await(ticket)); });
  }

  void begin_capture() override {
    TC_CHECK(!capture_);
    capture_ = std::make_unique<SimtGraph>();
  }
  Result<std::unique_ptr<Graph>> end_capture() override {
    TC_CHECK(capture_ != nullptr);
    return std::unique_ptr<Graph>(std::move(capture_));
  }
  void launch(Graph& graph) override {
    for (const std::function<void()>& operation : static_cast<SimtGraph&>(graph).operations) push(operation);
  }

  Status synchronize() override {
    bool done = false;
    StreamClock clock;
    std::mutex mutex;
    std::condition_variable changed;
    push([&] {
      const std::lock_guard lock(mutex);
      done = true;
      clock = clock_;
      changed.notify_one();
    });
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return done; });
    }
    device_.host_saw(clock);
    return status();
  }
  Status status() const override {
    const std::lock_guard lock(mutex_);
    if (fault_.empty()) return {};
    return Error{ErrorCode::internal, "a fault on " + device_.name() + ": " + fault_};
  }
  Device& device() override { return device_; }

 private:
  void add(std::function<void()> operation) {
    if (capture_)
      capture_->operations.push_back(std::move(operation));
    else
      push(std::move(operation));
  }
  // Every operation starts after what the host knew to be finished when it queued it.
  void push(std::function<void()> operation) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back({std::move(operation), device_.host_clock()});
    }
    ready_.notify_one();
  }
  void work() {
    BlockRunner runner;  // its fibers live and end on this thread
    runner_ = &runner;
    while (!stop_) {
      Item item;
      {
        std::unique_lock lock(mutex_);
        ready_.wait(lock, [&] { return !queue_.empty(); });
        item = std::move(queue_.front());
        queue_.pop_front();
      }
      clock_.merge(item.host);
      ++clock_.seen[static_cast<size_t>(clock_.stream)];
      item.operation();
    }
  }
  bool failed() const {
    const std::lock_guard lock(mutex_);
    return !fault_.empty();
  }
  void fail(const std::string& fault) {
    const std::lock_guard lock(mutex_);
    if (fault_.empty()) fault_ = fault;
  }

  struct Item {
    std::function<void()> operation;
    StreamClock host;
  };

  SimtDevice& device_;
  StreamClock clock_;  // of the stream's thread
  BlockRunner* runner_ = nullptr;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Item> queue_;
  std::string fault_;
  bool stop_ = false;  // of the stream's thread
  std::unique_ptr<SimtGraph> capture_;
  std::thread thread_;
};

Result<std::unique_ptr<Stream>> SimtDevice::new_stream() {
  TC_CHECK(streams_ + 1 < kMaxStreams);
  return std::unique_ptr<Stream>(new QueueStream(*this, ++streams_));
}

}  // namespace

Result<std::unique_ptr<Device>> make_device(const SimtOptions& options, int index) {
  return SimtDevice::create(options, index);
}

}  // namespace thermocline::gpu::simt
