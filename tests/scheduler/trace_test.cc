// Traces: the file format, the synthetic router against the published curve, what an analysis says.
#include "scheduler/trace/trace.h"

#include <gtest/gtest.h>

#include "scheduler/trace/analysis.h"
#include "scheduler/trace/synthetic.h"
#include "scheduler/trace/trace_csv.h"

namespace thermocline::sched {
namespace {

SyntheticOptions small() { return {.layers = 4, .experts = 16, .top_k = 3, .near_misses = 2, .vocabulary = 100}; }

TEST(Trace, ComesBackAsItWasWritten) {
  const Trace trace = synthesize_trace(small(), Workload::mixed, 3, 10);
  ASSERT_EQ(trace.size(), 30);
  const Result<Trace> back = parse_trace(trace_bytes(trace));
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_TRUE(*back == trace);
  EXPECT_EQ(back->cut_bytes(), 0);
  EXPECT_EQ(back->near_misses(7, 2).size(), 2u);
  Trace with_ids({.model = "m", .model_hash = 7, .layers = 1, .experts = 4, .top_k = 2, .token_ids = true});
  const TracePick picks[] = {{3, 0x3f80}, {1, 0}};
  with_ids.add({.step = 5,
                .request = 9,
                .position = 1 << 20,
                .phase = TracePhase::prefill,
                .flags = TraceToken::kDraft,
                .token_id = 77},
               picks);
  EXPECT_TRUE(parse_trace(trace_bytes(with_ids)).value() == with_ids);
  EXPECT_TRUE(trace.slice(3, 6).token(0) == trace.token(3));
}

TEST(Trace, GuessesAreKeptBehindTheChoices) {
  Trace trace({.model = "m", .layers = 2, .experts = 8, .top_k = 1, .near_misses = 1, .guesses = 2});
  constexpr uint16_t kNobody = TracePick::kNobody;
  const TracePick picks[] = {{3, 0}, {1, 0}, {kNobody, 0}, {kNobody, 0}, {kNobody, 0}, {kNobody, 0},
                             {5, 0}, {6, 0}, {5, 0},       {kNobody, 0}, {6, 0},       {7, 0}};
  trace.add({}, picks);
  const Trace back = parse_trace(trace_bytes(trace)).value();
  EXPECT_TRUE(back == trace);
  EXPECT_EQ(back.picks(0, 1)[0].expert, 5);
  EXPECT_EQ(back.near_misses(0, 1)[0].expert, 6);
  EXPECT_EQ(back.guesses(0, 0, 1)[0].expert, kNobody);
  EXPECT_EQ(back.guesses(0, 1, 1)[0].expert, 5);
  EXPECT_EQ(back.guesses(0, 1, 2)[1].expert, 7);
  std::string bad = trace_bytes(trace);
  bad[bad.size() - 4] = 9;
  EXPECT_NE(parse_trace(bad).error().message.find("expert 9 of 8"), std::string::npos);
  bad[bad.size() - 4] = 6;
  EXPECT_NE(parse_trace(bad).error().message.find("expert 6 twice in layer 1"), std::string::npos);
  std::string nobody_chosen = trace_bytes(trace);  // a choice is somebody
  nobody_chosen.replace(nobody_chosen.size() - 48, 2, "\xff\xff");
  EXPECT_FALSE(parse_trace(nobody_chosen));
}

TEST(Trace, ACutRecordingKeepsItsWholeRecords) {
  const Trace trace = synthesize_trace(small(), Workload::one, 1, 5);
  const std::string bytes = trace_bytes(trace);
  const Trace cut = parse_trace(std::string_view(bytes).substr(0, bytes.size() - 3)).value();
  EXPECT_EQ(cut.size(), 4);
  EXPECT_GT(cut.cut_bytes(), 0);
}

TEST(Trace, WhatIsNoTraceIsSaid) {
  const std::string good = trace_bytes(synthesize_trace(small(), Workload::one, 1, 2));
  EXPECT_FALSE(parse_trace(""));
  EXPECT_FALSE(parse_trace("TCTRACE2" + good.substr(8)));
  EXPECT_FALSE(parse_trace(good.substr(0, 30)));
  for (const size_t at : {size_t{16}, size_t{20}, size_t{24}, size_t{32}}) {  // layers, experts, top_k, flags
    std::string bad = good;
    bad[at + 3] = '\x7f';
    EXPECT_FALSE(parse_trace(bad)) << at;
  }
  std::string beyond = good;
  beyond[beyond.size() - 4] = '\x10';  // expert 16 of 16
  const auto refused = parse_trace(beyond);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::corrupt);
  EXPECT_NE(refused.error().message.find("expert 16 of 16"), std::string::npos) << refused.error().message;
  std::string twice = good;
  twice.replace(twice.size() - 4, 2, twice, twice.size() - 8, 2);
  EXPECT_NE(parse_trace(twice).error().message.find("twice"), std::string::npos);
}

TEST(TraceCsv, GoesThereAndBack) {
  const Trace trace =
      synthesize_trace({.layers = 3, .experts = 16, .top_k = 3, .vocabulary = 100}, Workload::one, 1, 10);
  const std::string csv = trace_csv(trace);
  const Result<Trace> back = parse_trace_csv(csv);
  ASSERT_TRUE(back) << back.error().message;
  ASSERT_EQ(back->size(), 10);
  for (int64_t i = 0; i < 10; ++i)
    for (int layer = 0; layer < 3; ++layer)
      for (size_t k = 0; k < 3; ++k) EXPECT_EQ(back->picks(i, layer)[k].expert, trace.picks(i, layer)[k].expert);
  std::string crlf;
  for (const char c : csv) crlf += c == '\n' ? std::string("\r\n") : std::string(1, c);
  EXPECT_TRUE(parse_trace_csv(crlf).value() == *back);
  const std::string head = std::string(kTraceCsvHead) + "\n";
  for (const char* bad : {"", "1,2", "0,0,0,0,5,x\n", "0,0,0,1,5,1\n", "0,0,0,0,5,1\n0,0,1,0,5,1\n0,0,0,0,5,1\n",
                          "0,0,0,0,99999,1\n", "0,0,0,0,3,nan\n", "0,0,0,0,3,-1\n", "0,0,0,0,3,1\n0,0,0,1,3,1\n"})
    EXPECT_FALSE(parse_trace_csv(head + bad)) << bad;
  EXPECT_FALSE(parse_trace_csv("request,layer\n"));
}

// One generation of 450 tokens, each layer its own LRU: 40.5 / 59.4 / 74.4 / 86.5 / 91.3 % were published for V4-Flash.
TEST(SyntheticRouter, HitsAsThePublishedModel) {
  const Trace trace = synthesize_trace({.hash_layers = 0, .model_sd = 0}, Workload::one, 1, 450);
  const std::vector<double> curve = lru_curve(trace);
  const std::pair<size_t, double> published[] = {{14, 0.405}, {28, 0.594}, {56, 0.744}, {112, 0.865}, {256, 0.913}};
  for (const auto& [slots, share] : published) EXPECT_NEAR(curve[slots], share, 0.03) << slots;
  EXPECT_NEAR(previous_token_overlap(trace), 0.26, 0.03);
}

// As many guesses as choices: the demo's routers, asked a layer ahead, named 69 % of the chosen.
TEST(SyntheticRouter, RoutersAskedAheadAreOffAsTheDemosAre) {
  const SyntheticOptions o{.layers = 4, .experts = 128, .top_k = 6, .hash_layers = 1, .guesses = 6};
  const Trace trace = synthesize_trace(o, Workload::one, 1, 300);
  int64_t right[3] = {}, all = 0, known = 0;
  for (int64_t i = 0; i < trace.size(); ++i)
    for (int layer = 1; layer < 4; ++layer)
      for (const TracePick& pick : trace.picks(i, layer)) {
        ++all;
        for (int distance = 1; distance <= 2; ++distance)
          for (const TracePick& guess : trace.guesses(i, layer, distance))
            right[distance] += guess.expert == pick.expert;
      }
  EXPECT_NEAR(static_cast<double>(right[1]) / static_cast<double>(all), 0.69, 0.06);
  EXPECT_LT(right[2], right[1]);
  for (int64_t i = 0; i < trace.size(); ++i) known += trace.guesses(i, 0, 1)[0].expert != TracePick::kNobody;
  EXPECT_EQ(known, 0) << "nobody is ahead of the first layer";
  SyntheticOptions without = o;
  without.guesses = 0;
  const Trace same = synthesize_trace(without, Workload::one, 1, 300);
  for (int64_t i = 0; i < trace.size(); ++i)
    for (int layer = 0; layer < 4; ++layer)
      for (size_t k = 0; k < 6; ++k) ASSERT_EQ(trace.picks(i, layer)[k].expert, same.picks(i, layer)[k].expert);
}

TEST(SyntheticRouter, WorkloadsAreWhatTheySay) {
  const SyntheticOptions o{.layers = 2, .experts = 64, .top_k = 4, .hash_layers = 0};
  const double uniform = skew_curve(synthesize_trace(o, Workload::uniform, 1, 2000))[16];
  EXPECT_NEAR(uniform, 0.25, 0.05);
  EXPECT_GT(skew_curve(synthesize_trace(o, Workload::one, 1, 500))[16], 0.45);
  const Trace cyclic = synthesize_trace(o, Workload::cyclic, 1, 100, 20);
  EXPECT_EQ(lru_curve(cyclic)[16], 0) << "one token's less than the cycle";
  EXPECT_GT(lru_curve(cyclic)[20], 0.9);
  EXPECT_TRUE(synthesize_trace(o, Workload::mixed, 2, 5) == synthesize_trace(o, Workload::mixed, 2, 5));
  EXPECT_FALSE(parse_workload("many"));
  const Trace hashed = synthesize_trace({.layers = 1, .experts = 64, .top_k = 4, .hash_layers = 1, .vocabulary = 1},
                                        Workload::one, 1, 3);
  EXPECT_EQ(previous_token_overlap(hashed), 1) << "the same token has the same experts";
}

TEST(Analysis, CurvesEndAtOne) {
  const Trace trace = synthesize_trace(small(), Workload::one, 1, 50);
  const std::vector<double> skew = skew_curve(trace);
  EXPECT_EQ(skew.front(), 0);
  EXPECT_DOUBLE_EQ(skew.back(), 1);
  EXPECT_TRUE(std::is_sorted(skew.begin(), skew.end()));
  EXPECT_TRUE(lru_curve(Trace(trace.header())).back() == 0) << "nothing of an empty one";
}

}  // namespace
}  // namespace thermocline::sched
