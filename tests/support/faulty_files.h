// A folder whose disk fails as it is told to: for tests of what lies on it.
#pragma once

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>

#include "runtime/io/disk_files.h"

namespace thermocline::test {

/// What happens to operations, shared with the test, which keeps it.
struct DiskFaults {
  std::function<int(const DiskFiles::Op&)> error = {};    // errno instead of the operation
  std::function<void(std::span<std::byte>)> damage = {};  // of bytes on their way to the disk
  bool no_new_files = false, no_replace = false;
  int64_t writes = 0, reads = 0;
};

class FaultyFiles : public DiskFiles {
 public:
  FaultyFiles(const std::filesystem::path& folder, DiskFaults& faults, bool use_io_uring = true)
      : faults_(faults), files_(DiskFiles::open(folder, {.use_io_uring = use_io_uring}).value()) {}

  std::span<std::byte> buffer() override { return files_->buffer(); }
  std::string_view kind() const override { return files_->kind(); }
  Result<int> open_file(const std::string& name, bool create) override {
    if (create && faults_.no_new_files) return Error{ErrorCode::io, "opening " + name + ": no space left on device"};
    return files_->open_file(name, create);
  }
  void close_file(int file) override { files_->close_file(file); }
  Result<uint64_t> size(int file) override { return files_->size(file); }
  Status sync(int file) override { return files_->sync(file); }
  Status remove(const std::string& name) override { return files_->remove(name); }
  Result<std::vector<std::string>> list() override { return files_->list(); }
  void submit(const Op& op) override {
    ++(op.write ? faults_.writes : faults_.reads);
    if (const int error = faults_.error ? faults_.error(op) : 0; error != 0) {
      failed_.push_back({op.tag, error});
      return;
    }
    if (op.write && faults_.damage) faults_.damage(op.data);
    files_->submit(op);
  }
  Done wait() override {
    if (failed_.empty()) return files_->wait();
    const Done done = failed_.front();
    failed_.pop_front();
    return done;
  }
  Result<std::string> read_small(const std::string& name, uint64_t limit_bytes) override {
    return files_->read_small(name, limit_bytes);
  }
  Status replace_small(const std::string& name, std::string_view bytes) override {
    if (faults_.no_replace) return Error{ErrorCode::io, "writing " + name + ": no space left on device"};
    return files_->replace_small(name, bytes);
  }

 private:
  DiskFaults& faults_;
  const std::unique_ptr<DiskFiles> files_;
  std::deque<Done> failed_;
};

}  // namespace thermocline::test
