// Kernels on random weights of a model's shapes, with what one run of them reads and multiplies: what `bench kernels`
// judges and `calibrate` takes the machine's measure with. Memory is taken when a rig is made or prepared; runs belong
// in a StepScope.
#pragma once

#include <random>
#include <span>
#include <vector>

#include "kernels_cpu/moe.h"
#include "runtime/base/number_formats.h"
#include "runtime/hw/numa_buffer.h"

namespace thermocline {

/// What one run needs of the machine.
struct KernelWork {
  double bytes = 0, flops = 0, int8_ops = 0;  // of memory; multiplications and additions, in bf16 or f32 and in INT8
  KernelWork& operator+=(const KernelWork& other) {
    bytes += other.bytes;
    flops += other.flops;
    int8_ops += other.int8_ops;
    return *this;
  }
};

/// Normal values that bf16 holds, from a fixed seed.
std::vector<float> random_rows(int64_t count);

cpu::PackedShape mxfp4_shape(int64_t n, int64_t k);
cpu::PackedShape fp8_shape(int64_t n, int64_t k);
cpu::PackedShape bf16_shape(int64_t n, int64_t k);

/// Random weights, sliced over the nodes of a pool as a model's are: sets of some shapes, one after the other.
class RandomWeights {
 public:
  /// As many sets as `bytes` hold, at least one. Errors: out_of_memory.
  ///   unit  neighbouring row groups that stay on a node, by shape
  static Result<RandomWeights> create(WorkerPool& pool, std::span<const cpu::PackedShape> shapes,
                                      std::span<const int64_t> unit, uint64_t bytes);
  int64_t sets() const { return static_cast<int64_t>(matrices_.size()) / shapes_; }
  const cpu::PackedMatrix& matrix(int64_t set, int64_t shape) const {
    return matrices_[static_cast<size_t>(set * shapes_ + shape)];
  }
  uint64_t bytes() const { return arenas_.size() * arenas_[0].size(); }
  /// Reads of every page: a system that takes back what was idle for a while has to give it again before a run is
  /// timed.
  void touch(WorkerPool& pool) const;

 private:
  void fill(WorkerPool& pool);

  int64_t shapes_ = 0;
  std::vector<NumaBuffer> arenas_;       // by node
  std::vector<ptrdiff_t> node_offsets_;  // from the first
  std::vector<cpu::PackedMatrix> matrices_;
};

/// A routed mixture-of-experts layer: as many distinct experts as `weight_bytes` hold; ids beyond share them.
class MoeRig {
 public:
  struct Shape {
    int64_t dim = 0, inter_dim = 0;
    int experts = 0, top_k = 0;
    float swiglu_limit = 0;
  };
  static Result<MoeRig> create(const cpu::CpuContext& cpu, const Shape& shape, uint64_t weight_bytes);
  /// Room and inputs for runs of `tokens` tokens. Errors: out_of_memory.
  Status prepare(int64_t tokens, cpu::Activation activation);
  /// Every token has experts of its own, drawn uniformly.
  KernelWork run_uniform();
  /// All tokens go to the same top_k experts; the next run's are the next ones.
  KernelWork run_in_turn();
  uint64_t expert_bytes() const { return experts_[0].bytes(); }
  uint64_t bytes() const { return weights_.bytes(); }

 private:
  MoeRig(const cpu::CpuContext& cpu, const Shape& shape) : cpu_(cpu), s_(shape) {}
  KernelWork run(int64_t distinct);

  cpu::CpuContext cpu_;
  Shape s_;
  RandomWeights weights_;
  std::vector<cpu::ExpertWeights> experts_;
  std::mt19937 random_{3};
  int64_t next_ = 0;
  // Of prepare():
  int64_t tokens_ = 0;
  cpu::InputFormat format_;
  cpu::GemmInput x_;
  cpu::MoeWorkspace workspace_;
  std::vector<float> out_, gates_;
  std::vector<int32_t> ids_;
};

/// Matrices of some shapes, each times rows of its own width: one of each shape a run, the next run the next ones.
class GemmRig {
 public:
  static Result<GemmRig> create(const cpu::CpuContext& cpu, std::vector<cpu::PackedShape> shapes,
                                uint64_t weight_bytes);
  Status prepare(int64_t tokens);
  KernelWork run();
  uint64_t bytes() const { return weights_.bytes(); }

 private:
  explicit GemmRig(const cpu::CpuContext& cpu) : cpu_(cpu) {}

  cpu::CpuContext cpu_;
  std::vector<cpu::PackedShape> shapes_;
  RandomWeights weights_;
  int64_t next_ = 0, tokens_ = 0;
  std::vector<cpu::GemmInput> inputs_;  // by shape
  std::vector<float> y_;
};

}  // namespace thermocline
