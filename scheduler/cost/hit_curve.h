// What an expert cache finds, by the share of a layer's experts that have a slot. An assumption: routing depends on the
// text, and the points are of one model.
#pragma once

namespace thermocline::sched {

/// Share of the (token, expert) pairs that find theirs on a device, for `resident` in [0, 1] of the experts there, with
/// the least recently used one leaving first. Published for V4-Flash: 14, 28, 56, 112 and 224 slots of a layer's 256
/// find 40.5, 59.4, 74.4, 86.5 and 91.0 %; linear between them, nothing at 0 and all at 1. Uniform routing would find
/// `resident`. Source: spec/scheduler.md 3.3.
double expected_hits(double resident);

}  // namespace thermocline::sched
