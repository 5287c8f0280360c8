#include "runtime/kv/nvme_tier.h"

#include <cstring>

#include "runtime/base/log.h"

namespace thermocline {
namespace {

constexpr size_t kMostCarried = 16;
constexpr int64_t kMostUnderWay = 4096;

// The folder's own, made with its first use. Without it, or with another, no name of before is found.
Result<PrefixSecret> secret_of(DiskFiles& files) {
  const Result<std::string> kept = files.read_small("secret", PrefixSecret::kBytes);
  if (kept && kept->size() == PrefixSecret::kBytes) return PrefixSecret(*kept);
  if (kept || kept.error().code != ErrorCode::not_found)
    log_warn("the KV cache on disk: its secret is not readable, what was saved is lost");
  const PrefixSecret secret;
  TC_RETURN_IF_ERROR(files.replace_small("secret", secret.bytes()));
  return secret;
}

}  // namespace

Result<std::unique_ptr<NvmeTier>> NvmeTier::open(const NvmeTierOptions& options) {
  TC_ASSIGN(std::unique_ptr<DiskFiles> files, DiskFiles::open(options.folder, {.use_io_uring = options.use_io_uring}));
  if (options.use_io_uring && files->kind() != "io_uring")
    log_info("the KV cache on disk: no io_uring on this system, {} do its reads and writes", files->kind());
  return open(std::move(files), options);
}

Result<std::unique_ptr<NvmeTier>> NvmeTier::open(std::unique_ptr<DiskFiles> files, const NvmeTierOptions& options) {
  TC_ASSIGN(const PrefixSecret secret, secret_of(*files));
  TC_ASSIGN(std::unique_ptr<KvLog> log, KvLog::open(std::move(files), options.space_bytes));
  TC_ASSIGN(CopyRing copies, CopyRing::create(options.queue_bytes));
  return std::unique_ptr<NvmeTier>(new NvmeTier(std::move(log), std::move(copies), secret));
}

NvmeTier::NvmeTier(std::unique_ptr<KvLog> log, CopyRing copies, const PrefixSecret& secret)
    : secret_(secret), log_(std::move(log)), copies_(std::move(copies)), thread_([this] { run(); }) {}

NvmeTier::~NvmeTier() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wanted_.notify_all();
  thread_.join();
}

void NvmeTier::set_wake(std::function<void()> wake) {
  const std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

void NvmeTier::post(std::deque<Job> NvmeTier::*queue, Job job) {
  {
    const std::lock_guard lock(mutex_);
    ++under_way_;
    (this->*queue).push_back(std::move(job));
  }
  wanted_.notify_one();
}

std::span<std::byte> NvmeTier::room(uint64_t bytes) {
  const std::span<std::byte> place = copies_.take(bytes);
  skipped_ += place.empty();
  return place;
}

void NvmeTier::save(std::vector<KvItem> items) {
  Job job;
  std::vector<PrefixName> names;
  names.reserve(items.size());
  for (const KvItem& item : items) names.push_back(item.head.name);
  saving_.insert(names.begin(), names.end());
  job.save = std::move(items);
  job.ring_end = copies_.end();
  job.done = [this, names = std::move(names)](bool) {
    for (const PrefixName& name : names) saving_.erase(name);
  };
  post(&NvmeTier::saves_, std::move(job));
}

void NvmeTier::read(std::vector<KvRead> reads, std::function<void(bool)> done) {
  Job job;
  job.read = std::move(reads);
  job.done = std::move(done);
  post(&NvmeTier::reads_, std::move(job));
}

void NvmeTier::touch(std::vector<PrefixName> names) {
  {
    const std::lock_guard lock(mutex_);
    if (under_way_ >= kMostUnderWay) return;
  }
  Job job;
  job.touch = std::move(names);
  job.done = [](bool) {};
  post(&NvmeTier::saves_, std::move(job));
}

void NvmeTier::poll() {
  std::deque<Job> done;
  {
    const std::lock_guard lock(mutex_);
    done.swap(done_);
  }
  for (Job& job : done) try {
      job.done(job.ok);
    } catch (const std::bad_alloc&) {
      log_warn("the KV cache on disk: no memory for what was read");
    }
}

void NvmeTier::flush() {
  {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [&] { return under_way_ == 0; });
  }
  poll();
}

NvmeTierStats NvmeTier::stats() const {
  NvmeTierStats stats;
  stats.log = log_->stats();
  stats.skipped_items = skipped_;
  stats.queued_bytes = static_cast<int64_t>(copies_.waiting());
  return stats;
}

// --- the tier's thread ---

// Saves that wait one behind the other keep the disk busy between them: of all of them the callers hear when the last
// one is written, or somebody reads.
void NvmeTier::run() {
  std::deque<Job> carried;
  for (;;) {
    Job job;
    bool last = false;
    {
      std::unique_lock lock(mutex_);
      wanted_.wait(lock, [&] { return stop_ || !reads_.empty() || !saves_.empty(); });
      std::deque<Job>& queue = reads_.empty() ? saves_ : reads_;
      if (queue.empty()) return;
      job = std::move(queue.front());
      queue.pop_front();
      last = saves_.empty() || !reads_.empty();
    }
    carry_out(job);
    last = last || !job.read.empty();
    carried.push_back(std::move(job));
    if (!last && carried.size() < kMostCarried) continue;
    log_->drain();
    const std::lock_guard lock(mutex_);
    for (Job& ended : carried) {
      if (ended.ring_end > 0) copies_.release(ended.ring_end);
      --under_way_;
      done_.push_back(std::move(ended));
    }
    carried.clear();
    ended_.notify_all();
    if (wake_) wake_();
  }
}

void NvmeTier::carry_out(Job& job) {
  try {
    if (!job.touch.empty()) log_->touch(job.touch);
    if (!job.save.empty()) log_->append(job.save);
    if (!job.read.empty()) log_->read(job.read);
  } catch (const std::bad_alloc&) {
    log_warn("the KV cache on disk: no memory for it");
    for (KvRead& read : job.read) read.ok = false;
  }
  for (const KvRead& read : job.read) job.ok = job.ok && read.ok;
}

}  // namespace thermocline
