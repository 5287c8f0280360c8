// As kernel_rigs.h, on a device: kernels of a step over random weights of a model's shapes, captured as graphs. What
// `bench gpu` judges and `calibrate` takes a card's measure with.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels_gpu/kernels.h"
#include "runtime/engine/kernel_rigs.h"
#include "runtime/hw/device.h"

namespace thermocline {

struct DeviceShapes {
  int64_t dim, inter, heads, head_dim, q_rank, vocab, experts, index_heads, index_dim, topk, window;
};
/// v4-flash, v4-pro, tiny. Errors: invalid_argument.
Result<DeviceShapes> device_shapes(const std::string& name);

/// A captured graph with the buffers that only it needs. It goes before its rig.
class DeviceRun {
 public:
  /// Runs it and waits. Errors: a fault of the device.
  Result<double> seconds();
  int64_t launches() const { return launches_; }  // of what it was asked to repeat
  const KernelWork& work() const { return work_; }

 private:
  friend class DeviceRig;
  gpu::Stream* stream_ = nullptr;
  int64_t launches_ = 0;
  KernelWork work_;
  std::vector<gpu::DeviceBuffer> held_;
  std::unique_ptr<gpu::Graph> graph_;
};

/// Matrices of one format, multiplied one after the other.
struct DeviceMatrices {
  std::vector<gpu::DeviceMatrix> all;
  std::vector<gpu::DeviceBuffer> held;
};

/// MXFP4 experts in slots, in sets of DeviceShapes::experts.
struct DeviceExperts {
  gpu::DeviceMatrix w1, w3, w2;  // of slot 0
  int64_t sets = 0, slot_bytes = 0, expert_bytes = 0;
  std::vector<gpu::DeviceBuffer> held;
};

class DeviceRig {
 public:
  struct Side {
    int64_t n, k;
  };

  static Result<DeviceRig> create(gpu::Device& device, const DeviceShapes& shapes);
  gpu::Device& device() { return *device_; }
  gpu::Stream& stream() { return *stream_; }
  const DeviceShapes& shapes() const { return s_; }
  bool interpreted() const { return device_->kind() == gpu::DeviceKind::simt; }

  /// As many sets of these shapes as are more than any L2 holds; on the interpreter one.
  Result<DeviceMatrices> matrices(cpu::WeightFormat format, std::span<const Side> sides);
  Result<DeviceExperts> experts();

  /// Every matrix times `tokens` rows. A launch is one of them.
  Result<DeviceRun> gemm(const DeviceMatrices& weights, int64_t tokens);
  /// Every expert with `tokens` pairs. A launch is a set's gate and up, and its down.
  Result<DeviceRun> moe(const DeviceExperts& weights, int64_t tokens);
  /// A token's window and its best compressed rows.
  Result<DeviceRun> attention(int64_t tokens);
  /// The scores of `keys` keys and the best of them.
  Result<DeviceRun> index(int64_t tokens, int64_t keys);
  /// Within the device, read and written.
  Result<DeviceRun> copy(int64_t bytes);
  /// Norms of one row: what a launch takes that has next to nothing to do.
  Result<DeviceRun> small_launches(int64_t count);

  /// Device memory with small numbers in every format, or with these values; kept in `held`.
  template <class T>
  Result<T*> array(int64_t count, std::vector<gpu::DeviceBuffer>& held);
  template <class T>
  Result<T*> values(const std::vector<T>& from, std::vector<gpu::DeviceBuffer>& held);

 private:
  DeviceRig(gpu::Device& device, const DeviceShapes& shapes) : device_(&device), s_(shapes) {}
  int64_t copies_of(double bytes) const;
  Result<gpu::DeviceMatrix> matrix(cpu::WeightFormat format, int64_t n, int64_t k,
                                   std::vector<gpu::DeviceBuffer>& held);
  Result<std::byte*> pattern(size_t bytes, std::vector<gpu::DeviceBuffer>& held);
  Result<std::byte*> upload(const void* from, size_t bytes, std::vector<gpu::DeviceBuffer>& held);
  Result<gpu::StepTables> tables(int64_t tokens, int64_t pos, int64_t pages, std::vector<gpu::DeviceBuffer>& held);
  Result<std::vector<gpu::ExpertItem*>> expert_items(const DeviceExperts& weights, int64_t tokens, int64_t item,
                                                     std::vector<gpu::DeviceBuffer>& held);
  /// Captures `launches` calls of fn(i); `each` is what one of them does.
  template <class Fn>
  Result<DeviceRun> capture(DeviceRun run, int64_t launches, const KernelWork& each, const Fn& fn);

  gpu::Device* device_;
  DeviceShapes s_;
  std::unique_ptr<gpu::Stream> stream_;
};

template <class T>
Result<T*> DeviceRig::array(int64_t count, std::vector<gpu::DeviceBuffer>& held) {
  TC_ASSIGN(std::byte* const data, pattern(static_cast<size_t>(count) * sizeof(T), held));
  return reinterpret_cast<T*>(data);
}
template <class T>
Result<T*> DeviceRig::values(const std::vector<T>& from, std::vector<gpu::DeviceBuffer>& held) {
  TC_ASSIGN(std::byte* const data, upload(from.data(), from.size() * sizeof(T), held));
  return reinterpret_cast<T*>(data);
}

}  // namespace thermocline
