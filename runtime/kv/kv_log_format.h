// The bytes of a KvLog on the disk: the block at the head of a group of parts, and the index (docs/kv.md). Numbers are
// little-endian; every block of them carries an XXH3-128 of itself.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/kv/prefix_keys.h"

namespace thermocline {

inline constexpr uint64_t kKvBlock = 4096;
inline constexpr uint64_t kKvPartBytes = 1 << 20;      // an item of more bytes is several parts
inline constexpr uint64_t kKvMostItemBytes = 1 << 30;  // no page and no checkpoint comes near

enum class KvItemKind : uint32_t { page = 1, checkpoint = 2 };

/// What an item is, beside its bytes.
struct KvItemHead {
  PrefixName name{};
  PrefixName parent{};  // of a checkpoint: the name of its whole pages
  KvItemKind kind = KvItemKind::page;
  uint32_t tail_tokens = 0;  // of a checkpoint: its tokens behind those
  bool operator==(const KvItemHead&) const = default;
};

using KvSum = std::array<uint64_t, 2>;
KvSum kv_sum(std::span<const std::byte> bytes);

constexpr uint64_t kv_parts(uint64_t item_bytes) { return (item_bytes + kKvPartBytes - 1) / kKvPartBytes; }
constexpr uint64_t kv_part_bytes(uint64_t item_bytes, uint64_t part) {
  const uint64_t left = item_bytes - part * kKvPartBytes;
  return left < kKvPartBytes ? left : kKvPartBytes;
}

/// A part as the head of its group names it. Parts follow the head one after the other, without gaps.
struct KvPartHead {
  KvItemHead item;
  uint64_t item_bytes = 0;
  uint32_t part = 0, bytes = 0;
  KvSum sum{};
};
inline constexpr size_t kKvGroupParts = 39;  // as many as a block names

/// Bytes of a group with these bytes of parts: whole blocks.
constexpr uint64_t kv_group_bytes(uint64_t parts) { return kKvBlock + (parts + kKvBlock - 1) / kKvBlock * kKvBlock; }
void write_group_head(std::span<const KvPartHead> parts, std::span<std::byte, kKvBlock> block);
/// Errors: corrupt for a block that no write_group_head made.
Result<std::vector<KvPartHead>> parse_group_head(std::span<const std::byte, kKvBlock> block);

/// Where a part lies.
struct KvPlace {
  uint32_t segment = 0, bytes = 0;
  uint64_t offset = 0;
  KvSum sum{};
};
struct KvEntry {
  KvItemHead head;
  uint64_t bytes = 0;
  uint64_t saved = 0, used = 0;  // by the log's clock of operations
  std::vector<KvPlace> parts;
};
struct KvIndex {
  struct Segment {
    uint32_t number = 0, unused = 0;
    uint64_t bytes = 0;
  };
  uint64_t clock = 0;
  std::vector<Segment> segments;  // by rising number
  std::vector<KvEntry> entries;
};
std::string write_index(const KvIndex& index);
/// Errors: corrupt, also for parts outside their segments.
Result<KvIndex> parse_index(std::string_view bytes);

/// Sets the checksum of a group's head or an index to what its other bytes ask for: for tests, which change those.
void seal(std::span<std::byte> bytes);

}  // namespace thermocline
