// What a simulated box is made of: servers that work off one operation after the other. Copies and the CPU read the
// same memory, so while copies run the CPU is slower, as it was measured to be. Source: spec/scheduler.md 3.1.
#pragma once

#include <array>
#include <deque>
#include <random>
#include <string>

#include "scheduler/cost/machine_profile.h"
#include "scheduler/sim/event_queue.h"

namespace thermocline::sched {

enum class Engine { gpu, cpu, h2d, disk };
constexpr std::array<const char*, 4> kEngineNames = {"GPU", "CPU", "copies", "disk"};

/// Something that goes wrong: an engine runs at a share of its speed for a while.
struct SimFault {
  Engine engine = Engine::cpu;
  double from_ns = 0, to_ns = 0, speed = 0.5;
};

struct SimSpan {
  Engine engine = Engine::gpu;
  double begin_ns = 0, end_ns = 0;
  const char* what = "";
};

class Devices {
 public:
  /// noise: sigma of the logarithm of every operation's time.
  Devices(EventQueue& events, const MachineProfile& machine, double noise, uint64_t seed, std::vector<SimFault> faults);
  Devices(const Devices&) = delete;

  /// Queues an operation that takes `ns` at full speed. urgent: before others that wait. tag: its own, for drop().
  void submit(Engine engine, double ns, const char* what, std::function<void()> done, bool urgent = false, int tag = 0);
  bool idle(Engine engine) const { return server(engine).queue.empty(); }
  /// Gives up what waits or runs under this name, but for the tags that are to be kept; nobody hears of it.
  void drop(
      Engine engine, const char* what, const std::function<bool(int tag)>& keep = [](int) { return false; });

  // Since the last reset, up to the last settle:
  double busy_ns(Engine engine) const { return server(engine).busy_ns; }
  double overlap_ns() const { return overlap_ns_; }  // two engines or more
  void settle() { account(); }
  void reset_counters();
  /// Records what runs from now on; nullptr: nothing.
  void record(std::vector<SimSpan>* spans) { spans_ = spans; }

 private:
  struct Operation {
    double left_ns = 0;
    const char* what = "";
    std::function<void()> done;
    int tag = 0;
    double begin_ns = -1;
  };
  struct Server {
    std::deque<Operation> queue;  // the first one runs
    double speed = 1, since_ns = 0, busy_ns = 0;
    uint64_t turn = 0;  // of the event that ends the first one
  };
  Server& server(Engine engine) { return servers_[static_cast<size_t>(engine)]; }
  const Server& server(Engine engine) const { return servers_[static_cast<size_t>(engine)]; }
  void account();
  void adjust();
  void schedule(Engine engine);
  double speed_of(Engine engine) const;

  EventQueue& events_;
  const double cpu_beside_copies_, noise_;
  std::mt19937_64 random_;
  const std::vector<SimFault> faults_;
  std::array<Server, kEngineNames.size()> servers_;
  double accounted_ns_ = 0, overlap_ns_ = 0;
  std::vector<SimSpan>* spans_ = nullptr;
};

}  // namespace thermocline::sched
