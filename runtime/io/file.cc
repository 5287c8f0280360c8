#include "runtime/io/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

namespace thermocline {
namespace {

constexpr uint64_t kDirectAlignment = 4096;
constexpr uint64_t kDirectChunk = 4 << 20;

Error os_error(const std::filesystem::path& path, const char* action) {
  const int code = errno;
  return {code == ENOENT ? ErrorCode::not_found : ErrorCode::io,
          std::string(action) + " " + path.string() + ": " + std::strerror(code)};
}

Result<uint64_t> regular_file_size(int fd, const std::filesystem::path& path) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return os_error(path, "reading the size of");
  if (!S_ISREG(info.st_mode)) return Error{ErrorCode::io, path.string() + " is not a regular file"};
  return static_cast<uint64_t>(info.st_size);
}

// Reads until `out` is full or the file ends; returns the bytes read or -1.
ssize_t read_fully(int fd, uint64_t offset, std::byte* out, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = pread(fd, out + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return static_cast<ssize_t>(done);
}

bool on_procfs(const std::filesystem::path& path) {
  struct statfs info {};
  const std::filesystem::path folder = path.parent_path();
  return statfs(folder.empty() ? "." : folder.c_str(), &info) == 0 && info.f_type == PROC_SUPER_MAGIC;
}

// Where the symbolic links of a path's last part lead, there or not. Nothing where they pass /proc: an open file of
// some process (/dev/stdout is one), which a rename would not reach.
Result<std::optional<std::filesystem::path>> behind_links(const std::filesystem::path& path) {
  constexpr int kMostLinks = 40;  // Linux follows as many
  std::filesystem::path at = path;
  for (int i = 0; i < kMostLinks; ++i) {
    if (on_procfs(at)) return std::optional<std::filesystem::path>();
    std::error_code error;
    const std::filesystem::path next = std::filesystem::read_symlink(at, error);
    if (error) return std::optional(at);
    at = at.parent_path() / next;  // an absolute `next` stands for itself
  }
  errno = ELOOP;
  return os_error(path, "creating");
}

}  // namespace

Result<InputFile> InputFile::open(const std::filesystem::path& path, ReadMode mode) {
  InputFile file;
  file.path_ = path;
  if (mode == ReadMode::direct) {
    file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    file.direct_ = file.fd_ >= 0;  // tmpfs and some network file systems answer EINVAL
  }
  if (file.fd_ < 0) file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file.fd_ < 0) return os_error(path, "opening");
  TC_ASSIGN(file.size_, regular_file_size(file.fd_, path));
  if (!file.direct_) posix_fadvise(file.fd_, 0, 0, POSIX_FADV_SEQUENTIAL);  // wider read-ahead
  return file;
}

InputFile::InputFile(InputFile&& other) noexcept { *this = std::move(other); }
InputFile& InputFile::operator=(InputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(direct_, other.direct_);
  return *this;
}
InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

Status InputFile::read_at(uint64_t offset, std::span<std::byte> out) const {
  if (offset > size_ || out.size() > size_ - offset)
    return corrupt(path_.string() + " ends at byte " + std::to_string(size_) + ", before byte " +
                   std::to_string(offset + out.size()));
  if (direct_) return read_direct(offset, out);
  const ssize_t n = read_fully(fd_, offset, out.data(), out.size());
  if (n < 0) return os_error(path_, "reading");
  if (static_cast<size_t>(n) != out.size())
    return corrupt(path_.string() + " was cut short while being read, at byte " +
                   std::to_string(offset + static_cast<uint64_t>(n)));
  return {};
}

Status InputFile::read_direct(uint64_t offset, std::span<std::byte> out) const {
  const std::unique_ptr<std::byte, decltype(&std::free)> block(
      static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, kDirectChunk)), &std::free);
  for (size_t done = 0; done < out.size();) {
    const uint64_t position = offset + done, start = position / kDirectAlignment * kDirectAlignment;
    const ssize_t n = read_fully(fd_, start, block.get(), kDirectChunk);
    if (n < 0) return os_error(path_, "reading directly");
    const size_t skip = position - start;
    if (static_cast<size_t>(n) <= skip)
      return corrupt(path_.string() + " was cut short while being read, at byte " + std::to_string(position));
    const size_t take = std::min(out.size() - done, static_cast<size_t>(n) - skip);
    std::memcpy(out.data() + done, block.get() + skip, take);
    done += take;
  }
  return {};
}

Result<MappedFile> MappedFile::open(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return os_error(path, "opening");
  Result<uint64_t> size = regular_file_size(fd, path);
  MappedFile file;
  void* data = MAP_FAILED;
  if (size && *size > 0) data = mmap(nullptr, *size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int code = errno;
  ::close(fd);
  if (!size) return std::move(size).error();
  if (*size == 0) return file;
  errno = code;
  if (data == MAP_FAILED) return os_error(path, "mapping");
  file.data_ = static_cast<const std::byte*>(data);
  file.size_ = *size;
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}
MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), size_);
}

Result<OutputFile> OutputFile::create(const std::filesystem::path& path) {
  OutputFile file;
  file.path_ = path;
  struct stat info {};
  const bool exists = stat(path.c_str(), &info) == 0;
  if (!exists && errno != ENOENT) return os_error(path, "creating");
  TC_ASSIGN(const std::optional<std::filesystem::path> target, behind_links(path));
  if (exists && (!S_ISREG(info.st_mode) || !target)) {
    file.fd_ = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
    if (file.fd_ < 0) return os_error(path, "opening for writing");
    return file;
  }
  file.target_ = target.value_or(path);
  if (exists && faccessat(AT_FDCWD, file.target_.c_str(), W_OK, AT_EACCESS) != 0) return os_error(path, "replacing");
  TC_RETURN_IF_ERROR(file.create_beside());
  if (exists && fchmod(file.fd_, info.st_mode & 07777) != 0) return os_error(path, "setting the permissions of");
  return file;
}

// A name of its own, so that writers of one target do not meet; a short one, as the target's may be as long as is
// allowed.
Status OutputFile::create_beside() {
  static std::atomic<int> serial{0};
  if (!target_.has_filename()) {
    errno = EISDIR;
    return os_error(path_, "creating");
  }
  do {
    temporary_ =
        target_.parent_path() / (".part-" + std::to_string(getpid()) + "-" + std::to_string(serial.fetch_add(1)));
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EEXIST);
  if (fd_ >= 0) return {};
  temporary_.clear();
  return os_error(path_, "creating a file beside");
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, {})),
      fd_(std::exchange(other.fd_, -1)) {}
OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

Status OutputFile::make_private() {
  if (!temporary_.empty() && fchmod(fd_, 0600) != 0) return os_error(path_, "setting the permissions of");
  return {};
}

Status OutputFile::write(std::span<const std::byte> bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return os_error(path_, "writing");
    done += static_cast<size_t>(n);
  }
  return {};
}

Status OutputFile::close() {
  if (!temporary_.empty() && fsync(fd_) != 0) return os_error(path_, "writing");
  if (::close(std::exchange(fd_, -1)) != 0) return os_error(path_, "closing");
  return temporary_.empty() ? Status() : replace_target();
}

Status OutputFile::replace_target() {
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) return os_error(path_, "replacing");
  const std::filesystem::path folder = std::exchange(temporary_, {}).parent_path();
  // The new name is on the disk once its folder is. A file system that cannot tell has done what it can.
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    fsync(fd);
    ::close(fd);
  }
  return {};
}

Result<std::string> read_text_file(const std::filesystem::path& path, uint64_t limit_bytes) {
  TC_ASSIGN(const InputFile file, InputFile::open(path));
  if (file.size() > limit_bytes)
    return corrupt(path.string() + " has " + std::to_string(file.size()) + " bytes, more than the " +
                   std::to_string(limit_bytes) + " allowed");
  std::string text(file.size(), '\0');
  TC_RETURN_IF_ERROR(file.read_at(0, std::as_writable_bytes(std::span(text))));
  return text;
}

Status write_text_file(const std::filesystem::path& path, std::string_view text) {
  TC_ASSIGN(OutputFile file, OutputFile::create(path));
  TC_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(text))));
  return file.close();
}

Status write_private_file(const std::filesystem::path& path, std::string_view text) {
  TC_ASSIGN(OutputFile file, OutputFile::create(path));
  TC_RETURN_IF_ERROR(file.make_private());
  TC_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(text))));
  return file.close();
}

}  // namespace thermocline
