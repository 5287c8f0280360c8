#include "scheduler/trace/trace_csv.h"

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "runtime/base/number_formats.h"

namespace thermocline::sched {
namespace {

/// A line of CSV.
struct CsvPick {
  uint32_t request = 0, position = 0, layer = 0, rank = 0, expert = 0;
  float weight = 0;
};

bool parse_csv_line(std::string_view line, CsvPick& pick) {
  const char* at = line.data();
  const char* const end = at + line.size();
  for (uint32_t* const field : {&pick.request, &pick.position, &pick.layer, &pick.rank, &pick.expert}) {
    const auto [stop, error] = std::from_chars(at, end, *field);
    if (error != std::errc() || stop == end || *stop != ',') return false;
    at = stop + 1;
  }
  const auto [stop, error] = std::from_chars(at, end, pick.weight);
  return error == std::errc() && stop == end && pick.weight >= 0 && pick.weight <= 1e30f;
}

// The first line, which goes.
std::string_view take_line(std::string_view& text) {
  const size_t end = std::min(text.find('\n'), text.size());
  std::string_view line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

}  // namespace

std::string trace_csv(const Trace& trace) {
  std::string out = std::string(kTraceCsvHead) + "\n";
  char line[128];
  for (int64_t i = 0; i < trace.size(); ++i)
    for (int layer = 0; layer < trace.header().layers; ++layer) {
      int rank = 0;
      for (const TracePick& pick : trace.picks(i, layer)) {
        std::snprintf(line, sizeof line, "%u,%u,%d,%d,%u,%.4g\n", trace.token(i).request, trace.token(i).position,
                      layer, rank++, pick.expert, static_cast<double>(bf16_to_float(pick.weight)));
        out += line;
      }
    }
  return out;
}

Result<Trace> parse_trace_csv(std::string_view text) {
  const auto bad = [](size_t line) {
    return Error{ErrorCode::corrupt, "line " + std::to_string(line) +
                                         " should be request,position,layer,rank,expert,weight, "
                                         "whole tokens in order, layers and ranks from 0"};
  };
  if (take_line(text) != kTraceCsvHead) return bad(1);
  std::vector<CsvPick> picks;
  TraceHeader header{.model = "csv"};
  for (size_t line = 2; !text.empty(); ++line) {
    CsvPick pick;
    if (!parse_csv_line(take_line(text), pick) || pick.layer > 1023 || pick.rank > 63 || pick.expert > 32767)
      return bad(line);
    header.layers = std::max(header.layers, static_cast<int>(pick.layer) + 1);
    header.top_k = std::max(header.top_k, static_cast<int>(pick.rank) + 1);
    header.experts = std::max(header.experts, static_cast<int>(pick.expert) + 1);
    picks.push_back(pick);
  }
  const auto per_token = static_cast<size_t>(header.picks_per_token());
  if (per_token == 0 || picks.size() % per_token != 0) return bad(picks.size() + 1);
  std::string bytes = trace_header_bytes(header);
  std::vector<TracePick> token(per_token);
  for (size_t i = 0; i < picks.size(); ++i) {
    const CsvPick& pick = picks[i];
    const size_t within = i % per_token, layer = within / static_cast<size_t>(header.top_k);
    const CsvPick& first = picks[i - within];
    if (pick.layer != layer || pick.rank != within % static_cast<size_t>(header.top_k) ||
        pick.request != first.request || pick.position != first.position)
      return bad(i + 2);
    token[within] = {static_cast<uint16_t>(pick.expert), float_to_bf16(pick.weight)};
    if (within + 1 == per_token)
      append_trace_record(
          bytes, header,
          {.step = static_cast<uint32_t>(i / per_token), .request = pick.request, .position = pick.position}, token);
  }
  return parse_trace(bytes);
}

}  // namespace thermocline::sched
