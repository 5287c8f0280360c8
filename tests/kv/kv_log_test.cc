// KV on a disk: what is saved is read back, by a later process too; and whatever a disk can do to it ends in a miss,
// never in other bytes.
#include "runtime/kv/kv_log.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <random>
#include <thread>

#include "runtime/kv/nvme_tier.h"
#include "tests/support/faulty_files.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

using test::DiskFaults;
using test::FaultyFiles;

PrefixName name_of(uint64_t number) {
  PrefixName name{};
  std::memcpy(name.data() + 5, &number, sizeof number);
  name[0] = static_cast<uint8_t>(number);
  return name;
}

std::vector<std::byte> bytes_of(uint64_t number, size_t count) {
  std::vector<std::byte> bytes(count);
  uint64_t x = number + 1;
  for (size_t i = 0; i < count; i += sizeof x) {
    x = x * 6364136223846793005 + 1442695040888963407;
    std::memcpy(bytes.data() + i, &x, std::min(sizeof x, count - i));
  }
  return bytes;
}

size_t size_of(uint64_t number) { return number % 7 == 3 ? (5 << 20) / 2 + number : 20'000 + 97 * number % 5000; }

/// A log in a folder, with the numbers of the items that a test has saved.
class KvLogs : public testing::TestWithParam<bool> {
 protected:
  KvLogs() { chmod(dir.path().c_str(), 0700); }
  std::unique_ptr<KvLog> open(uint64_t space = 256 << 20) {
    return KvLog::open(std::make_unique<FaultyFiles>(dir.path(), faults, GetParam()), space).value();
  }
  static void save(KvLog& log, uint64_t first, uint64_t last) {
    std::vector<std::vector<std::byte>> bytes;
    std::vector<KvItem> items;
    for (uint64_t i = first; i < last; ++i) {
      const std::vector<std::byte>& b = bytes.emplace_back(bytes_of(i, size_of(i)));
      const std::span<const std::byte> all = b;
      items.push_back({{.name = name_of(i), .parent = name_of(i / 2)}, {all.first(11), all.subspan(11)}});
      if (i % 5 == 4) {
        items.back().head.kind = KvItemKind::checkpoint;
        items.back().head.tail_tokens = static_cast<uint32_t>(i % 256);
      }
    }
    log.append(items);
    log.drain();
  }
  /// Reads all numbers at once; those that come have the bytes that were saved. How many came.
  static int64_t check(KvLog& log, uint64_t first, uint64_t last) {
    std::vector<std::vector<std::byte>> got;
    std::vector<KvRead> reads;
    for (uint64_t i = first; i < last; ++i) {
      std::vector<std::byte>& to = got.emplace_back(size_of(i));
      reads.push_back({name_of(i), {std::span(to).first(7), std::span(to).subspan(7)}});
    }
    log.read(reads);
    int64_t came = 0;
    for (uint64_t i = first; i < last; ++i) {
      if (!reads[i - first].ok) {
        EXPECT_FALSE(log.has(name_of(i))) << i;
        continue;
      }
      ++came;
      EXPECT_TRUE(got[i - first] == bytes_of(i, size_of(i))) << i;
    }
    return came;
  }
  std::filesystem::path segment(int number) const { return dir.path() / ("log-0000000" + std::to_string(number)); }

  test::TempDir dir;
  DiskFaults faults;
};
INSTANTIATE_TEST_SUITE_P(Io, KvLogs, testing::Bool(), [](const auto& i) { return i.param ? "io_uring" : "threads"; });

TEST_P(KvLogs, ReadsBackWhatWasSaved) {
  const auto log = open();
  save(*log, 0, 100);
  EXPECT_EQ(check(*log, 0, 100), 100);
  EXPECT_EQ(check(*log, 100, 110), 0);
  EXPECT_EQ(log->stats().items, 100);
  const int64_t saved = log->stats().saved_bytes;
  save(*log, 0, 100);
  EXPECT_EQ(log->stats().saved_bytes, saved) << "what is there is not written again";
  const auto tails = log->checkpoints(name_of(2));
  ASSERT_EQ(tails.size(), 1u);
  EXPECT_EQ(tails[0].name, name_of(4));
  EXPECT_EQ(tails[0].tokens, 4);
  EXPECT_EQ(tails[0].bytes, static_cast<int64_t>(size_of(4)));
}

TEST_P(KvLogs, ALaterProcessFindsIt) {
  {
    const auto log = open();
    save(*log, 0, 60);
  }
  {
    const auto log = open();
    EXPECT_EQ(check(*log, 0, 60), 60);
    save(*log, 60, 90);
  }
  const auto log = open();
  EXPECT_EQ(check(*log, 0, 90), 90);
  EXPECT_EQ(log->checkpoints(name_of(2)).size(), 1u);
}

// A process that was killed wrote no index: the log itself says what it holds, alone or behind an older index.
TEST_P(KvLogs, WithoutItsIndexTheLogIsRead) {
  {
    const auto log = open();
    save(*log, 0, 40);
  }
  std::filesystem::copy_file(dir.path() / "index", dir.path() / "older");
  {
    const auto log = open();
    save(*log, 40, 80);
  }
  std::filesystem::rename(dir.path() / "older", dir.path() / "index");
  EXPECT_EQ(check(*open(), 0, 80), 80);
  std::filesystem::remove(dir.path() / "index");
  EXPECT_EQ(check(*open(), 0, 80), 80);
}

TEST_P(KvLogs, ACutLogHoldsWhatIsBeforeTheCut) {
  {
    const auto log = open();
    for (uint64_t i = 0; i < 80; i += 10) save(*log, i, i + 10);
  }
  const auto whole = std::filesystem::file_size(segment(1));
  std::filesystem::remove(dir.path() / "index");
  int64_t before = 80;
  for (const uint64_t cut : {whole - 1, whole / 2, whole / 2 - 4096, uint64_t{4097}, uint64_t{4096}, uint64_t{1}}) {
    std::filesystem::resize_file(segment(1), cut);
    faults.no_replace = true;  // the index stays away
    const int64_t came = check(*open(), 0, 80);
    EXPECT_LE(came, before) << cut;
    EXPECT_TRUE(cut < 8192 || came > 0) << cut;
    before = came;
  }
  EXPECT_EQ(before, 0);
}

// With the index, which names what is cut off.
TEST_P(KvLogs, AnIndexIsNotBelieved) {
  {
    const auto log = open();
    for (uint64_t i = 0; i < 80; i += 10) save(*log, i, i + 10);
  }
  std::filesystem::resize_file(segment(1), std::filesystem::file_size(segment(1)) / 2);
  const int64_t half = check(*open(), 0, 80);
  EXPECT_GT(half, 0);
  EXPECT_LT(half, 80);
  std::filesystem::remove(segment(1));
  EXPECT_EQ(check(*open(), 0, 80), 0);
}

TEST_P(KvLogs, AFlippedBitIsAMiss) {
  {
    const auto log = open();
    save(*log, 0, 60);
  }
  const auto bytes = std::filesystem::file_size(segment(1));
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    const auto at = static_cast<std::streamoff>(random() % bytes);
    std::fstream file(segment(1), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(at);
    const char byte = static_cast<char>(file.get() ^ (1 << random() % 8));
    file.seekp(at);
    file.put(byte);
  }
  const auto log = open();
  const int64_t came = check(*log, 0, 60);
  EXPECT_LT(came, 60);
  EXPECT_GT(came, 30);
  EXPECT_EQ(log->stats().corrupt_items, 60 - came);
}

TEST_P(KvLogs, AnotherFileInItsPlaceIsAMiss) {
  {
    const auto log = open();
    save(*log, 0, 40);
  }
  const auto bytes = std::filesystem::file_size(segment(1));
  std::ofstream(segment(1), std::ios::binary) << std::string(bytes, 'x');
  std::ofstream(dir.path() / "log-00000007") << "nonsense";
  std::ofstream(dir.path() / "log-99999999999") << "nonsense";
  std::ofstream(dir.path() / "log-x") << "nonsense";
  EXPECT_EQ(check(*open(), 0, 40), 0);
  const auto log = open();
  save(*log, 0, 40);
  EXPECT_EQ(check(*log, 0, 40), 40) << "and what is saved now is there";
}

TEST_P(KvLogs, AnIndexOfNonsenseIsNotUsed) {
  {
    const auto log = open();
    save(*log, 0, 40);
  }
  for (const char* text : {"", "x", "TCKVIDX1"}) {
    std::ofstream(dir.path() / "index", std::ios::trunc) << text;
    EXPECT_EQ(check(*open(), 0, 40), 40);
  }
}

TEST_P(KvLogs, StaysWithinItsSpace) {
  const uint64_t space = 64 << 20;
  const auto log = open(space);
  for (uint64_t i = 0; i < 400; i += 20) {
    save(*log, i, i + 20);
    uint64_t bytes = 0;
    for (const auto& file : std::filesystem::directory_iterator(dir.path())) bytes += file.file_size();
    EXPECT_LE(bytes, space);
    EXPECT_GE(static_cast<int64_t>(bytes), log->stats().bytes);
  }
  EXPECT_GT(log->stats().dropped_items, 0);
  EXPECT_EQ(check(*log, 390, 400), 10) << "the latest are there";
  EXPECT_EQ(check(*log, 0, 10), 0) << "the oldest are not";
}

TEST_P(KvLogs, WhatIsTouchedStays) {
  const auto log = open(64 << 20);
  save(*log, 0, 3);
  const std::vector<PrefixName> used = {name_of(0), name_of(2)};
  for (uint64_t i = 10; i < 500; i += 10) {
    save(*log, i, i + 10);
    log->touch(used);
  }
  EXPECT_TRUE(log->has(name_of(0)));
  EXPECT_FALSE(log->has(name_of(1)));
  EXPECT_EQ(check(*log, 2, 3), 1);
}

TEST_P(KvLogs, ADiskThatRefusesWritesIsAMiss) {
  for (const int error : {ENOSPC, EIO}) {
    const auto log = open();
    const uint64_t base = error == EIO ? 1000 : 0;
    save(*log, base, base + 10);
    faults.error = [&](const DiskFiles::Op& op) { return op.write ? error : 0; };
    save(*log, base + 10, base + 20);
    EXPECT_GT(log->stats().io_errors, 0);
    EXPECT_EQ(check(*log, base + 10, base + 20), 0);
    EXPECT_EQ(check(*log, base, base + 10), 10);
    faults.error = nullptr;
    for (int i = 0; i < 4; ++i) save(*log, base + 20, base + 30);  // it does not try again at once
    EXPECT_EQ(check(*log, base + 20, base + 30), 10);
  }
  EXPECT_GE(check(*open(), 0, 30), 10);
}

TEST_P(KvLogs, ADiskThatFailsNowAndThen) {
  std::mt19937 random(3);
  faults.error = [&](const DiskFiles::Op& op) { return random() % 5 == 0 ? (op.write ? ENOSPC : EIO) : 0; };
  {
    const auto log = open(64 << 20);
    for (uint64_t i = 0; i < 300; i += 10) {
      save(*log, i, i + 10);
      (void)check(*log, i / 2, i / 2 + 10);
    }
  }
  faults.error = nullptr;
  const auto log = open(64 << 20);
  (void)check(*log, 0, 300);
  save(*log, 300, 310);
  EXPECT_EQ(check(*log, 300, 310), 10);
}

// A write that reaches the disk in part, or not at all, and says otherwise.
TEST_P(KvLogs, TornWritesAreMisses) {
  std::mt19937 random(5);
  faults.damage = [&](std::span<std::byte> data) {
    if (random() % 2 == 0)
      std::fill(data.begin() + static_cast<ptrdiff_t>(random() % data.size()), data.end(), std::byte{});
  };
  {
    const auto log = open();
    for (uint64_t i = 0; i < 80; i += 8) save(*log, i, i + 8);
    EXPECT_LT(check(*log, 0, 80), 80);
  }
  std::filesystem::remove(dir.path() / "index");
  (void)check(*open(), 0, 80);
}

TEST_P(KvLogs, AFolderThatTakesNoFilesIsAMiss) {
  faults.no_new_files = faults.no_replace = true;
  const auto log = open();
  save(*log, 0, 10);
  EXPECT_EQ(check(*log, 0, 10), 0);
  EXPECT_GT(log->stats().io_errors, 0);
}

TEST_P(KvLogs, FilesThatAreDeletedWhileOpenAreReadToTheEnd) {
  const auto log = open(64 << 20);
  save(*log, 0, 40);
  for (const auto& file : std::filesystem::directory_iterator(dir.path())) std::filesystem::remove(file);
  (void)check(*log, 0, 40);
  for (uint64_t i = 100; i < 400; i += 20) save(*log, i, i + 20);
  EXPECT_EQ(check(*log, 390, 400), 10);
}

TEST(DiskFiles, RefusesFoldersThatOthersSee) {
  const test::TempDir dir;
  const auto refusal = [](const std::filesystem::path& folder) {
    const auto files = DiskFiles::open(folder, {});
    return files ? "" : files.error().message;
  };
  EXPECT_EQ(refusal(dir.path() / "new"), "");
  struct stat info {};
  ASSERT_EQ(stat((dir.path() / "new").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  chmod((dir.path() / "new").c_str(), 0750);
  EXPECT_NE(refusal(dir.path() / "new").find("chmod 700"), std::string::npos);
  chmod((dir.path() / "new").c_str(), 0700);
  std::filesystem::create_directory_symlink(dir.path() / "new", dir.path() / "link");
  EXPECT_NE(refusal(dir.path() / "link").find("symbolic link"), std::string::npos);
  EXPECT_NE(refusal(dir.path() / "link/").find("symbolic link"), std::string::npos);
  std::ofstream(dir.path() / "file") << "x";
  EXPECT_NE(refusal(dir.path() / "file"), "");
  EXPECT_NE(refusal(dir.path() / "no" / "parent").find("cannot be made"), std::string::npos);
}

TEST(DiskFiles, LinksInTheFolderAreNotFollowed) {
  const test::TempDir dir;
  const auto files = DiskFiles::open(dir.path() / "kv", {}).value();
  std::ofstream(dir.path() / "victim") << "precious";
  std::filesystem::create_symlink(dir.path() / "victim", dir.path() / "kv" / "log-00000001");
  std::filesystem::create_symlink(dir.path() / "victim", dir.path() / "kv" / "index.new");
  EXPECT_FALSE(files->open_file("log-00000001", false));
  EXPECT_FALSE(files->open_file("log-00000001", true));
  EXPECT_FALSE(files->read_small("log-00000001", 100));
  EXPECT_TRUE(files->replace_small("index", "new").ok());
  EXPECT_EQ(read_text_file(dir.path() / "victim").value(), "precious");
  EXPECT_EQ(files->read_small("index", 100).value(), "new");
  struct stat info {};
  ASSERT_EQ(stat((dir.path() / "kv" / "index").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

// What `kind` of files write and read back; no more where they do not.
std::string kind_that_works(const std::filesystem::path& folder) {
  const auto files = DiskFiles::open(folder, {});
  if (!files) return files.error().message;
  const int file = (*files)->open_file("log-00000001", true).value();
  const std::span<std::byte> block = (*files)->buffer().first(4096);
  const std::vector<std::byte> bytes = bytes_of(1, block.size());
  std::ranges::copy(bytes, block.begin());
  (*files)->submit({.file = file, .write = true, .offset = 0, .data = block, .tag = 1});
  EXPECT_EQ((*files)->wait().error, 0);
  std::ranges::fill(block, std::byte{});
  (*files)->submit({.file = file, .write = false, .offset = 0, .data = block, .tag = 2});
  EXPECT_EQ((*files)->wait().error, 0);
  return std::ranges::equal(block, bytes) ? std::string((*files)->kind()) : "";
}

// As in a container whose seccomp profile has no io_uring. The filter is of one thread, and of those it starts.
TEST(DiskFiles, GoOnWithThreadsWhereIoUringIsRefused) {
  const test::TempDir dir;
  std::string kind;
  std::thread([&] {
    sock_filter rules[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                           BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const sock_fprog program{std::size(rules), rules};
    ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    ASSERT_EQ(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), 0);
    kind = kind_that_works(dir.path() / "kv");
  }).join();
  EXPECT_EQ(kind, "threads");
}

// Without `ulimit -l` the kernel takes no buffers in advance: it is slower, and works.
TEST(DiskFiles, GoOnWhereNoMemoryMayBeLocked) {
  const test::TempDir dir;
  chmod(dir.path().c_str(), 0777);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_MEMLOCK, &before), 0);
  const rlimit none{0, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_MEMLOCK, &none), 0);
  std::string kind;
  bool refused = false;
  std::thread([&] {
    if (geteuid() == 0) {  // who may lock all; this thread alone becomes somebody else
      ASSERT_EQ(syscall(SYS_setresuid, 65534, 65534, 65534), 0);
    }
    std::vector<std::byte> memory(1 << 20);
    refused = syscall(SYS_mlock, memory.data(), memory.size()) != 0;  // sanitizers take the function for their own
    kind = kind_that_works(dir.path() / "kv");
  }).join();
  ASSERT_EQ(setrlimit(RLIMIT_MEMLOCK, &before), 0);
  prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);  // as it was: leak checkers look into the process
  EXPECT_TRUE(refused);
  EXPECT_TRUE(kind == "io_uring" || kind == "threads") << kind;
}

TEST(DiskFiles, OneProcessAtATime) {
  const test::TempDir dir;
  const auto files = DiskFiles::open(dir.path() / "kv", {});
  ASSERT_TRUE(files);
  const auto second = DiskFiles::open(dir.path() / "kv", {});
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::unavailable);
}

// A copy of item `i` in the tier's memory, if it has room.
bool save(NvmeTier& tier, uint64_t i) {
  const std::span<std::byte> copy = tier.room(100'000);
  if (copy.empty()) return false;
  std::ranges::copy(bytes_of(i, copy.size()), copy.begin());
  tier.save({{{.name = name_of(i)}, {std::span<const std::byte>(copy)}}});
  return true;
}

TEST(CopyRing, TakesInOneLapAfterTheOther) {
  CopyRing ring = CopyRing::create(1000).value();
  EXPECT_TRUE(ring.take(1001).empty());
  const std::span<std::byte> first = ring.take(600);
  ASSERT_EQ(first.size(), 600u);
  EXPECT_TRUE(ring.take(600).empty()) << "beyond the end, and from the beginning into what waits";
  const uint64_t first_end = ring.end();
  const std::span<std::byte> second = ring.take(300);
  EXPECT_EQ(second.data(), first.data() + 640) << "whole cache lines";
  EXPECT_EQ(ring.waiting(), 960u);
  EXPECT_TRUE(ring.take(64).empty());
  ring.release(first_end);
  EXPECT_EQ(ring.take(500).data(), first.data()) << "the next lap";
  EXPECT_TRUE(ring.take(200).empty());
  ring.release(ring.end());
  EXPECT_EQ(ring.waiting(), 0u);
  EXPECT_EQ(ring.take(1000).data(), first.data()) << "nothing waits: all of it";
  EXPECT_TRUE(ring.take(1).empty());
}

TEST(NvmeTier, SavesBehindTheCallerAndReadsFirst) {
  const test::TempDir dir;
  const NvmeTierOptions options{.folder = dir.path() / "kv", .space_bytes = 256 << 20, .queue_bytes = 8 << 20};
  PrefixName secret{};
  {
    const auto tier = NvmeTier::open(options).value();
    secret = tier->secret().root("model", "salt");
    int saved = 0, skipped = 0;
    for (uint64_t i = 0; i < 200; ++i)
      if (save(*tier, i)) {
        EXPECT_TRUE(tier->has(name_of(i)));
        ++saved;
      } else {
        ++skipped;
      }
    tier->flush();
    EXPECT_EQ(saved + skipped, 200);
    EXPECT_EQ(tier->stats().skipped_items, skipped);
    EXPECT_EQ(tier->stats().queued_bytes, 0);
    EXPECT_EQ(tier->stats().log.items, saved);
    std::vector<std::byte> got(100'000);
    int read = 0;
    tier->read({{name_of(0), {std::span(got)}}}, [&](bool ok) { read += ok; });
    tier->flush();
    EXPECT_EQ(read, 1);
    EXPECT_TRUE(got == bytes_of(0, 100'000));
    tier->read({{name_of(0), {std::span(got)}}, {name_of(999), {std::span(got)}}}, [&](bool ok) { read += ok; });
    tier->flush();
    EXPECT_EQ(read, 1) << "all or nothing";
  }
  const auto again = NvmeTier::open(options).value();
  EXPECT_EQ(again->secret().root("model", "salt"), secret) << "names are found again";
  EXPECT_TRUE(again->has(name_of(0)));
  EXPECT_FALSE(NvmeTier::open({.folder = dir.path() / "other", .space_bytes = 1 << 20}));
}

TEST(NvmeTier, EndsWhatWasPosted) {
  const test::TempDir dir;
  const NvmeTierOptions options{.folder = dir.path() / "kv", .space_bytes = 256 << 20};
  {
    const auto tier = NvmeTier::open(options).value();
    for (uint64_t i = 0; i < 50; ++i) EXPECT_TRUE(save(*tier, i));
  }
  const auto tier = NvmeTier::open(options).value();
  for (uint64_t i = 0; i < 50; ++i) EXPECT_TRUE(tier->has(name_of(i))) << i;
}

}  // namespace
}  // namespace thermocline
