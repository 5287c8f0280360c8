#include "scheduler/sim/devices.h"

#include <algorithm>
#include <cmath>

namespace thermocline::sched {

Devices::Devices(EventQueue& events, const MachineProfile& machine, double noise, uint64_t seed,
                 std::vector<SimFault> faults)
    : events_(events),
      cpu_beside_copies_(machine.gpus.empty() ? 1 : machine.gpus[0].cpu_read_share_beside_h2d),
      noise_(noise),
      random_(seed),
      faults_(std::move(faults)) {
  for (const SimFault& fault : faults_)
    for (const double time : {fault.from_ns, fault.to_ns}) events_.at(time, [this] { adjust(); });
}

void Devices::submit(Engine engine, double ns, const char* what, std::function<void()> done, bool urgent, int tag) {
  account();
  if (noise_ > 0) ns *= std::exp(std::normal_distribution<double>(-noise_ * noise_ / 2, noise_)(random_));
  Server& s = server(engine);
  Operation operation{ns, what, std::move(done), tag};
  if (urgent && s.queue.size() > 1)
    s.queue.insert(s.queue.begin() + 1, std::move(operation));
  else
    s.queue.push_back(std::move(operation));
  if (s.queue.size() == 1) adjust();
}

void Devices::drop(Engine engine, const char* what, const std::function<bool(int)>& keep) {
  account();
  Server& s = server(engine);
  const auto goes = [&](const Operation& operation) { return operation.what == what && !keep(operation.tag); };
  if (!s.queue.empty() && goes(s.queue.front())) ++s.turn;  // of whoever ran
  std::erase_if(s.queue, goes);
  adjust();
}

double Devices::speed_of(Engine engine) const {
  double speed = engine == Engine::cpu && !idle(Engine::h2d) ? cpu_beside_copies_ : 1;
  for (const SimFault& fault : faults_)
    if (fault.engine == engine && fault.from_ns <= events_.now() && events_.now() < fault.to_ns) speed *= fault.speed;
  return speed;
}

// Time that went by since the last look, to whoever worked.
void Devices::account() {
  const double ns = events_.now() - accounted_ns_;
  int working = 0;
  for (Server& s : servers_) {
    if (s.queue.empty()) continue;
    ++working;
    s.busy_ns += ns;
  }
  if (working > 1) overlap_ns_ += ns;
  accounted_ns_ = events_.now();
}

// Speeds as they are now, and when each running operation ends at them.
void Devices::adjust() {
  account();
  for (size_t i = 0; i < servers_.size(); ++i) {
    Server& s = servers_[i];
    const auto engine = static_cast<Engine>(i);
    if (s.queue.empty()) continue;
    Operation& first = s.queue.front();
    if (first.begin_ns < 0) {
      first.begin_ns = s.since_ns = events_.now();
    } else {
      first.left_ns = std::max(0.0, first.left_ns - (events_.now() - s.since_ns) * s.speed);
      s.since_ns = events_.now();
    }
    s.speed = speed_of(engine);
    schedule(engine);
  }
}

void Devices::schedule(Engine engine) {
  Server& s = server(engine);
  events_.after(s.queue.front().left_ns / s.speed, [this, engine, turn = ++s.turn] {
    Server& mine = server(engine);
    if (turn != mine.turn) return;  // its speed has changed since
    account();
    const Operation ended = std::move(mine.queue.front());
    mine.queue.pop_front();
    if (spans_) spans_->push_back({engine, ended.begin_ns, events_.now(), ended.what});
    adjust();
    ended.done();
  });
}

void Devices::reset_counters() {
  account();
  for (Server& s : servers_) s.busy_ns = 0;
  overlap_ns_ = 0;
}

}  // namespace thermocline::sched
