// Device, Stream, Event and Graph of the CUDA runtime.
#include "kernels_gpu/cuda/cuda_stream.h"
#include "kernels_gpu/kernels.h"
#include "kernels_gpu/open_device.h"

namespace thermocline::gpu {
namespace cuda {
namespace {

constexpr size_t kReservedBytes = size_t{512} << 20;  // for the context, graphs and the display

Error cuda_error(cudaError_t error, const std::string& what) {
  return {error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::internal,
          what + ": " + cudaGetErrorString(error)};
}

class CudaEvent : public Event {
 public:
  explicit CudaEvent(cudaEvent_t handle) : handle_(handle) {}
  ~CudaEvent() override { cudaEventDestroy(handle_); }
  bool done() const override { return cudaEventQuery(handle_) != cudaErrorNotReady; }
  void synchronize() override { cudaEventSynchronize(handle_); }
  cudaEvent_t handle() const { return handle_; }

 private:
  cudaEvent_t handle_;
};

class CudaGraph : public Graph {
 public:
  explicit CudaGraph(cudaGraphExec_t handle) : handle_(handle) {}
  ~CudaGraph() override { cudaGraphExecDestroy(handle_); }
  cudaGraphExec_t handle() const { return handle_; }

 private:
  cudaGraphExec_t handle_;
};

class StreamOnDevice : public CudaStream {
 public:
  StreamOnDevice(Device& device, int index, cudaStream_t handle) : device_(device) {
    handle_ = handle;
    device_index_ = index;
  }
  ~StreamOnDevice() override { cudaStreamDestroy(handle_); }

  void copy(void* to, const void* from, size_t bytes, CopyKind) override {
    select();
    if (bytes > 0 && ok()) note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle_), "copy");
  }
  void record(Event& event) override {
    select();
    note(cudaEventRecord(static_cast<CudaEvent&>(event).handle(), handle_), "record");
  }
  void wait(Event& event) override {
    select();
    note(cudaStreamWaitEvent(handle_, static_cast<CudaEvent&>(event).handle(), 0), "wait");
  }
  void begin_capture() override {
    select();
    note(cudaStreamBeginCapture(handle_, cudaStreamCaptureModeThreadLocal), "capture");
  }
  Result<std::unique_ptr<Graph>> end_capture() override {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t instance = nullptr;
    cudaError_t error = cudaStreamEndCapture(handle_, &graph);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&instance, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (error != cudaSuccess) return cuda_error(error, "capturing a step");
    return std::unique_ptr<Graph>(new CudaGraph(instance));
  }
  void launch(Graph& graph) override {
    select();
    if (ok()) note(cudaGraphLaunch(static_cast<CudaGraph&>(graph).handle(), handle_), "graph");
  }
  Status synchronize() override {
    select();
    note(cudaStreamSynchronize(handle_), "synchronize");
    return status();
  }
  Status status() const override {
    if (ok())  // a kernel's fault shows here, and nowhere else before the next synchronisation
      if (const cudaError_t now = cudaStreamQuery(handle_); now != cudaErrorNotReady) note(now, "a kernel");
    if (ok()) return {};
    return Error{ErrorCode::internal, "a fault on " + device_.name() + ": " + fault_};
  }
  Device& device() override { return device_; }

 private:
  Device& device_;
};

class CudaDevice : public Device {
 public:
  CudaDevice(int index, std::string name, size_t capacity)
      : index_(index), name_(std::move(name)), capacity_(capacity), free_(capacity) {}

  DeviceKind kind() const override { return DeviceKind::cuda; }
  const std::string& name() const override { return name_; }
  const KernelTable& kernels() const override { return cuda_kernels(); }
  size_t capacity() const override { return capacity_; }
  size_t free_bytes() const override { return free_; }

  ~CudaDevice() override {
    for (void* const data : pinned_) cudaHostUnregister(data);
  }

  Status pin(void* data, size_t bytes) override {
    cudaSetDevice(index_);
    if (const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterPortable); error != cudaSuccess)
      return cuda_error(error,
                        "page-locking " + std::to_string(bytes) + " bytes of weights (ulimit -l, or free memory)");
    pinned_.push_back(data);
    return {};
  }
  Result<std::unique_ptr<Stream>> new_stream() override {
    cudaStream_t handle = nullptr;
    cudaSetDevice(index_);
    if (const cudaError_t error = cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking); error != cudaSuccess)
      return cuda_error(error, "creating a stream on " + name_);
    return std::unique_ptr<Stream>(new StreamOnDevice(*this, index_, handle));
  }
  Result<std::unique_ptr<Event>> new_event() override {
    cudaEvent_t handle = nullptr;
    cudaSetDevice(index_);
    if (const cudaError_t error = cudaEventCreateWithFlags(&handle, cudaEventDisableTiming); error != cudaSuccess)
      return cuda_error(error, "creating an event on " + name_);
    return std::unique_ptr<Event>(new CudaEvent(handle));
  }

 protected:
  Result<void*> take(size_t bytes) override {
    void* data = nullptr;
    cudaSetDevice(index_);
    if (bytes > free_)
      return Error{ErrorCode::out_of_memory, "device memory: " + std::to_string(bytes) + " bytes, " +
                                                 std::to_string(free_) + " are left of " + name_};
    if (const cudaError_t error = cudaMalloc(&data, bytes); error != cudaSuccess)
      return cuda_error(error, std::to_string(bytes) + " bytes on " + name_);
    free_ -= bytes;
    return data;
  }
  void give_back(void* data, size_t bytes) override {
    cudaFree(data);
    free_ += bytes;
  }
  Result<void*> take_pinned(size_t bytes) override {
    void* data = nullptr;
    cudaSetDevice(index_);
    if (const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
        error != cudaSuccess)
      return cuda_error(error, std::to_string(bytes) + " bytes of pinned memory");
    return data;
  }
  void give_back_pinned(void* data, size_t) override { cudaFreeHost(data); }

 private:
  const int index_;
  const std::string name_;
  const size_t capacity_;
  size_t free_;
  std::vector<void*> pinned_;
};

}  // namespace
}  // namespace cuda

Result<std::unique_ptr<Device>> open_cuda_device(int index, size_t memory_bytes) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess)
    return cuda::cuda_error(error, "GPU " + std::to_string(index));
  if (properties.major < 8)
    return unsupported(std::string(properties.name) + " is older than sm_80: bf16 tensor cores are needed");
  size_t free = 0, total = 0;
  cudaSetDevice(index);
  if (const cudaError_t error = cudaMemGetInfo(&free, &total); error != cudaSuccess)
    return cuda::cuda_error(error, properties.name);
  const size_t usable = free > cuda::kReservedBytes ? free - cuda::kReservedBytes : 0;
  if (memory_bytes > usable)
    return Error{ErrorCode::out_of_memory, "--gpu-memory asks for more than the " + std::to_string(usable >> 20) +
                                               " MiB that are free on " + properties.name};
  return std::unique_ptr<Device>(
      new cuda::CudaDevice(index, properties.name, memory_bytes > 0 ? memory_bytes : usable));
}

}  // namespace thermocline::gpu
