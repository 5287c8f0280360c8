// Device, Stream, Event, Graph and the buffers they work on: what the runtime knows of a GPU. Two implementations:
// kernels_gpu/cuda (a real GPU) and kernels_gpu/simt (the SIMT interpreter, everywhere). One thread drives a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "runtime/base/result.h"

namespace thermocline::gpu {

class Device;
struct KernelTable;  // kernels_gpu/kernels.h

enum class DeviceKind { simt, cuda };

/// Memory of a device, or page-locked host memory that its kernels can address too. Owned, move-only; freed when
/// destroyed, which is never while work that uses it is queued.
template <bool pinned>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* device, void* data, size_t bytes) : device_(device), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();

  /// Of device memory: an address only kernels and copies may read.
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};
using DeviceBuffer = Buffer<false>;
using PinnedBuffer = Buffer<true>;

/// A point in a stream. Recorded again, it means the later point.
class Event {
 public:
  virtual ~Event() = default;
  /// Whether everything before the last recorded point has finished; true when never recorded.
  virtual bool done() const = 0;
  /// Blocks the calling thread until done() is true.
  virtual void synchronize() = 0;
};

/// Work captured from a stream, to be launched again with the same arguments.
class Graph {
 public:
  virtual ~Graph() = default;
};

enum class CopyKind { h2d, d2h, d2d };

/// An ordered queue of copies and kernels. A fault sticks: what follows it is skipped, and status() says what it was.
class Stream {
 public:
  virtual ~Stream() = default;

  /// Queues a copy. Host memory stays valid and untouched until it ran; pinned, or the copy may be synchronous.
  virtual void copy(void* to, const void* from, size_t bytes, CopyKind kind) = 0;
  virtual void record(Event& event) = 0;
  /// What is queued from here on starts after the event's last recorded point.
  virtual void wait(Event& event) = 0;

  /// Between the two calls work is noted instead of run; copies read their host memory when the graph runs.
  virtual void begin_capture() = 0;
  virtual Result<std::unique_ptr<Graph>> end_capture() = 0;
  virtual void launch(Graph& graph) = 0;

  /// Waits for everything queued. Returns status().
  virtual Status synchronize() = 0;
  /// The first fault, or success. Asks the device for nothing that would wait.
  virtual Status status() const = 0;

  virtual Device& device() = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceKind kind() const = 0;
  virtual const std::string& name() const = 0;
  virtual const KernelTable& kernels() const = 0;

  /// Errors: out_of_memory, with what is left.
  Result<DeviceBuffer> allocate(size_t bytes);
  Result<PinnedBuffer> allocate_pinned(size_t bytes);
  /// Page-locks host memory that is copied from, until the device is closed. Errors: what the driver says.
  virtual Status pin(void* data, size_t bytes) = 0;
  virtual Result<std::unique_ptr<Stream>> new_stream() = 0;
  virtual Result<std::unique_ptr<Event>> new_event() = 0;

  virtual size_t capacity() const = 0;
  /// Bytes allocate() can still give.
  virtual size_t free_bytes() const = 0;
  /// From here on allocating is a bug and aborts: a ready engine takes no more memory (architecture D5).
  void seal() { sealed_ = true; }

 protected:
  virtual Result<void*> take(size_t bytes) = 0;
  virtual Result<void*> take_pinned(size_t bytes) = 0;
  virtual void give_back(void* data, size_t bytes) = 0;
  virtual void give_back_pinned(void* data, size_t bytes) = 0;

 private:
  template <bool pinned>
  friend class Buffer;
  bool sealed_ = false;
};

template <bool pinned>
Buffer<pinned>::~Buffer() {
  if (!data_) return;
  if constexpr (pinned)
    device_->give_back_pinned(data_, bytes_);
  else
    device_->give_back(data_, bytes_);
}

inline Result<DeviceBuffer> Device::allocate(size_t bytes) {
  TC_CHECK(!sealed_, "device memory is settled before ready");
  if (bytes == 0) return DeviceBuffer();
  TC_ASSIGN(void* const data, take(bytes));
  return DeviceBuffer(this, data, bytes);
}
inline Result<PinnedBuffer> Device::allocate_pinned(size_t bytes) {
  TC_CHECK(!sealed_, "pinned memory is settled before ready");
  if (bytes == 0) return PinnedBuffer();
  TC_ASSIGN(void* const data, take_pinned(bytes));
  return PinnedBuffer(this, data, bytes);
}

}  // namespace thermocline::gpu
