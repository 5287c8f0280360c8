// Files: whole small ones as text, big ones by positioned reads, O_DIRECT reads or a mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "runtime/base/result.h"

namespace thermocline {

enum class ReadMode {
  buffered,  // through the page cache
  direct,    // O_DIRECT: past the page cache, for checkpoints larger than RAM; falls back where the disk refuses
};

/// A file open for reading. Thread-safe: reads carry their own position.
class InputFile {
 public:
  /// Errors: not_found, io; both name the path.
  static Result<InputFile> open(const std::filesystem::path& path, ReadMode mode = ReadMode::buffered);
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&& other) noexcept;
  ~InputFile();

  const std::filesystem::path& path() const { return path_; }
  uint64_t size() const { return size_; }

  /// Fills `out` with the bytes at `offset`. Errors: corrupt when the file ends before, io.
  Status read_at(uint64_t offset, std::span<std::byte> out) const;

 private:
  InputFile() = default;
  Status read_direct(uint64_t offset, std::span<std::byte> out) const;

  std::filesystem::path path_;
  int fd_ = -1;
  uint64_t size_ = 0;
  bool direct_ = false;
};

/// A read-only mapping of a whole file.
class MappedFile {
 public:
  static Result<MappedFile> open(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile() = default;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// A file being written. Its content appears whole or not at all: it grows in a file beside the target, which close()
/// brings to the disk and renames over it; without a close() that succeeded, what was there before stays as it was. A
/// symbolic link stays and its target is replaced; permissions stay, other hard links keep the old content. What is no
/// regular file (a device, a pipe, /dev/stdout wherever it leads) is written to as it is, and never removed.
/// One thread at a time.
class OutputFile {
 public:
  /// Opening a pipe waits for its reader. Errors: not_found when the folder is missing, io; both name the path.
  static Result<OutputFile> create(const std::filesystem::path& path);
  OutputFile(OutputFile&& other) noexcept;
  ~OutputFile();
  /// Only the owner may read and write it, from now on; what is no regular file stays as it is. Errors: io.
  Status make_private();
  Status write(std::span<const std::byte> bytes);
  Status close();

 private:
  OutputFile() = default;
  Status create_beside();
  Status replace_target();

  std::filesystem::path path_;       // as given, for messages
  std::filesystem::path target_;     // what is replaced: path_ behind its links
  std::filesystem::path temporary_;  // what is written; empty when that is the target itself
  int fd_ = -1;
};

/// The whole of a text file. Errors: not_found, io, corrupt when it is larger than `limit_bytes`.
Result<std::string> read_text_file(const std::filesystem::path& path, uint64_t limit_bytes = uint64_t{1} << 30);
/// The file has this text, or what it had before (OutputFile).
Status write_text_file(const std::filesystem::path& path, std::string_view text);
/// The same, and only the owner may read it.
Status write_private_file(const std::filesystem::path& path, std::string_view text);

}  // namespace thermocline
