// The device of GPU tests: the SIMT interpreter, or with TC_TEST_DEVICE=cuda the first card (ctest label gpu).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels_gpu/device_list.h"
#include "kernels_gpu/kernels.h"
#include "kernels_gpu/open_device.h"
#include "tests/support/fixtures.h"

namespace thermocline::test {

inline std::string device_name() {
  const char* const name = std::getenv("TC_TEST_DEVICE");
  if (name && std::string_view(name) == "cuda" && gpu::list_devices().empty()) {
    std::puts("skipped: no CUDA card was found");
    std::exit(77);  // ctest's SKIP_RETURN_CODE
  }
  return name ? name : "simt";
}

inline std::unique_ptr<gpu::Device> open_device(size_t bytes = size_t{1} << 30) {
  auto devices = gpu::open_devices(gpu::parse_device(device_name() + ":1").value(), bytes);
  TC_CHECK(devices.has_value(), devices ? "" : devices.error().message);
  return std::move((*devices)[0]);
}

/// A device and a stream, with arrays that go up and down.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    device_ = open_device();
    stream_ = device_->new_stream().value();
  }
  const gpu::KernelTable& kernels() { return device_->kernels(); }

  /// A copy of `values` on the device, kept until the test ends.
  template <class T>
  T* up(const std::vector<T>& values) {
    buffers_.push_back(device_->allocate(std::max<size_t>(values.size() * sizeof(T), 1)).value());
    stream_->copy(buffers_.back().data(), values.data(), values.size() * sizeof(T), gpu::CopyKind::h2d);
    sync();
    return reinterpret_cast<T*>(buffers_.back().data());
  }
  template <class T>
  T* zeros(int64_t count) {
    return up(std::vector<T>(static_cast<size_t>(count)));
  }
  template <class T>
  std::vector<T> down(const T* from, int64_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    stream_->copy(out.data(), from, out.size() * sizeof(T), gpu::CopyKind::d2h);
    sync();
    return out;
  }
  void sync() {
    const Status status = stream_->synchronize();
    ASSERT_TRUE(status.ok()) << (status.ok() ? "" : status.error().message);
  }
  gpu::DeviceMatrix matrix(const cpu::PackedMatrix& m) {
    gpu::DeviceMatrix out;
    static_cast<cpu::PackedShape&>(out) = m;
    out.tiles = {up(std::vector<uint8_t>(m.tiles, m.tiles + m.tile_plane_bytes())), {m.tile_plane_bytes()}};
    out.scales = {up(std::vector<uint8_t>(m.scales, m.scales + m.scale_plane_bytes())), {m.scale_plane_bytes()}};
    return out;
  }
  /// Tokens at `positions` of one sequence, segment by segment as they follow each other; one page table of `pages`.
  gpu::StepTables step(const std::vector<gpu::TokenInfo>& tokens, const std::vector<gpu::SequenceInfo>& sequences,
                       const std::vector<int32_t>& pages, int tables = 0, int64_t pairs = 0,
                       const std::vector<float>& cos = {}, const std::vector<float>& sin = {}) {
    const int64_t m = static_cast<int64_t>(tokens.size());
    return {{up(tokens), {m}},
            {up(sequences), {static_cast<int64_t>(sequences.size())}},
            {up(pages), {static_cast<int64_t>(pages.size())}},
            {up(cos), {tables, m, pairs}},
            {up(sin), {tables, m, pairs}},
            {up(std::vector<uint32_t>{1}), {1}}};
  }

  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::Stream> stream_;
  std::vector<gpu::DeviceBuffer> buffers_;
};

inline std::vector<bf16> to_bf16(const std::vector<float>& values) {
  std::vector<bf16> out;
  for (const float x : values) out.push_back(float_to_bf16(x));
  return out;
}
inline std::vector<float> to_float(const std::vector<bf16>& values) {
  std::vector<float> out;
  for (const bf16 x : values) out.push_back(bf16_to_float(x));
  return out;
}

}  // namespace thermocline::test
