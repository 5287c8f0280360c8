// runtime/metrics: what Prometheus gets to read.
#include "runtime/metrics/metrics.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>

#include "runtime/metrics/energy.h"
#include "tests/support/fixtures.h"

namespace thermocline::metrics {
namespace {

using Outcome = EndedRequest::Outcome;

/// Values by series: name, and labels as they are written.
std::map<std::string, double> series_of(const std::string& text) {
  std::map<std::string, double> series;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('#')) continue;
    const size_t space = line.rfind(' ');
    EXPECT_TRUE(series.emplace(line.substr(0, space), std::stod(line.substr(space + 1))).second) << line;
  }
  return series;
}

class MetricsTest : public testing::Test {
 protected:
  std::map<std::string, double> read() { return series_of(metrics.text(now)); }
  test::TempDir folder;
  Metrics metrics{{.vllm_names = true, .powercap = folder.path()}};
  Snapshot now;
};

TEST_F(MetricsTest, FamiliesAreThereBeforeAnythingHappens) {
  const std::string text = metrics.text(now);
  std::set<std::string> typed;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (!std::regex_match(line, match, std::regex("# TYPE (\\S+) (\\S+)"))) continue;
    EXPECT_TRUE(typed.insert(match[1]).second) << match[1] << " is there twice";
    if (match[2] == "counter") {
      EXPECT_TRUE(match[1].str().ends_with("_total")) << match[1];
    }
  }
  for (const char* name : {"requests_running",
                           "requests_waiting",
                           "prompt_tokens_total",
                           "generation_tokens_total",
                           "time_to_first_token_seconds",
                           "inter_token_latency_seconds",
                           "e2e_request_latency_seconds",
                           "request_queue_time_seconds",
                           "request_prefill_time_seconds",
                           "request_decode_time_seconds",
                           "requests_total",
                           "http_requests_total",
                           "kv_cache_usage_ratio",
                           "step_seconds",
                           "step_phase_seconds",
                           "expert_tokens_total",
                           "expert_slots",
                           "read_bytes_total",
                           "nvme_read_bytes_total",
                           "h2d_bytes_total",
                           "build_info",
                           "uptime_seconds",
                           "watchdog_seconds_since_step"})
    EXPECT_TRUE(typed.contains(std::string("thermocline_") + name)) << name;
  for (const auto& [name, value] : series_of(text)) EXPECT_TRUE(std::isfinite(value)) << name;
  EXPECT_FALSE(typed.contains("thermocline_energy_joules_total")) << "nothing to read it from";
  EXPECT_FALSE(typed.contains("thermocline_bandwidth_share")) << "nobody has measured the machine";
  EXPECT_FALSE(typed.contains("thermocline_step_predicted_ratio")) << "nothing was predicted";
}

TEST_F(MetricsTest, HistogramsCountTheRequestsThatEnded) {
  const auto ended = [&](Outcome outcome, double first_token, double total, int64_t tokens) {
    metrics.request_ended({.outcome = outcome,
                           .prompt_tokens = 100,
                           .completion_tokens = tokens,
                           .max_tokens = 64,
                           .choices = 1,
                           .queue_seconds = .4,
                           .prefill_seconds = 2,
                           .decode_seconds = total - first_token,
                           .total_seconds = total,
                           .first_token_seconds = first_token});
  };
  ended(Outcome::stop, 3, 5, 21);          // 0.1 s a token
  ended(Outcome::length, 2000, 2001, 2);   // a long prompt
  ended(Outcome::tool, .25, .25, 1);       // its first token was its last
  ended(Outcome::abort_client, .5, 9, 5);  // counts as a first token, not as an answer
  metrics.request_ended({.outcome = Outcome::rejected});
  const std::map<std::string, double> s = read();
  const auto bucket = [&](const std::string& name, const char* le) {
    return s.at("thermocline_" + name + "_bucket{le=\"" + le + "\"}");
  };
  EXPECT_EQ(s.at("thermocline_time_to_first_token_seconds_count"), 4);
  EXPECT_EQ(s.at("thermocline_time_to_first_token_seconds_sum"), 2003.75);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "0.1"), 0);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "0.25"), 1) << "bounds belong to the bucket below";
  EXPECT_EQ(bucket("time_to_first_token_seconds", "5"), 3);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "1280"), 3);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "2560"), 4);
  for (const char* name : {"e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
                           "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens"})
    EXPECT_EQ(s.at(std::string("thermocline_") + name + "_count"), 3) << name;
  EXPECT_EQ(s.at("thermocline_request_generation_tokens_sum"), 24);
  EXPECT_EQ(bucket("request_queue_time_seconds", "0.3"), 0);
  EXPECT_EQ(bucket("request_queue_time_seconds", "0.5"), 3);
  EXPECT_EQ(s.at("thermocline_request_time_per_output_token_seconds_count"), 2);
  EXPECT_NEAR(s.at("thermocline_request_time_per_output_token_seconds_sum"), 1.1, 1e-9);
  EXPECT_EQ(s.at("thermocline_request_params_n_count"), 4) << "the refused one was not read";
  for (const auto& [outcome, count] : std::map<std::string, int>{{"stop", 1},
                                                                 {"length", 1},
                                                                 {"tool", 1},
                                                                 {"abort_client", 1},
                                                                 {"rejected", 1},
                                                                 {"error", 0},
                                                                 {"abort_shutdown", 0}})
    EXPECT_EQ(s.at("thermocline_requests_total{outcome=\"" + outcome + "\"}"), count) << outcome;
}

TEST_F(MetricsTest, VllmsNamesSayTheSame) {
  now.model = "quo\"ted\nname";
  now.preparing = 1;
  now.queued = 2;
  now.stats.running = 3;
  now.stats.kv_tokens_used = 50;
  now.stats.kv_tokens_total = 200;
  now.stats.prompt_tokens = 70;
  now.stats.kept_tokens = 30;
  now.stats.admitted_tokens = 100;
  now.stats.measures.tokens.add(kStepTokens, 100);
  metrics.request_ended({.outcome = Outcome::stop, .choices = 1, .total_seconds = 2});
  metrics.request_ended({.outcome = Outcome::tool, .choices = 1, .total_seconds = 2});
  metrics.request_ended({.outcome = Outcome::abort_shutdown, .choices = 1});
  const std::map<std::string, double> s = read();
  const std::string model = "model_name=\"quo\\\"ted\\nname\"";
  const auto theirs = [&](const std::string& name) { return s.at("vllm:" + name + "{" + model + "}"); };
  EXPECT_EQ(theirs("num_requests_running"), 3);
  EXPECT_EQ(theirs("num_requests_waiting"), 3);
  EXPECT_EQ(theirs("kv_cache_usage_perc"), .25);
  EXPECT_EQ(theirs("prompt_tokens_total"), 100);
  EXPECT_EQ(theirs("prefix_cache_hits_total"), 30);
  EXPECT_EQ(theirs("prefix_cache_queries_total"), 100);
  EXPECT_EQ(theirs("e2e_request_latency_seconds_count"), 2);
  EXPECT_EQ(theirs("iteration_tokens_total_sum"), 100);
  const auto finished = [&](const char* reason) {
    return s.at("vllm:request_success_total{" + model + ",finished_reason=\"" + reason + "\"}");
  };
  EXPECT_EQ(finished("stop"), 2);
  EXPECT_EQ(finished("abort"), 1);
  EXPECT_EQ(finished("error"), 0);
  EXPECT_EQ(Metrics({.powercap = folder.path()}).text(now).find("vllm:"), std::string::npos) << "only where asked for";
}

TEST_F(MetricsTest, SharesNeedAMeasuredMachine) {
  now.stream_bytes_per_second = 2e10;
  StepMeasures& m = now.stats.measures;
  m.nodes = 2;
  now.stats.recent = {10,
                      {.read_bytes = 30'000'000'000,
                       .step_seconds = 3,
                       .weight_seconds = 2,
                       .node_bytes = {16'000'000'000, 4'000'000'000}}};
  const std::map<std::string, double> s = read();
  EXPECT_NEAR(s.at("thermocline_bandwidth_share"), .5, 1e-9);
  EXPECT_NEAR(s.at("thermocline_numa_bandwidth_share{node=\"0\"}"), .8, 1e-9);
  EXPECT_NEAR(s.at("thermocline_numa_bandwidth_share{node=\"1\"}"), .2, 1e-9);
}

TEST_F(MetricsTest, TiersHaveTheirBytes) {
  now.tiers = {{"ram", 1000, {{"kv", 100, 40}, {"weights", 500}}}, {"nvme", 90, {{"kv", 7}}}};
  const std::map<std::string, double> s = read();
  EXPECT_EQ(s.at("thermocline_tier_bytes{tier=\"ram\",kind=\"weights\"}"), 500);
  EXPECT_EQ(s.at("thermocline_tier_used_bytes{tier=\"ram\",kind=\"kv\"}"), 40);
  EXPECT_FALSE(s.contains("thermocline_tier_used_bytes{tier=\"ram\",kind=\"weights\"}"));
  EXPECT_EQ(s.at("thermocline_tier_capacity_bytes{tier=\"nvme\"}"), 90);
}

class EnergyTest : public testing::Test {
 protected:
  void zone(const std::string& name, const std::string& domain, uint64_t energy_uj, uint64_t range_uj = 1'000'000'000) {
    const std::filesystem::path path = folder.path() / name;
    std::filesystem::create_directories(path);
    std::ofstream(path / "name") << domain << "\n";
    std::ofstream(path / "max_energy_range_uj") << range_uj << "\n";
    std::ofstream(path / "energy_uj") << energy_uj << "\n";
  }
  test::TempDir folder;
};

TEST_F(EnergyTest, CountsEveryDomainFromTheStartOn) {
  zone("intel-rapl:0", "package-0", 5'000'000);
  zone("intel-rapl:1", "package-1", 9'000'000);
  zone("intel-rapl:1:0", "dram", 100);
  zone("intel-rapl-mmio:0", "package-0", 5'000'000);
  zone("dtpm", "package-9", 1);
  EnergyCounters energy(folder.path());
  EXPECT_EQ(energy.joules(), (std::map<std::string, double>{{"dram-1", 0}, {"package-0", 0}, {"package-1", 0}}));
  zone("intel-rapl:0", "package-0", 7'500'000);
  EXPECT_EQ(energy.joules().at("package-0"), 2.5);
  EXPECT_EQ(energy.joules().at("package-0"), 2.5) << "nothing was used since";
  EXPECT_EQ(energy.joules().at("package-1"), 0);
}

TEST_F(EnergyTest, CountersThatStartAgainGoOn) {
  zone("intel-rapl:0", "package-0", 999'000'000);
  EnergyCounters energy(folder.path());
  zone("intel-rapl:0", "package-0", 2'000'000);
  EXPECT_EQ(energy.joules().at("package-0"), 3);
}

TEST_F(EnergyTest, WhatCannotBeReadIsNotThere) {
  zone("intel-rapl:0", "package-0", 1);
  std::filesystem::remove(folder.path() / "intel-rapl:0" / "energy_uj");
  zone("intel-rapl:1", "package-1", 1);
  std::ofstream(folder.path() / "intel-rapl:1" / "energy_uj") << "secret";
  EXPECT_TRUE(EnergyCounters(folder.path()).joules().empty());
  EXPECT_TRUE(EnergyCounters("/nowhere").joules().empty());
}

TEST_F(EnergyTest, ReachesTheMetrics) {
  zone("intel-rapl:0", "package-0", 0);
  Metrics metrics({.powercap = folder.path()});
  zone("intel-rapl:0", "package-0", 1'500'000);
  EXPECT_EQ(series_of(metrics.text({})).at("thermocline_energy_joules_total{domain=\"package-0\"}"), 1.5);
}

}  // namespace
}  // namespace thermocline::metrics
