#include "runtime/kv/kv_log.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>

#include "runtime/base/log.h"

namespace thermocline {
namespace {

constexpr uint64_t kSegmentBytes = 256 << 20;
constexpr size_t kMostSegments = 128;           // files that are open at once
constexpr uint64_t kMostMovedBytes = 64 << 20;  // out of a file that goes
constexpr int64_t kMostSkipped = 63;
constexpr uint64_t kMostIndexBytes = uint64_t{1} << 30;

std::string segment_name(uint32_t number) {
  const std::string digits = std::to_string(number);
  return "log-" + std::string(8 - std::min<size_t>(8, digits.size()), '0') + digits;
}

std::optional<uint32_t> segment_number(const std::string& name) {
  uint32_t number = 0;
  if (name.size() < 12 || name.compare(0, 4, "log-") != 0) return {};
  const auto [end, error] = std::from_chars(name.data() + 4, name.data() + name.size(), number);
  const bool ours = error == std::errc() && end == name.data() + name.size() && number > 0 && number < 1u << 31;
  return ours && segment_name(number) == name ? std::optional(number) : std::nullopt;
}

template <class Byte>
uint64_t size_of(const Pieces<Byte>& pieces) {
  uint64_t bytes = 0;
  for (const auto& piece : pieces) bytes += piece.size();
  return bytes;
}

// Calls fn(piece's part) for the bytes [at, at + count) of all pieces together.
template <class Byte, class Fn>
void for_range(const Pieces<Byte>& pieces, uint64_t at, uint64_t count, const Fn& fn) {
  for (const std::span<Byte>& piece : pieces) {
    if (at >= piece.size()) {
      at -= piece.size();
      continue;
    }
    const uint64_t take = std::min<uint64_t>(count, piece.size() - at);
    if (take > 0) fn(piece.subspan(at, take));
    count -= take;
    at = 0;
  }
}

uint64_t round_down(uint64_t bytes) { return bytes / kKvBlock * kKvBlock; }
uint64_t round_up(uint64_t bytes) { return round_down(bytes + kKvBlock - 1); }

}  // namespace

KvLog::KvLog(std::unique_ptr<DiskFiles> files, uint64_t space_bytes)
    : files_(std::move(files)),
      space_bytes_(space_bytes - space_bytes / 32),  // the rest is the index's
      segment_bytes_(round_down(std::min(space_bytes / 8, std::max(kSegmentBytes, space_bytes / (kMostSegments / 2))))),
      writing_(DiskFiles::kDepth) {}

Result<std::unique_ptr<KvLog>> KvLog::open(std::unique_ptr<DiskFiles> files, uint64_t space_bytes) {
  if (space_bytes < kLeastSpace)
    return invalid("a KV cache on disk of " + std::to_string(space_bytes) + " bytes is less than the " +
                   std::to_string(kLeastSpace) + " that it takes: raise --kv-disk-space");
  std::unique_ptr<KvLog> log(new KvLog(std::move(files), space_bytes));
  TC_CHECK(log->slot(0).size() >= kv_group_bytes(kKvPartBytes), "a group does not fit its slot");
  TC_RETURN_IF_ERROR(log->recover());
  return log;
}

KvLog::~KvLog() {
  drain();
  write_index();
}

std::span<std::byte> KvLog::slot(ptrdiff_t number) const {
  const std::span<std::byte> all = files_->buffer();
  const uint64_t bytes = round_down(all.size() / DiskFiles::kDepth);
  return all.subspan(static_cast<size_t>(number) * bytes, bytes);
}

const KvLog::Segment* KvLog::segment(uint32_t number) const {
  for (const Segment& s : segments_)
    if (s.number == number) return &s;
  return nullptr;
}

// Said when it begins; those after it are counted.
void KvLog::failed(const std::string& what) {
  {
    const std::lock_guard lock(mutex_);
    ++stats_.io_errors;
  }
  if (!std::exchange(failing_, true)) log_warn("the KV cache on disk: {}; what it does not hold is computed", what);
}

void KvLog::count_bytes() {
  int64_t bytes = 0;
  for (const Segment& s : segments_) bytes += static_cast<int64_t>(s.bytes);
  const std::lock_guard lock(mutex_);
  stats_.bytes = bytes;
}

// --- what is there ---

Status KvLog::recover() {
  TC_ASSIGN(std::vector<std::string> names, files_->list());
  std::vector<uint32_t> numbers;
  for (const std::string& name : names)
    if (const auto number = segment_number(name)) numbers.push_back(*number);
  std::sort(numbers.begin(), numbers.end());
  for (const uint32_t number : numbers) {
    next_segment_ = number + 1;
    const Result<int> file = files_->open_file(segment_name(number), false);
    const Result<uint64_t> bytes = file ? files_->size(*file) : Result<uint64_t>(file.error());
    if (!bytes || *bytes < kKvBlock) {
      if (file) files_->close_file(*file);
      if (bytes)
        (void)files_->remove(segment_name(number));
      else
        failed(bytes.error().message);
      continue;
    }
    segments_.push_back({number, *file, round_down(*bytes), true});
  }
  recover_from_index();
  while (!segments_.empty()) {  // the cap may be lower than it was
    uint64_t bytes = 0;
    for (const Segment& s : segments_) bytes += s.bytes;
    if (bytes <= space_bytes_) break;
    (void)drop_oldest(0);
  }
  partial_.clear();
  count_bytes();
  return {};
}

// What the index names, and behind it what was written since.
void KvLog::recover_from_index() {
  KvIndex index;
  if (const Result<std::string> bytes = files_->read_small("index", kMostIndexBytes)) {
    if (Result<KvIndex> parsed = parse_index(*bytes))
      index = std::move(*parsed);
    else
      log_warn("{}; the log is read instead", parsed.error().message);
  } else if (bytes.error().code != ErrorCode::not_found) {
    log_warn("the KV cache on disk: {}; the log is read instead", bytes.error().message);
  }
  clock_ = std::max(clock_, index.clock);
  std::unordered_map<uint32_t, uint64_t> known;  // bytes that the index speaks of
  for (const KvIndex::Segment& s : index.segments) {
    const Segment* const here = segment(s.number);
    if (here && here->bytes >= s.bytes) known.emplace(s.number, s.bytes);
  }
  for (KvEntry& entry : index.entries)
    if (std::all_of(entry.parts.begin(), entry.parts.end(),
                    [&](const KvPlace& place) { return known.count(place.segment) > 0; })) {
      const std::lock_guard lock(mutex_);
      const PrefixName name = entry.head.name;
      const auto [at, is_new] = entries_.emplace(name, std::move(entry));
      if (is_new && at->second.head.kind == KvItemKind::checkpoint)
        checkpoints_[at->second.head.parent].push_back(name);
    }
  for (const Segment& s : segments_) {
    const auto from = known.find(s.number);
    scan(s, from == known.end() ? 0 : from->second);
  }
}

// Takes in the groups from an offset on, up to the first that is none.
void KvLog::scan(const Segment& s, uint64_t from) {
  while (from + kKvBlock <= s.bytes) {
    const std::span<std::byte> block = slot(0).first(kKvBlock);
    files_->submit({.file = s.file, .offset = from, .data = block});
    if (const int error = files_->wait().error; error != 0)
      return failed("reading " + segment_name(s.number) + ": " + std::strerror(error));
    const auto parts = parse_group_head(std::span<const std::byte, kKvBlock>(block.data(), kKvBlock));
    if (!parts) return;
    uint64_t offset = from + kKvBlock;
    for (const KvPartHead& part : *parts) {
      if (offset + part.bytes > s.bytes) return;
      insert_part(part, {s.number, part.bytes, offset, part.sum});
      offset += part.bytes;
    }
    from = round_up(offset);
  }
}

// An item is there with its last part.
void KvLog::insert_part(const KvPartHead& part, const KvPlace& place) {
  const std::lock_guard lock(mutex_);
  const PrefixName& name = part.item.name;
  if (entries_.count(name) > 0) return;
  KvEntry& entry = partial_[name];
  if (entry.parts.empty() || entry.bytes != part.item_bytes || !(entry.head == part.item)) {
    entry = {part.item, part.item_bytes, clock_, clock_, {}};
    entry.parts.resize(kv_parts(part.item_bytes));
  }
  entry.parts[part.part] = place;
  if (std::any_of(entry.parts.begin(), entry.parts.end(), [](const KvPlace& p) { return p.segment == 0; })) return;
  if (entry.head.kind == KvItemKind::checkpoint) checkpoints_[entry.head.parent].push_back(name);
  entries_.emplace(name, std::move(entry));
  partial_.erase(name);
}

bool KvLog::has(const PrefixName& name) const {
  const std::lock_guard lock(mutex_);
  return entries_.count(name) > 0;
}

std::vector<KvLog::Tail> KvLog::checkpoints(const PrefixName& parent) const {
  const std::lock_guard lock(mutex_);
  std::vector<Tail> tails;
  const auto found = checkpoints_.find(parent);
  if (found == checkpoints_.end()) return tails;
  for (const PrefixName& name : found->second) {
    const auto entry = entries_.find(name);
    if (entry != entries_.end())
      tails.push_back({name, entry->second.head.tail_tokens, static_cast<int64_t>(entry->second.bytes)});
  }
  return tails;
}

KvLogStats KvLog::stats() const {
  const std::lock_guard lock(mutex_);
  KvLogStats stats = stats_;
  stats.items = static_cast<int64_t>(entries_.size());
  return stats;
}

void KvLog::touch(std::span<const PrefixName> names) {
  const std::lock_guard lock(mutex_);
  ++clock_;
  for (const PrefixName& name : names)
    if (const auto found = entries_.find(name); found != entries_.end()) found->second.used = clock_;
}

void KvLog::erase(const PrefixName& name) {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  if (found->second.head.kind == KvItemKind::checkpoint) {
    const auto siblings = checkpoints_.find(found->second.head.parent);
    if (siblings != checkpoints_.end()) std::erase(siblings->second, name);
    if (siblings != checkpoints_.end() && siblings->second.empty()) checkpoints_.erase(siblings);
  }
  entries_.erase(found);
}

void KvLog::forget_segment(uint32_t number) {
  std::vector<PrefixName> gone;
  {
    const std::lock_guard lock(mutex_);
    const auto there = [&](const KvPlace& place) { return place.segment == number; };
    for (const auto& [name, entry] : entries_)
      if (std::any_of(entry.parts.begin(), entry.parts.end(), there)) gone.push_back(name);
    std::erase_if(partial_, [&](const auto& item) {
      return std::any_of(item.second.parts.begin(), item.second.parts.end(), there);
    });
    stats_.dropped_items += static_cast<int64_t>(gone.size());
  }
  for (const PrefixName& name : gone) erase(name);
}

void KvLog::write_index() {
  KvIndex index;
  for (const Segment& s : segments_) index.segments.push_back({s.number, 0, s.bytes});
  {
    const std::lock_guard lock(mutex_);
    index.clock = clock_;
    for (const auto& [name, entry] : entries_) index.entries.push_back(entry);
  }
  if (!segments_.empty()) (void)files_->sync(segments_.back().file);
  if (const Status written = files_->replace_small("index", thermocline::write_index(index)); !written.ok())
    failed(written.error().message);
}

// --- writing ---

void KvLog::append(std::span<const KvItem> items) {
  if (skip_ > 0) {
    --skip_;
    return;
  }
  write(items);
}

void KvLog::write(std::span<const KvItem> items) {
  Writing* group = nullptr;  // that takes more parts
  for (const KvItem& item : items) {
    const uint64_t bytes = size_of(item.bytes);
    TC_CHECK(bytes > 0 && bytes <= kKvMostItemBytes, "no such KV item");
    if (has(item.head.name)) continue;
    for (uint64_t part = 0; part < kv_parts(bytes); ++part) {
      if (group && (group->parts.size() == kKvGroupParts ||
                    kv_group_bytes(group->bytes + kv_part_bytes(bytes, part)) > slot(0).size())) {
        submit(*group);
        group = nullptr;
      }
      if (!group) {
        if (!make_room()) return;
        group = &free_slot();
      }
      add_part(*group, item, bytes, part);
    }
  }
  if (group) submit(*group);
}

KvLog::Writing& KvLog::free_slot() {
  for (;;) {
    for (Writing& group : writing_)
      if (!group.busy) {
        group = {};
        return group;
      }
    finish(files_->wait());
  }
}

void KvLog::add_part(Writing& group, const KvItem& item, uint64_t bytes, uint64_t part) {
  std::byte* const begin = slot(&group - writing_.data()).data() + kKvBlock + group.bytes;
  const uint64_t count = kv_part_bytes(bytes, part);
  std::byte* to = begin;
  for_range(item.bytes, part * kKvPartBytes, count, [&](std::span<const std::byte> piece) {
    std::memcpy(to, piece.data(), piece.size());
    to += piece.size();
  });
  group.parts.push_back(
      {item.head, bytes, static_cast<uint32_t>(part), static_cast<uint32_t>(count), kv_sum(std::span(begin, count))});
  group.bytes += count;
}

void KvLog::submit(Writing& group) {
  const auto number = static_cast<uint64_t>(&group - writing_.data());
  const uint64_t bytes = kv_group_bytes(group.bytes);
  const std::span<std::byte> data = slot(static_cast<ptrdiff_t>(number)).first(bytes);
  write_group_head(group.parts, data.first<kKvBlock>());
  std::memset(data.data() + kKvBlock + group.bytes, 0, bytes - kKvBlock - group.bytes);
  Segment& end = segments_.back();
  group.busy = true;
  group.segment = end.number;
  group.offset = end.bytes;
  end.bytes += bytes;
  files_->submit({.file = end.file, .write = true, .offset = group.offset, .data = data, .tag = number});
}

void KvLog::finish(const DiskFiles::Done& done) {
  Writing& group = writing_[done.tag];
  group.busy = false;
  if (done.error != 0) {
    crowded_ = done.error == ENOSPC || done.error == EDQUOT;
    back_off();
    return failed("writing " + segment_name(group.segment) + ": " + std::strerror(done.error));
  }
  failing_ = false;
  failures_ = 0;
  for (Segment& s : segments_) s.holds = s.holds || s.number == group.segment;
  uint64_t offset = group.offset + kKvBlock;
  for (const KvPartHead& part : group.parts) {
    insert_part(part, {group.segment, part.bytes, offset, part.sum});
    offset += part.bytes;
  }
  const std::lock_guard lock(mutex_);
  stats_.saved_bytes += static_cast<int64_t>(group.bytes);
}

void KvLog::drain() {
  while (std::any_of(writing_.begin(), writing_.end(), [](const Writing& group) { return group.busy; }))
    finish(files_->wait());
  count_bytes();
}

// The last file takes a group more, or a new one does. False where nothing can be written now.
bool KvLog::make_room() {
  if (writable_ && segments_.back().bytes + slot(0).size() <= segment_bytes_) return true;
  if (moving_) return false;
  drain();
  writable_ = false;
  if (!segments_.empty() && !segments_.back().holds) {
    remove(segments_.back());
    segments_.pop_back();
  }
  Survivors survivors;
  uint64_t bytes = 0, most = std::min(segment_bytes_ / 4, kMostMovedBytes);
  for (const Segment& s : segments_) bytes += s.bytes;
  while (!segments_.empty() &&
         (crowded_ || bytes + segment_bytes_ > space_bytes_ || segments_.size() >= kMostSegments)) {
    crowded_ = false;
    bytes -= segments_.front().bytes;
    for (auto& survivor : drop_oldest(most)) {
      most -= survivor.second.size();
      survivors.push_back(std::move(survivor));
    }
  }
  write_index();
  const std::string name = segment_name(next_segment_);
  const Result<int> file = files_->open_file(name, true);
  ++next_segment_;  // whatever lies there if it failed
  if (!file) {
    back_off();
    failed(file.error().message);
    return false;
  }
  segments_.push_back({next_segment_ - 1, *file, 0, false});
  writable_ = true;
  std::vector<KvItem> items;
  for (const auto& [head, moved] : survivors) items.push_back({head, {std::span(moved)}});
  moving_ = true;
  write(items);
  drain();
  moving_ = false;
  return writable_;
}

// Nothing is tried for a while, longer with each failure; and what follows a hole is not found again.
void KvLog::back_off() {
  writable_ = false;
  skip_ = failures_ = std::min<int64_t>(kMostSkipped, failures_ * 2 + 1);
}

// What somebody touched since it was saved is handed out, up to a number of bytes; the rest is gone.
KvLog::Survivors KvLog::drop_oldest(uint64_t most_bytes) {
  const Segment oldest = segments_.front();
  Survivors survivors;
  std::vector<KvRead> reads;
  {
    const std::lock_guard lock(mutex_);
    std::vector<const KvEntry*> touched;
    for (const auto& [name, entry] : entries_)
      if (entry.used > entry.saved && entry.parts[0].segment == oldest.number) touched.push_back(&entry);
    std::sort(touched.begin(), touched.end(), [](const KvEntry* a, const KvEntry* b) { return a->used > b->used; });
    for (const KvEntry* const entry : touched) {
      if (entry->bytes > most_bytes) break;
      most_bytes -= entry->bytes;
      survivors.emplace_back(entry->head, std::vector<std::byte>(entry->bytes));
    }
  }
  for (auto& [head, bytes] : survivors) reads.push_back({head.name, {std::span(bytes)}});
  read(reads);
  for (size_t i = survivors.size(); i-- > 0;)
    if (!reads[i].ok) survivors.erase(survivors.begin() + static_cast<std::ptrdiff_t>(i));
  segments_.pop_front();
  remove(oldest);
  return survivors;
}

void KvLog::remove(const Segment& s) {
  forget_segment(s.number);
  files_->close_file(s.file);
  if (const Status removed = files_->remove(segment_name(s.number)); !removed.ok()) failed(removed.error().message);
}

// --- reading ---

/// A part that is wanted: whose, and where its bytes begin in it.
struct KvLog::Wanted {
  size_t read = 0;
  uint64_t at = 0;
  KvPlace place;
};

// Parts by where they lie; names that are not there fail at once.
std::vector<KvLog::Wanted> KvLog::wanted(std::span<KvRead> reads) const {
  std::vector<Wanted> parts;
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < reads.size(); ++i) {
    const auto found = entries_.find(reads[i].name);
    reads[i].ok = found != entries_.end() && found->second.bytes == size_of(reads[i].to);
    if (!reads[i].ok) continue;
    for (size_t part = 0; part < found->second.parts.size(); ++part)
      parts.push_back({i, part * kKvPartBytes, found->second.parts[part]});
  }
  std::sort(parts.begin(), parts.end(), [](const Wanted& a, const Wanted& b) {
    return std::pair(a.place.segment, a.place.offset) < std::pair(b.place.segment, b.place.offset);
  });
  return parts;
}

// Neighbours are read together, as many as a slot holds.
std::vector<KvLog::Run> KvLog::runs_of(std::span<const Wanted> parts) const {
  std::vector<Run> runs;
  for (size_t i = 0; i < parts.size(); ++i) {
    const KvPlace& place = parts[i].place;
    const uint64_t begin = round_down(place.offset), end = round_up(place.offset + place.bytes);
    if (!runs.empty()) {
      Run& last = runs.back();
      if (last.segment == place.segment && begin <= last.end + kKvBlock && end - last.begin <= slot(0).size()) {
        last.end = std::max(last.end, end);
        last.last_part = i + 1;
        continue;
      }
    }
    runs.push_back({place.segment, begin, end, i, i + 1});
  }
  return runs;
}

void KvLog::read(std::span<KvRead> reads) {
  drain();
  const std::vector<Wanted> parts = wanted(reads);
  const std::vector<Run> runs = runs_of(parts);
  std::vector<size_t> free, running(DiskFiles::kDepth);  // slots; the run in each
  for (size_t i = 0; i < DiskFiles::kDepth; ++i) free.push_back(i);
  int64_t corrupt = 0;
  for (size_t next = 0; next < runs.size() || free.size() < DiskFiles::kDepth;) {
    if (next < runs.size() && !free.empty()) {
      const Run& run = runs[next];
      const size_t at = free.back();
      free.pop_back();
      running[at] = next++;
      files_->submit({.file = segment(run.segment)->file,
                      .offset = run.begin,
                      .data = slot(static_cast<ptrdiff_t>(at)).first(run.end - run.begin),
                      .tag = at});
      continue;
    }
    const DiskFiles::Done done = files_->wait();
    const Run& run = runs[running[done.tag]];
    if (done.error != 0) failed("reading " + segment_name(run.segment) + ": " + std::strerror(done.error));
    for (size_t i = run.first_part; i < run.last_part; ++i) {
      const Wanted& part = parts[i];
      const std::span bytes =
          slot(static_cast<ptrdiff_t>(done.tag)).subspan(part.place.offset - run.begin, part.place.bytes);
      KvRead& read = reads[part.read];
      const bool sound = done.error == 0 && kv_sum(bytes) == part.place.sum;
      if (done.error == 0 && !sound && read.ok) ++corrupt;
      read.ok = read.ok && sound;
      const std::byte* from = bytes.data();
      if (read.ok)
        for_range(read.to, part.at, part.place.bytes, [&](std::span<std::byte> piece) {
          std::memcpy(piece.data(), from, piece.size());
          from += piece.size();
        });
    }
    free.push_back(done.tag);
  }
  count_read(reads, corrupt);
}

// What could not be read is not there any more.
void KvLog::count_read(std::span<const KvRead> reads, int64_t corrupt) {
  if (corrupt > 0)
    log_warn("the KV cache on disk: {} items have other bytes than were saved; they are computed", corrupt);
  int64_t bytes = 0;
  for (const KvRead& read : reads) {
    if (read.ok)
      bytes += static_cast<int64_t>(size_of(read.to));
    else
      erase(read.name);
  }
  const std::lock_guard lock(mutex_);
  stats_.corrupt_items += corrupt;
  stats_.read_bytes += bytes;
}

}  // namespace thermocline
