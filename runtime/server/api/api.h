// The APIs of one model: which path is whose, and what is refused before it costs anything.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "runtime/server/access_log.h"
#include "runtime/server/api/endpoint.h"

namespace thermocline::server {

class Api : public Handler {
 public:
  struct Options {
    uint64_t max_body_bytes = 32 << 20;
    int prep_threads = 0;  // PrepPool
    metrics::Metrics::Options metrics = {};
    std::vector<std::string> names = {};  // of the model, for /v1/models while it loads
  };
  /// Before a model is there it answers probes and refuses the rest, each with how far loading is.
  Api(const Options& options, AccessLog& log);
  /// Waits for what is being prepared.
  ~Api() override { prep_.wait(); }

  /// Whom it answers: everybody until keys are loaded.
  ApiKeys& keys() { return keys_; }
  const std::vector<Endpoint>& endpoints() const { return endpoints_; }

  /// Any thread: the share of the weights that is loaded.
  void loading(double share) { loaded_ = share; }
  /// Any thread, once: `model`, whose engine was started, is served from now on. It outlives the Api's exchanges.
  void serve(const ServedModel& model) { model_.store(&model, std::memory_order_release); }
  /// Any thread: no new work from now on.
  void drain() { draining_ = true; }

  std::optional<Reply> check(const HttpHead& head) override;
  uint64_t body_limit(const HttpHead& head) const override;
  std::variant<Reply, std::shared_ptr<Exchange>> handle(HttpRequest request) override;
  Reply shaped(const HttpHead& head, const Reply& reply) const override;

 private:
  struct Route {
    const Endpoint* endpoint = nullptr;
    std::string path, rest;
  };
  std::vector<Endpoint> own_endpoints();
  std::variant<Route, Reply> route(const HttpHead& head) const;
  std::variant<ApiClient, Reply> client_of(const HttpHead& head, const Endpoint& endpoint) const;
  std::optional<Reply> refusal(const HttpHead& head, const Endpoint& endpoint) const;
  Reply logged(const HttpHead& head, const Reply& reply);
  Reply health() const;
  Outcome described(Call call);
  Status ready() const;
  ServerState state() const;
  void observe(const AccessEntry& entry);
  const ServedModel* model() const { return model_.load(std::memory_order_acquire); }

  const Options options_;
  const RequestBook::Clock::time_point start_ = RequestBook::Clock::now();
  metrics::Metrics metrics_;
  RequestBook book_;
  ApiKeys keys_;
  std::atomic<const ServedModel*> model_{nullptr};
  std::atomic<double> loaded_{0};
  std::atomic<bool> draining_{false};
  PrepPool prep_;
  std::vector<Endpoint> endpoints_;
  Ticker ticker_{std::chrono::milliseconds(500)};
  Services services_{prep_, book_, keys_, metrics_, ticker_, [this] { return state(); }, options_.names};
};

}  // namespace thermocline::server
