// BoxPlan: whether a model fits a box and how fast it will be there, before anything is bought or downloaded. Pure:
// what is known of both in numbers, and what follows from them. Source: spec/scheduler.md 2.9 and 4.
#pragma once

#include <string>
#include <vector>

#include "scheduler/cost/cost_model.h"
#include "scheduler/cost/expert_cost.h"
#include "scheduler/kv/residency.h"
#include "scheduler/plan/memory_plan.h"

namespace thermocline::sched {

/// What steps of at most so many tokens need beside weights and KV, in bytes: of the host, and of each device.
struct ChunkBuffers {
  int64_t tokens = 512;
  double host_bytes = 0, device_bytes = 0;
};

struct BoxQuestion {
  ModelCosts model;
  MachineProfile machine;                   // cpu.memory_bytes 0: as much as is needed
  double context = 32768;                   // tokens of each sequence
  int batch = 1;                            // sequences that run together
  double system_bytes = 0;                  // of the host's memory, gone already
  std::string memory_source;                // who says how much memory the host has
  std::vector<ChunkBuffers> chunks = {{}};  // by rising tokens: the prefill steps to choose from
};

/// Decode steps of some sequences, a token of each.
struct DecodeSpeed {
  int batch = 1;
  bool fits = true;               // their KV cache too
  double resident = 0, hits = 0;  // shares of the experts that have a slot, and of the pairs that find theirs there
  double tokens_per_second = 0;   // of all of them, with `hits`
  double uniform_tokens_per_second = 0;  // if routing were uniform: at least
  std::string bottleneck;                // "expert bytes from RAM"
};

/// A prompt as long as the context, alone.
struct PrefillSpeed {
  PrefillExperts experts = PrefillExperts::cpu;
  int64_t chunk = 512;
  double tokens_per_second = 0;  // on average
  double seconds = 0;            // to the first token
  std::string bottleneck;
};

struct BoxPlan {
  MemoryPlan memory;
  std::string refusal;                       // why it does not fit and what would; empty: it fits
  bool host_rows = false;                    // CSA rows of the KV cache are in host memory (--kv-offload)
  bool rows_crowd = false;                   // on devices they would leave experts less than half: reason enough
  RowPrice rows;                             // what that is worth; freed_bytes 0: there is nothing to decide
  double kv_bytes = 0, device_kv_bytes = 0;  // of all sequences: everywhere, and of that on devices
  bool table_on_disk = false;                // the model's table of n-grams
  bool kv_crowds = false;                    // on devices it takes more than half of what experts could have
  int64_t device_experts = 0;                // on all devices
  std::vector<DecodeSpeed> decode;  // of 1, batch and 32 sequences; what it would be if it fitted, where it does not
  PrefillSpeed prefill;
};

BoxPlan plan_box(const BoxQuestion& question);

/// Nanoseconds of a prefill step of `tokens` tokens at the end of a context, in the layers that see them all.
/// `resident`: share of experts with a slot, who find as many of the pairs, as a long step touches all.
double prefill_step_ns(const CostModel& cost, PrefillExperts experts, double tokens, double context, double resident,
                       Phase* bottleneck = nullptr);

/// Nanoseconds of what only a prompt's last tokens pass through, once a prompt; 0 where every layer sees all of them.
double prompt_end_ns(const CostModel& cost, PrefillExperts experts, double context, double resident);

/// Decode steps a second times sequences if experts were read from a disk where they have no slot: an upper bound, by
/// its bytes alone.
double disk_tokens_per_second(const ModelCosts& model, double disk_bytes_per_second, double hits);

/// "expert bytes from RAM": what a phase waits for.
///   tokens  of the step
std::string bottleneck_text(const CostModel& cost, Phase phase, double tokens);

}  // namespace thermocline::sched
