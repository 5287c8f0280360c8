#include "scheduler/trace/trace.h"

#include <algorithm>
#include <cstring>

#include "runtime/base/check.h"

namespace thermocline::sched {
namespace {

constexpr std::string_view kMagic = "TCTRACE1";
constexpr size_t kHeaderBytes = 48;  // with the magic, without the name
constexpr uint32_t kMostLayers = 1024, kMostExperts = 1 << 15, kMostPicks = 64, kMostName = 256;

template <class T>
void put(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}
template <class T>
T take(std::string_view& in) {
  T value;
  std::memcpy(&value, in.data(), sizeof(T));
  in.remove_prefix(sizeof(T));
  return value;
}

size_t record_bytes(const TraceHeader& h) {
  return 16 + (h.token_ids ? 4 : 0) + static_cast<size_t>(h.picks_per_token()) * sizeof(TracePick);
}

Error bad(size_t offset, const std::string& what) {
  return Error{ErrorCode::corrupt, "the trace, at byte " + std::to_string(offset) + ": " + what};
}

Result<TraceHeader> parse_header(std::string_view& in) {
  if (in.size() < kHeaderBytes || !in.starts_with(kMagic)) return bad(0, "no TCTRACE1 file");
  in.remove_prefix(kMagic.size());
  TraceHeader h;
  h.model_hash = take<uint64_t>(in);
  uint32_t sizes[8];  // layers, experts, top_k, near misses, flags, name, guesses, what is to come
  for (uint32_t& size : sizes) size = take<uint32_t>(in);
  const auto [layers, experts, top_k, near, flags, name, guesses, to_come] = sizes;
  if (layers < 1 || layers > kMostLayers || experts < 1 || experts > kMostExperts || top_k < 1 || top_k > kMostPicks ||
      near > kMostPicks || top_k + near > experts || flags > 1 || to_come != 0 || guesses > kMostPicks ||
      guesses > experts || name > kMostName || in.size() < name)
    return bad(16, "sizes that no model has");
  h.layers = static_cast<int>(layers);
  h.experts = static_cast<int>(experts);
  h.top_k = static_cast<int>(top_k);
  h.near_misses = static_cast<int>(near);
  h.token_ids = flags == 1;
  h.guesses = static_cast<int>(guesses);
  for (const char c : in.substr(0, name)) h.model += c >= 0 && c < ' ' ? '?' : c;  // it is printed
  in.remove_prefix(name);
  return h;
}

}  // namespace

void Trace::add(const TraceToken& token, std::span<const TracePick> picks) {
  TC_CHECK(static_cast<int>(picks.size()) == header_.picks_per_token());
  tokens_.push_back(token);
  picks_.insert(picks_.end(), picks.begin(), picks.end());
}

Trace Trace::slice(int64_t begin, int64_t end) const {
  Trace part(header_);
  const int64_t per_token = header_.picks_per_token();
  part.tokens_.assign(tokens_.begin() + begin, tokens_.begin() + end);
  part.picks_.assign(picks_.begin() + begin * per_token, picks_.begin() + end * per_token);
  return part;
}

std::string trace_header_bytes(const TraceHeader& h) {
  std::string out(kMagic);
  put(out, h.model_hash);
  const std::string name = h.model.substr(0, kMostName);
  for (const int size : {h.layers, h.experts, h.top_k, h.near_misses, static_cast<int>(h.token_ids),
                         static_cast<int>(name.size()), h.guesses, 0})
    put(out, static_cast<uint32_t>(size));
  return out + name;
}

void append_trace_record(std::string& out, const TraceHeader& header, const TraceToken& token,
                         std::span<const TracePick> picks) {
  put(out, token.step);
  put(out, token.request);
  put(out, token.position);
  put(out, static_cast<uint8_t>(token.phase));
  put(out, token.flags);
  put(out, uint16_t{0});
  if (header.token_ids) put(out, token.token_id);
  for (const TracePick& pick : picks) {
    put(out, pick.expert);
    put(out, pick.weight);
  }
}

std::string trace_bytes(const Trace& trace) {
  const TraceHeader& h = trace.header();
  std::string out = trace_header_bytes(h);
  for (int64_t i = 0; i < trace.size(); ++i)
    append_trace_record(out, h, trace.token(i), {trace.picks(i, 0).data(), static_cast<size_t>(h.picks_per_token())});
  return out;
}

Result<Trace> parse_trace(std::string_view bytes) {
  std::string_view in = bytes;
  TC_ASSIGN(TraceHeader header, parse_header(in));
  Trace trace(std::move(header));
  const TraceHeader& h = trace.header_;
  const size_t size = record_bytes(h), count = in.size() / size;
  trace.cut_bytes_ = static_cast<int64_t>(in.size() % size);
  trace.tokens_.reserve(count);
  trace.picks_.reserve(count * static_cast<size_t>(h.picks_per_token()));
  std::vector<uint32_t> seen(static_cast<size_t>(h.experts));
  uint32_t list = 0;  // whose experts differ
  // What is wrong with them; empty: nothing.
  const auto take_picks = [&](int layer, int picks, bool may_be_nobody) -> std::string {
    ++list;
    for (; picks > 0; --picks) {
      TracePick pick;
      pick.expert = take<uint16_t>(in);
      pick.weight = take<uint16_t>(in);
      trace.picks_.push_back(pick);
      if (may_be_nobody && pick.expert == TracePick::kNobody) continue;
      if (pick.expert >= h.experts) return "expert " + std::to_string(pick.expert) + " of " + std::to_string(h.experts);
      if (std::exchange(seen[pick.expert], list) == list)
        return "expert " + std::to_string(pick.expert) + " twice in layer " + std::to_string(layer);
    }
    return "";
  };
  for (size_t i = 0; i < count; ++i) {
    const size_t offset = bytes.size() - in.size();
    TraceToken token;
    token.step = take<uint32_t>(in);
    token.request = take<uint32_t>(in);
    token.position = take<uint32_t>(in);
    const auto phase = take<uint8_t>(in);
    token.flags = take<uint8_t>(in);
    if (take<uint16_t>(in) != 0 || phase > 1) return bad(offset, "no record");
    if (!trace.tokens_.empty() && token.step < trace.tokens_.back().step) return bad(offset, "a step before the last");
    token.phase = static_cast<TracePhase>(phase);
    if (h.token_ids) token.token_id = take<int32_t>(in);
    for (int layer = 0; layer < h.layers; ++layer) {
      std::string wrong = take_picks(layer, h.top_k + h.near_misses, false);
      for (int distance = 1; distance <= 2 && wrong.empty(); ++distance) wrong = take_picks(layer, h.guesses, true);
      if (!wrong.empty()) return bad(offset, wrong);
    }
    trace.tokens_.push_back(token);
  }
  return trace;
}

}  // namespace thermocline::sched
