// Traces as text that other tools read and write: a line a (token, layer, expert), whole tokens in order.
#pragma once

#include <string_view>

#include "scheduler/trace/trace.h"

namespace thermocline::sched {

inline constexpr std::string_view kTraceCsvHead = "request,position,layer,rank,expert,weight";

std::string trace_csv(const Trace& trace);
/// Lines end with LF or CRLF. Sizes are those of the highest numbers; each token is a step of its own. Errors: corrupt,
/// with the line; those of parse_trace.
Result<Trace> parse_trace_csv(std::string_view text);

}  // namespace thermocline::sched
