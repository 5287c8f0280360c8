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
  virtual ExpertMap experts() const { return {}; }
  virtual std::vector<MemoryTier> memory_tiers(const EngineStats& stats) const {
    return (void)stats, std::vector<MemoryTier>();
  }
  /// What the machine was measured to read from memory in a second; none where nobody measured it.
  virtual std::optional<double> stream_bytes_per_second() const { return {}; }
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
  ExpertMap experts() const override { return engine_.experts(); }
  std::vector<MemoryTier> memory_tiers(const EngineStats& stats) const override { return engine_.memory_tiers(stats); }
  std::optional<double> stream_bytes_per_second() const override {
    const auto& machine = engine_.options().machine;
    return machine ? std::optional(machine->cpu.read_bytes_per_second) : std::nullopt;
  }

 private:
  Engine& engine_;
};

}  // namespace thermocline::server
