#include "runtime/io/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
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
  file.fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file.fd_ < 0) return os_error(path, "creating");
  return file;
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}
OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(path_.c_str());
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
  if (::close(std::exchange(fd_, -1)) != 0) return os_error(path_, "closing");
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

}  // namespace thermocline
