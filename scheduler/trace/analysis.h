// What a trace says about its model: how unequal experts are, how much of a token's set the token before had, and what
// hit rate a cache of any size would have had.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/trace/trace.h"

namespace thermocline::sched {

/// Share of the activations that the n most used experts of each layer take, n = 0..experts, over all layers.
std::vector<double> skew_curve(const Trace& trace);

/// Hit rate of a cache of n experts a layer that drops the one used longest ago, n = 0..experts, each layer its own;
/// the first use of an expert is a miss. One pass for all sizes (stack distances).
std::vector<double> lru_curve(const Trace& trace);

/// Share of a token's experts that its request's token before had.
double previous_token_overlap(const Trace& trace);

}  // namespace thermocline::sched
