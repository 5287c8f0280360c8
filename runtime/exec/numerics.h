// The three numerics of the forward pass; docs/numerics.md lists them op by op. Source: spec section 5.
#pragma once

#include <string_view>

#include "runtime/base/result.h"

namespace thermocline {

enum class Numerics {
  published,  // as the official code: bf16 between ops, e4m3 inputs of FP8/FP4 linears, FP8 rows, FP4 index vectors
  bf16,       // the same without the rounding of linear inputs
  fp32,       // nothing but the weights; scalar reference path
};

/// What a step rounds.
struct Rounding {
  bool results = true;        // activations are stored as bf16
  bool linear_inputs = true;  // inputs of FP8 and FP4 linears to e4m3 per 128 channels
  bool cached_rows = true;    // kv and compressed rows to e4m3 per 64, indexer vectors Hadamard + e2m1 per 32
};

constexpr Rounding rounding_of(Numerics numerics) {
  switch (numerics) {
    case Numerics::published:
      return {true, true, true};
    case Numerics::bf16:
      return {true, false, true};
    case Numerics::fp32:
      return {false, false, false};
  }
  return {};
}

/// How window and compressed rows are kept (--kv-cache-dtype). FP8 loses nothing: they are rounded to its grid.
enum class KvDtype {
  automatic,  // fp8; f32 in the fp32 numerics
  fp8,        // fp8_row_bytes
  bf16,
};

/// Where devices keep CSA rows (--kv-offload).
enum class KvOffload {
  automatic,  // in host memory where the device cannot hold what is asked for, or experts make more of its memory
  off,        // on the device
  on,         // in host memory, copies of those in use on the device
};

inline Result<KvOffload> parse_kv_offload(std::string_view name) {
  if (name == "auto") return KvOffload::automatic;
  if (name == "off") return KvOffload::off;
  if (name == "on") return KvOffload::on;
  return invalid("unknown KV offload '" + std::string(name) + "': use auto, off or on");
}

inline Result<KvDtype> parse_kv_dtype(std::string_view name) {
  if (name == "auto") return KvDtype::automatic;
  if (name == "fp8") return KvDtype::fp8;
  if (name == "bf16") return KvDtype::bf16;
  return invalid("unknown KV cache dtype '" + std::string(name) + "': use auto, fp8 or bf16");
}

inline constexpr std::string_view kNumericsNames[] = {"published", "bf16", "fp32"};

inline Result<Numerics> parse_numerics(std::string_view name) {
  for (int i = 0; i < 3; ++i)
    if (kNumericsNames[i] == name) return static_cast<Numerics>(i);
  return invalid("unknown numerics '" + std::string(name) + "': use published, bf16 or fp32");
}

}  // namespace thermocline
