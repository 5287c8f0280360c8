// Prefixes that outlive their process: what a second engine answers from the folder of a first one is what it computes
// itself, to the last bit, and whatever happened to the folder meanwhile costs time and nothing else.
#include <sys/stat.h>

#include <fstream>
#include <thread>

#include "runtime/model/deepseek_v4/synthesize.h"
#include "tests/support/warm_cold.h"

namespace thermocline {
namespace {

using test::Answer;
using test::expect_same;
using test::Loop;
using test::ModelSetup;
using test::request;
using test::text_of;
using test::Where;

class KvDisk : public testing::Test {
 protected:
  ModelSetup setup(bool disk = true, const std::string& device = "none") const {
    const bool simt = device == "simt";  // a second for 30 tokens
    return {.folder = test::long_demo(),
            .sequences = 4,
            .context = simt ? 256 : 8192,
            .kv_tokens = simt ? 1024 : 8192,
            .prefix_cache_bytes = 64 << 20,
            .device = device,
            .kv_disk = disk ? dir.path() / "kv" : std::filesystem::path(),
            .hot_rows = simt && disk ? 20 : 0};
  }
  test::TempDir dir;
};

class KvDiskOn : public KvDisk, public testing::WithParamInterface<Where> {
 protected:
  ModelSetup on(bool disk = true) const { return setup(disk, GetParam().device); }
  bool simt() const { return GetParam().device == "simt"; }
};
#ifdef TC_SANITIZED  // ten times slower
constexpr int64_t kLongest = 300, kConversation = 300;
const std::vector<Where> kWhere = {{"cpu", "none"}};
#else
constexpr int64_t kLongest = 3000, kConversation = 3000;
const std::vector<Where> kWhere = {{"cpu", "none"}, {"simt", "simt"}};
#endif
INSTANTIATE_TEST_SUITE_P(Devices, KvDiskOn, testing::ValuesIn(kWhere), [](const auto& i) { return i.param.name; });

TEST_P(KvDiskOn, AConversationGoesOnInAnotherProcess) {
  Loop cold(on(false));
  std::vector<std::vector<int32_t>> prompts;
  for (const int64_t length : {3, 127, 128, 255, 256, 257, 1023, 3000})
    if (length <= kLongest && (!simt() || length == 127)) prompts.push_back(text_of(length, static_cast<int>(length)));
  std::vector<Answer> first;
  {
    Loop before(on());
    for (const auto& prompt : prompts) first.push_back(before.ask(request(prompt)));
  }
  Loop after(on());
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto length = static_cast<int64_t>(prompts[i].size());
    const std::string what = std::to_string(length) + " tokens";
    const Answer again = after.ask(request(prompts[i])), want = cold.ask(request(prompts[i]));
    expect_same(first[i], want, what + ", first");
    expect_same(again, want, what + ", again");
    EXPECT_EQ(again.stats.cached_tokens, length > 16 ? length - 1 : 0) << what;  // less is computed as soon
    std::vector<int32_t> next = prompts[i];
    next.insert(next.end(), want.ids.begin(), want.ids.end());
    next.push_back(9);
    const Answer turn = after.ask(request(next));
    expect_same(turn, cold.ask(request(next)), what + ", the next turn");
    EXPECT_EQ(turn.stats.cached_tokens, length + 5) << what;
  }
  EXPECT_GT(after.stats().fetches, 0);
  EXPECT_EQ(after.stats().failed_fetches, 0);
}

// More conversations than the memory of the cache holds: they come back from the disk, whoever was asked meanwhile.
TEST_F(KvDisk, WhatMemoryCannotHoldComesBack) {
  ModelSetup little = setup();
  little.context = little.kv_tokens = 1024;
  Loop cold(setup(false)), warm(little);
  const int conversations = 5;
  std::vector<std::vector<int32_t>> history;
  history.reserve(conversations);
  for (int i = 0; i < conversations; ++i) history.push_back(text_of(500 + 7 * i, i));
  for (int turn = 0; turn < 2; ++turn)
    for (int i = 0; i < conversations; ++i) {
      auto& ids = history[static_cast<size_t>(i)];
      const Answer got = warm.ask(request(ids));
      expect_same(got, cold.ask(request(ids)), "conversation " + std::to_string(i));
      EXPECT_GE(got.stats.cached_tokens, turn == 0 ? 0 : static_cast<int64_t>(ids.size()) - 3);
      ids.insert(ids.end(), got.ids.begin(), got.ids.end());
      ids.push_back(17);
      ids.push_back(18);
    }
  EXPECT_GT(warm.stats().fetches, 0);
  for (int64_t used = 1; used > 0; used = warm.engine->stats().kv_tokens_used) std::this_thread::yield();
}

TEST_F(KvDisk, IsPrivateToTheKey) {
  {
    Loop before(setup());
    Request r = request(text_of(40), 1);
    r.key = "alice";
    (void)before.ask(std::move(r));
  }
  Loop after(setup());
  for (const auto& [key, cached] : {std::pair("bob", 0), std::pair("alice", 39)}) {
    Request r = request(text_of(40), 1);
    r.key = key;
    EXPECT_EQ(after.ask(std::move(r)).stats.cached_tokens, cached) << key;
  }
}

// What is on the disk is another's: a changed weight, other numerics, another build of this program.
TEST_F(KvDisk, AnotherModelFindsNothing) {
  {
    Loop before(setup());
    (void)before.ask(request(text_of(300), 1));
  }
  ModelSetup other = setup();
  other.numerics = Numerics::bf16;
  EXPECT_EQ(Loop(other).ask(request(text_of(300), 1)).stats.cached_tokens, 0);
  other = setup();
  other.kv_dtype = KvDtype::bf16;
  EXPECT_EQ(Loop(other).ask(request(text_of(300), 1)).stats.cached_tokens, 0);
  other.kv_dtype = KvDtype::automatic;
  other.folder = dir.path() / "model";
  test::copy_model(test::long_demo(), other.folder);
  for (const auto& file : std::filesystem::directory_iterator(other.folder)) {
    if (file.path().extension() != ".safetensors") continue;
    std::fstream shard(file.path(), std::ios::in | std::ios::out | std::ios::binary);
    shard.seekg(-5, std::ios::end);
    const char byte = static_cast<char>(shard.get() ^ 1);
    shard.seekp(-5, std::ios::end);
    shard.put(byte);
  }
  EXPECT_EQ(Loop(other).ask(request(text_of(300), 1)).stats.cached_tokens, 0);
  other.folder = dir.path() / "config";
  test::copy_model(test::long_demo(), other.folder);
  const std::string config = read_text_file(other.folder / "config.json").value();
  std::filesystem::remove(other.folder / "config.json");
  ASSERT_TRUE(write_text_file(other.folder / "config.json", config + " ").ok());
  EXPECT_EQ(Loop(other).ask(request(text_of(300), 1)).stats.cached_tokens, 0);
  EXPECT_EQ(Loop(setup()).ask(request(text_of(300), 1)).stats.cached_tokens, 299) << "and the first still does";
}

TEST_F(KvDisk, DamageCostsTimeOnly) {
  constexpr int64_t kDamaged = kLongest < 700 ? 300 : 700;
  Loop cold(setup(false));
  const Answer want = cold.ask(request(text_of(kDamaged)));
  using Damage = std::function<void(const std::filesystem::path&)>;
  const std::pair<const char*, Damage> damages[] = {
      {"emptied", [](const auto& folder) { std::filesystem::remove_all(folder); }},
      {"no secret", [](const auto& folder) { std::filesystem::remove(folder / "secret"); }},
      {"another secret", [](const auto& folder) { std::ofstream(folder / "secret") << std::string(32, 'x'); }},
      {"half a secret", [](const auto& folder) { std::ofstream(folder / "secret") << "x"; }},
      {"no index", [](const auto& folder) { std::filesystem::remove(folder / "index"); }},
      {"cut",
       [](const auto& folder) {
         const std::filesystem::path log = folder / "log-00000001";
         std::filesystem::resize_file(log, std::filesystem::file_size(log) / 2);
       }},
      {"other bytes", [](const auto& folder) {
         const auto size = std::filesystem::file_size(folder / "log-00000001");
         std::fstream file(folder / "log-00000001", std::ios::in | std::ios::out | std::ios::binary);
         for (std::streamoff at = 9000; at < static_cast<std::streamoff>(size); at += 9000) file.seekp(at).put('!');
       }}};
  for (const auto& [name, damage] : damages) {
    std::filesystem::remove_all(dir.path() / "kv");
    {
      Loop before(setup());
      expect_same(before.ask(request(text_of(kDamaged))), want, name);
    }
    damage(dir.path() / "kv");
    Loop after(setup());
    const Answer got = after.ask(request(text_of(kDamaged)));
    expect_same(got, want, name);
    EXPECT_TRUE(std::string(name) != "no index" || got.stats.cached_tokens == kDamaged - 1);
    const Answer again = after.ask(request(text_of(kDamaged)));
    expect_same(again, want, name);
    EXPECT_EQ(again.stats.cached_tokens, kDamaged - 1) << name;
  }
}

// An honest prefill of a whole context, half an hour of two cores, and its next turn after a restart.
class MillionTokens : public KvDisk, public testing::WithParamInterface<int64_t> {};

TEST_P(MillionTokens, GoOnAfterARestart) {
  const int64_t context = GetParam(), answer = 6;
  ModelGeometry g = deepseek_v4::published_geometry("demo", 4).value();
  g.max_position_embeddings = context;
  ModelSetup long_one = setup();
  long_one.folder = dir.path() / "model";
  long_one.context = long_one.kv_tokens = context;
  long_one.chunk = 2048;
  long_one.prefix_cache_bytes = 256 << 20;
  ASSERT_TRUE(deepseek_v4::synthesize(g, long_one.folder, {.quiet = true}).ok());
  std::vector<int32_t> prompt = text_of(context - 2 * answer);
  Answer first;
  {
    Loop before(long_one);
    first = before.ask(request(prompt, answer));
    EXPECT_EQ(first.reason, FinishReason::length) << first.error.message;
    expect_same(before.ask(request(prompt, answer)), first, "again");
  }
  Loop after(long_one);
  const Answer again = after.ask(request(prompt, answer));
  expect_same(again, first, "after a restart");
  EXPECT_EQ(again.stats.cached_tokens, context - 2 * answer - 1);
  prompt.insert(prompt.end(), first.ids.begin(), first.ids.end());
  const Answer last = after.ask(request(prompt, answer));
  EXPECT_EQ(last.ids.size(), answer) << last.error.message;
  EXPECT_GE(last.stats.cached_tokens, context - answer - 1);
  prompt.resize(static_cast<size_t>(context) + 1, 9);
  const auto refused = after.engine->submit(request(prompt, 1));
  ASSERT_FALSE(refused);
  for (const int64_t number : {context, context + 1})
    EXPECT_NE(refused.error().message.find(std::to_string(number)), std::string::npos) << refused.error().message;
}
INSTANTIATE_TEST_SUITE_P(Long, MillionTokens, testing::Values(1 << 20));
INSTANTIATE_TEST_SUITE_P(Smoke, MillionTokens, testing::Values(2048));

TEST_F(KvDisk, ASecondServerGoesOnWithoutIt) {
  Loop first(setup()), second(setup());
  const Answer a = first.ask(request(text_of(300))), b = second.ask(request(text_of(300)));
  expect_same(a, b, "two servers");
  EXPECT_GT(first.stats().disk.log.items + first.stats().disk.queued_bytes, 0);
  EXPECT_EQ(second.stats().disk.log.items, 0);
}

TEST_F(KvDisk, RequestsThatEndWhileTheirPrefixArrives) {
  {
    Loop before(setup());
    (void)before.ask(request(text_of(kConversation), 1));
  }
  for (int round = 0; round < 10; ++round) {
    Loop after(setup());
    const auto handle = after.submit(request(text_of(kConversation), 100));
    const auto other = after.submit(request(text_of(kConversation), 3));
    std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
    handle->cancel();
    (void)test::collect(*handle);
    EXPECT_EQ(test::collect(*other)[0].stats.cached_tokens, kConversation - 1);
  }
}

TEST_F(KvDisk, AFolderThatCannotBeUsedIsAnError) {
  EngineOptions options;
  options.model = test::demo_model();
  options.quiet = true;
  options.kv_disk = {.folder = "/proc/no/such", .space_bytes = 1 << 30};
  const auto refused = Engine::open(options);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::invalid_argument);
  EXPECT_NE(refused.error().message.find("/proc/no/such"), std::string::npos) << refused.error().message;
  options.kv_disk = {.folder = dir.path() / "kv", .space_bytes = 1 << 20};
  const auto little = Engine::open(options);
  ASSERT_FALSE(little);
  EXPECT_NE(little.error().message.find("--kv-disk-space"), std::string::npos) << little.error().message;
}

}  // namespace
}  // namespace thermocline
