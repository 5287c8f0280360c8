// Backend: what the APIs want of an engine. Tests put scripted answers behind it.
#pragma once

#include <functional>
#include <memory>

#include "runtime/engine/engine.h"

namespace thermocline::server {

/// As the functions of Engine with these names; any thread.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Result<QueueTicket> ticket(const QueueCounters::Amount& amount) = 0;
  virtual Result<std::shared_ptr<RequestHandle>> submit(Request request) = 0;
  virtual void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) = 0;
  virtual EngineHealth health() const = 0;
  virtual EngineStats stats() const = 0;
};

/// A started engine, which outlives this.
class EngineBackend : public Backend {
 public:
  explicit EngineBackend(Engine& engine) : engine_(engine) {}
  Result<QueueTicket> ticket(const QueueCounters::Amount& amount) override { return engine_.ticket(amount); }
  Result<std::shared_ptr<RequestHandle>> submit(Request request) override { return engine_.submit(std::move(request)); }
  void flush_prefix_cache(std::function<void(const PrefixCacheFlush&)> done) override {
    engine_.flush_prefix_cache(std::move(done));
  }
  EngineHealth health() const override { return engine_.health(); }
  EngineStats stats() const override { return engine_.stats(); }

 private:
  Engine& engine_;
};

}  // namespace thermocline::server
