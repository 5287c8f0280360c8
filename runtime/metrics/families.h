// Families of Prometheus metrics, made when somebody asks for them.
#pragma once

#include <prometheus/metric_family.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "runtime/engine/buckets.h"
#include "runtime/metrics/metrics.h"

namespace thermocline::metrics {

using MetricFamilies = std::vector<prometheus::MetricFamily>;
using Labels = std::vector<std::pair<std::string, std::string>>;

/// Grows a list of families; names get our prefix. Values of one name follow each other.
class FamilyList {
 public:
  void gauge(const std::string& name, const std::string& help, double value, const Labels& labels = {});
  /// `name` ends in _total.
  void counter(const std::string& name, const std::string& help, double value, const Labels& labels = {});
  template <size_t N>
  void histogram(const std::string& name, const std::string& help, const std::array<double, N>& bounds,
                 const Buckets<N>& buckets, const Labels& labels = {}) {
    histogram(name, help, bounds.data(), buckets.counts.data(), N, buckets.sum, labels);
  }
  MetricFamilies take() { return std::move(families_); }

 private:
  void histogram(const std::string& name, const std::string& help, const double* bounds, const uint64_t* counts,
                 size_t n, double sum, const Labels& labels);
  prometheus::ClientMetric& add(const std::string& name, const std::string& help, prometheus::MetricType type,
                                const Labels& labels);
  MetricFamilies families_;
};

/// What the engine and the server are and have counted.
MetricFamilies families_of(const Snapshot& now);

/// The families that vLLM's dashboards ask for, made of ours: the same values under its names and with its labels.
MetricFamilies vllm_families(const MetricFamilies& ours, const std::string& model);

}  // namespace thermocline::metrics
