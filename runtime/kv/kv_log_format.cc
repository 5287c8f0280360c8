#include "runtime/kv/kv_log_format.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace thermocline {
namespace {

constexpr std::array<char, 8> kGroupMagic = {'T', 'C', 'K', 'V', 'G', 'R', 'P', '1'};
constexpr std::array<char, 8> kIndexMagic = {'T', 'C', 'K', 'V', 'I', 'D', 'X', '1'};

struct Head {
  std::array<char, 8> magic;
  KvSum sum;       // of all bytes, this one zero
  uint64_t count;  // of parts; of entries
};
struct IndexHead {
  Head head;
  uint64_t clock, segments;
};
struct IndexEntry {
  KvItemHead head;
  uint64_t bytes, saved, used;
};
static_assert(sizeof(KvItemHead) == 72 && sizeof(KvPartHead) == 104 && sizeof(KvPlace) == 32 && sizeof(Head) == 32);
static_assert(sizeof(Head) + kKvGroupParts * sizeof(KvPartHead) <= kKvBlock);

Error broken(const std::string& what) { return corrupt("the KV cache on disk: " + what); }

KvSum sum_without_sum(std::span<const std::byte> bytes) {
  XXH3_state_t* const state = XXH3_createState();
  TC_CHECK(state != nullptr);
  XXH3_128bits_reset(state);
  constexpr KvSum kNone{};
  XXH3_128bits_update(state, bytes.data(), offsetof(Head, sum));
  XXH3_128bits_update(state, kNone.data(), sizeof kNone);
  const std::span rest = bytes.subspan(offsetof(Head, sum) + sizeof kNone);
  XXH3_128bits_update(state, rest.data(), rest.size());
  const XXH128_hash_t hash = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return {hash.low64, hash.high64};
}

// Reads what was written by copying; `ok` turns false where the bytes end.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <class T>
  T take() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    if (bytes_.size() - at_ < sizeof value) {
      ok = false;
    } else {
      std::memcpy(&value, bytes_.data() + at_, sizeof value);
      at_ += sizeof value;
    }
    return value;
  }
  size_t left() const { return bytes_.size() - at_; }
  bool ok = true;

 private:
  const std::span<const std::byte> bytes_;
  size_t at_ = 0;
};

template <class T>
void put(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

bool sound(const KvItemHead& head, uint64_t bytes) {
  const bool page = head.kind == KvItemKind::page, checkpoint = head.kind == KvItemKind::checkpoint;
  return (page || checkpoint) && bytes > 0 && bytes <= kKvMostItemBytes;
}

Result<Head> check_head(std::span<const std::byte> bytes, const std::array<char, 8>& magic) {
  if (bytes.size() < sizeof(Head)) return broken("a head of " + std::to_string(bytes.size()) + " bytes");
  Head head;
  std::memcpy(&head, bytes.data(), sizeof head);
  if (head.magic != magic) return broken("a head of another kind or version");
  if (head.sum != sum_without_sum(bytes)) return broken("a head with another checksum");
  return head;
}

}  // namespace

KvSum kv_sum(std::span<const std::byte> bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.low64, hash.high64};
}

void seal(std::span<std::byte> bytes) {
  if (bytes.size() < sizeof(Head)) return;
  const KvSum sum = sum_without_sum(bytes);
  std::memcpy(bytes.data() + offsetof(Head, sum), sum.data(), sizeof sum);
}

void write_group_head(std::span<const KvPartHead> parts, std::span<std::byte, kKvBlock> block) {
  TC_CHECK(!parts.empty() && parts.size() <= kKvGroupParts);
  std::fill(block.begin(), block.end(), std::byte{0});
  const Head head{kGroupMagic, {}, parts.size()};
  std::memcpy(block.data(), &head, sizeof head);
  std::memcpy(block.data() + sizeof head, parts.data(), parts.size_bytes());
  seal(block);
}

Result<std::vector<KvPartHead>> parse_group_head(std::span<const std::byte, kKvBlock> block) {
  TC_ASSIGN(const Head head, check_head(block, kGroupMagic));
  if (head.count < 1 || head.count > kKvGroupParts)
    return broken("a group of " + std::to_string(head.count) + " parts");
  std::vector<KvPartHead> parts(head.count);
  std::memcpy(parts.data(), block.data() + sizeof head, parts.size() * sizeof(KvPartHead));
  for (const KvPartHead& part : parts)
    if (!sound(part.item, part.item_bytes) || part.part >= kv_parts(part.item_bytes) ||
        part.bytes != kv_part_bytes(part.item_bytes, part.part))
      return broken("a group with a part that no item has");
  return parts;
}

std::string write_index(const KvIndex& index) {
  std::string out;
  put(out, IndexHead{{kIndexMagic, {}, index.entries.size()}, index.clock, index.segments.size()});
  for (const KvIndex::Segment& segment : index.segments) put(out, segment);
  for (const KvEntry& entry : index.entries) {
    put(out, IndexEntry{entry.head, entry.bytes, entry.saved, entry.used});
    for (const KvPlace& place : entry.parts) put(out, place);
  }
  seal(std::as_writable_bytes(std::span(out)));
  return out;
}

Result<KvIndex> parse_index(std::string_view text) {
  const std::span bytes = std::as_bytes(std::span(text));
  TC_ASSIGN(const Head head, check_head(bytes, kIndexMagic));
  Reader reader(bytes);
  KvIndex index;
  const IndexHead begin = reader.take<IndexHead>();
  index.clock = begin.clock;
  if (begin.segments > reader.left() / sizeof(KvIndex::Segment)) return broken("an index that ends in its segments");
  for (uint64_t i = 0; i < begin.segments; ++i) {
    index.segments.push_back(reader.take<KvIndex::Segment>());
    if (i > 0 && index.segments[i].number <= index.segments[i - 1].number)
      return broken("an index with its segments out of order");
  }
  const auto inside = [&](const KvPlace& place) {
    const auto segment = std::lower_bound(index.segments.begin(), index.segments.end(), place.segment,
                                          [](const KvIndex::Segment& s, uint32_t number) { return s.number < number; });
    return segment != index.segments.end() && segment->number == place.segment && place.offset <= segment->bytes &&
           place.bytes <= segment->bytes - place.offset;
  };
  for (uint64_t i = 0; i < head.count; ++i) {
    const IndexEntry fixed = reader.take<IndexEntry>();
    if (!reader.ok || !sound(fixed.head, fixed.bytes)) return broken("an index with an entry that is no item");
    KvEntry entry{fixed.head, fixed.bytes, fixed.saved, fixed.used, {}};
    for (uint64_t part = 0; part < kv_parts(fixed.bytes); ++part) {
      const KvPlace place = reader.take<KvPlace>();
      if (!reader.ok || place.bytes != kv_part_bytes(fixed.bytes, part) || !inside(place))
        return broken("an index with a part outside of the log");
      entry.parts.push_back(place);
    }
    index.entries.push_back(std::move(entry));
  }
  if (reader.left() > 0) return broken("an index that goes on after its end");
  return index;
}

}  // namespace thermocline
