#include "runtime/io/disk_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <liburing.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "runtime/base/log.h"

namespace thermocline {
namespace {

constexpr int kThreads = 4;  // of the fallback

/// A descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept { std::swap(fd_, other.fd_); }
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  bool open() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

int error_of(const DiskFiles::Op& op, int64_t result) {
  if (result < 0) return static_cast<int>(-result);
  if (static_cast<uint64_t>(result) == op.data.size()) return 0;
  return op.write ? ENOSPC : ENODATA;
}

/// Carries operations out; the descriptor of each is given with it.
class Carrier {
 public:
  virtual ~Carrier() = default;
  virtual std::string_view kind() const = 0;
  virtual void submit(const DiskFiles::Op& op, int fd) = 0;
  virtual DiskFiles::Done wait() = 0;
};

class UringCarrier : public Carrier {
 public:
  /// nullptr where the system has no io_uring for us.
  static std::unique_ptr<Carrier> create(std::span<std::byte> buffer) {
    std::unique_ptr<UringCarrier> carrier(new UringCarrier());
    if (io_uring_queue_init(DiskFiles::kDepth, &carrier->ring_, 0) < 0) return nullptr;
    carrier->started_ = true;
    const iovec vector{buffer.data(), buffer.size()};
    // A limit on locked memory may forbid it: then the kernel finds the pages anew with each operation.
    carrier->registered_ = io_uring_register_buffers(&carrier->ring_, &vector, 1) == 0;
    return carrier;
  }
  ~UringCarrier() override {
    if (started_) io_uring_queue_exit(&ring_);
  }
  std::string_view kind() const override { return "io_uring"; }

  void submit(const DiskFiles::Op& op, int fd) override {
    size_t slot = 0;
    while (slot < used_.size() && used_[slot]) ++slot;
    TC_CHECK(slot < used_.size(), "more operations are under way than the ring holds");
    used_[slot] = true;
    ops_[slot] = op;
    io_uring_sqe* const entry = io_uring_get_sqe(&ring_);
    const auto bytes = static_cast<unsigned>(op.data.size());
    if (registered_)
      op.write ? io_uring_prep_write_fixed(entry, fd, op.data.data(), bytes, op.offset, 0)
               : io_uring_prep_read_fixed(entry, fd, op.data.data(), bytes, op.offset, 0);
    else
      op.write ? io_uring_prep_write(entry, fd, op.data.data(), bytes, op.offset)
               : io_uring_prep_read(entry, fd, op.data.data(), bytes, op.offset);
    io_uring_sqe_set_data64(entry, slot);
    (void)io_uring_submit(&ring_);  // what it does not take now, wait() hands in
  }

  DiskFiles::Done wait() override {
    io_uring_cqe* completed = nullptr;
    while (io_uring_peek_cqe(&ring_, &completed) != 0) {
      const int status = io_uring_submit_and_wait(&ring_, 1);
      if (status == -EAGAIN || status == -EBUSY) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (status < 0 && status != -EINTR && status != -EAGAIN && status != -EBUSY) return give_up(-status);
    }
    const auto slot = static_cast<size_t>(io_uring_cqe_get_data64(completed));
    const DiskFiles::Done done{ops_[slot].tag, error_of(ops_[slot], completed->res)};
    io_uring_cqe_seen(&ring_, completed);
    used_[slot] = false;
    return done;
  }

 private:
  UringCarrier() = default;

  // The ring is broken: every operation ends with its error.
  DiskFiles::Done give_up(int error) {
    const auto slot = static_cast<size_t>(std::find(used_.begin(), used_.end(), true) - used_.begin());
    TC_CHECK(slot < used_.size(), "nothing is under way");
    used_[slot] = false;
    return {ops_[slot].tag, error};
  }

  io_uring ring_{};
  bool started_ = false, registered_ = false;
  std::array<DiskFiles::Op, DiskFiles::kDepth> ops_;
  std::array<bool, DiskFiles::kDepth> used_{};
};

class ThreadCarrier : public Carrier {
 public:
  ThreadCarrier() {
    for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~ThreadCarrier() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wanted_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  std::string_view kind() const override { return "threads"; }

  void submit(const DiskFiles::Op& op, int fd) override {
    {
      const std::lock_guard lock(mutex_);
      waiting_.push_back({op, fd});
    }
    wanted_.notify_one();
  }
  DiskFiles::Done wait() override {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [&] { return !done_.empty(); });
    const DiskFiles::Done done = done_.front();
    done_.pop_front();
    return done;
  }

 private:
  struct Work {
    DiskFiles::Op op;
    int fd = -1;
  };

  void work() {
    for (;;) {
      Work work;
      {
        std::unique_lock lock(mutex_);
        wanted_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        work = waiting_.front();
        waiting_.pop_front();
      }
      const int error = error_of(work.op, carry_out(work));
      {
        const std::lock_guard lock(mutex_);
        done_.push_back({work.op.tag, error});
      }
      ended_.notify_one();
    }
  }
  static int64_t carry_out(const Work& work) {
    const DiskFiles::Op& op = work.op;
    size_t done = 0;
    while (done < op.data.size()) {
      const auto at = static_cast<off_t>(op.offset + done);
      const ssize_t n = op.write ? pwrite(work.fd, op.data.data() + done, op.data.size() - done, at)
                                 : pread(work.fd, op.data.data() + done, op.data.size() - done, at);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return -errno;
      if (n == 0) break;
      done += static_cast<size_t>(n);
    }
    return static_cast<int64_t>(done);
  }

  std::mutex mutex_;
  std::condition_variable wanted_, ended_;
  std::deque<Work> waiting_;
  std::deque<DiskFiles::Done> done_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class FolderFiles : public DiskFiles {
 public:
  FolderFiles(const std::filesystem::path& path, Descriptor folder, Descriptor lock)
      : path_(path), folder_(std::move(folder)), lock_(std::move(lock)) {}
  ~FolderFiles() override {
    carrier_.reset();
    if (buffer_.data()) munmap(buffer_.data(), buffer_.size());
  }

  Status start(const Options& options) {
    const uint64_t bytes = (options.buffer_bytes + kBlock - 1) / kBlock * kBlock;
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return Error{ErrorCode::out_of_memory, "no memory for the buffers of " + path_.string()};
    buffer_ = {static_cast<std::byte*>(data), bytes};
    if (options.use_io_uring) carrier_ = UringCarrier::create(buffer_);
    if (!carrier_) carrier_ = std::make_unique<ThreadCarrier>();
    return {};
  }

  std::span<std::byte> buffer() override { return buffer_; }
  std::string_view kind() const override { return carrier_->kind(); }

  Result<int> open_file(const std::string& name, bool create) override {
    const int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | (create ? O_CREAT | O_EXCL : 0);
    int fd = openat(folder_.get(), name.c_str(), flags | O_DIRECT, 0600);
    if (fd < 0 && errno == EINVAL) {  // a file system without: the file was made all the same
      if (create) unlinkat(folder_.get(), name.c_str(), 0);
      fd = openat(folder_.get(), name.c_str(), flags, 0600);
    }
    if (fd < 0) return error("opening", name);
    Descriptor file(fd);
    struct stat info {};
    if (fstat(fd, &info) != 0) return error("looking at", name);
    if (!S_ISREG(info.st_mode)) return Error{ErrorCode::io, (path_ / name).string() + " is not a regular file"};
    files_.push_back({std::move(file), name});
    return static_cast<int>(files_.size()) - 1;
  }
  void close_file(int file) override { files_[static_cast<size_t>(file)].fd = Descriptor(); }
  Result<uint64_t> size(int file) override {
    struct stat info {};
    if (fstat(fd(file), &info) != 0) return error("looking at", name(file));
    return static_cast<uint64_t>(info.st_size);
  }
  Status sync(int file) override {
    if (fdatasync(fd(file)) != 0) return error("writing", name(file));
    return {};
  }
  Status remove(const std::string& name) override {
    if (unlinkat(folder_.get(), name.c_str(), 0) != 0 && errno != ENOENT) return error("removing", name);
    return {};
  }
  Result<std::vector<std::string>> list() override {
    const int fd = openat(folder_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* const folder = fd < 0 ? nullptr : fdopendir(fd);
    if (!folder) return error("listing", "");
    std::vector<std::string> names;
    while (const dirent* const entry = readdir(folder)) names.emplace_back(entry->d_name);
    closedir(folder);
    return names;
  }

  void submit(const Op& op) override { carrier_->submit(op, fd(op.file)); }
  Done wait() override { return carrier_->wait(); }

  Result<std::string> read_small(const std::string& name, uint64_t limit_bytes) override {
    const Descriptor file(openat(folder_.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    if (!file.open()) return error("opening", name);
    struct stat info {};
    if (fstat(file.get(), &info) != 0) return error("looking at", name);
    if (!S_ISREG(info.st_mode) || static_cast<uint64_t>(info.st_size) > limit_bytes)
      return corrupt((path_ / name).string() + " is no file of at most " + std::to_string(limit_bytes) + " bytes");
    std::string bytes(static_cast<size_t>(info.st_size), '\0');
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t n = read(file.get(), bytes.data() + done, bytes.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return error("reading", name);
      if (n == 0) return corrupt((path_ / name).string() + " was cut short while being read");
      done += static_cast<size_t>(n);
    }
    return bytes;
  }

  Status replace_small(const std::string& name, std::string_view bytes) override {
    const std::string beside = name + ".new";
    unlinkat(folder_.get(), beside.c_str(), 0);
    const Descriptor file(
        openat(folder_.get(), beside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!file.open()) return error("creating", beside);
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t n = write(file.get(), bytes.data() + done, bytes.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return error("writing", beside);
      done += static_cast<size_t>(n);
    }
    if (fsync(file.get()) != 0) return error("writing", beside);
    if (renameat(folder_.get(), beside.c_str(), folder_.get(), name.c_str()) != 0) return error("renaming", beside);
    return {};
  }

 private:
  struct File {
    Descriptor fd;
    std::string name;
  };
  int fd(int file) const { return files_[static_cast<size_t>(file)].fd.get(); }
  const std::string& name(int file) const { return files_[static_cast<size_t>(file)].name; }
  Error error(const char* action, const std::string& name) const {
    const int code = errno;
    return {code == ENOENT ? ErrorCode::not_found : ErrorCode::io,
            std::string(action) + " " + (path_ / name).string() + ": " + std::strerror(code)};
  }

  const std::filesystem::path path_;
  const Descriptor folder_, lock_;
  std::vector<File> files_;
  std::span<std::byte> buffer_;
  std::unique_ptr<Carrier> carrier_;
};

Error folder_error(const std::filesystem::path& folder, const std::string& text) {
  return invalid("the folder " + folder.string() + " " + text);
}

// A wrong name or wrong rights are the user's to mend, the rest is the disk's.
Error refusal(const std::filesystem::path& folder, const char* action) {
  const int code = errno;
  Error error = folder_error(folder, std::string("cannot be ") + action + ": " + std::strerror(code));
  if (code != EACCES && code != EPERM && code != ENOENT && code != ENOTDIR && code != ELOOP) error.code = ErrorCode::io;
  return error;
}

}  // namespace

Result<std::unique_ptr<DiskFiles>> DiskFiles::open(const std::filesystem::path& path, const Options& options) {
  const std::filesystem::path folder = path.has_filename() ? path : path.parent_path();  // a/ would follow a link
  if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) return refusal(folder, "made");
  Descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd.open())
    return folder_error(folder, errno == ELOOP || errno == ENOTDIR
                                    ? "is a symbolic link or no folder: name the folder itself"
                                    : std::string("cannot be opened: ") + std::strerror(errno));
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return folder_error(folder, std::strerror(errno));
  if (info.st_uid != geteuid()) return folder_error(folder, "belongs to another user");
  if ((info.st_mode & 077) != 0)
    return folder_error(folder, "is open to others, and what people asked lies in it: chmod 700 " + folder.string());
  Descriptor lock(openat(fd.get(), "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.open()) return refusal(folder, "locked");
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    return Error{ErrorCode::unavailable, "the folder " + folder.string() + " is used by another server"};
  auto files = std::make_unique<FolderFiles>(folder, std::move(fd), std::move(lock));
  TC_RETURN_IF_ERROR(files->start(options));
  return std::unique_ptr<DiskFiles>(std::move(files));
}

bool io_uring_allowed() {
  io_uring ring;
  if (io_uring_queue_init(1, &ring, 0) < 0) return false;
  io_uring_queue_exit(&ring);
  return true;
}

Status transfer(DiskFiles& files, int file, uint64_t bytes, bool write) {
  const uint64_t slot_bytes = files.buffer().size() / DiskFiles::kDepth / DiskFiles::kBlock * DiskFiles::kBlock;
  std::vector<uint64_t> idle;
  for (uint64_t i = 0; i < DiskFiles::kDepth; ++i) idle.push_back(i);
  Status first;
  const auto wait = [&] {
    const DiskFiles::Done done = files.wait();
    idle.push_back(done.tag);
    if (done.error != 0 && first.ok())
      first = Error{ErrorCode::io, std::string(write ? "writing" : "reading") + ": " + std::strerror(done.error)};
  };
  for (uint64_t at = 0; at < bytes && first.ok(); at += slot_bytes) {
    if (idle.empty()) wait();
    const uint64_t slot = idle.back();
    idle.pop_back();
    files.submit({file, write, at, files.buffer().subspan(slot * slot_bytes, slot_bytes), slot});
  }
  while (idle.size() < DiskFiles::kDepth) wait();
  return first;
}

}  // namespace thermocline
