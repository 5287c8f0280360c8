// Runs a fuzz target over its seeds and over mutations of them: no fuzzing engine needed, so every test run and every
// sanitizer build has it. Usage: replay ROUNDS SEED_FILE...
// The mutations come from one fixed seed, so that a run can be judged by what changed in the code; TC_FUZZ_SEED is
// another number, or `random`. The seed is printed: with it a failure comes back.
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

// One of: a flipped bit, a byte, a cut, a copied range, a number or bracket that parsers trip over.
std::string mutate(std::string input, std::mt19937& random, const std::vector<std::string>& seeds) {
  static const char* const kTokens[] = {"-1",       "18446744073709551616",
                                        "1e999",    "null",
                                        "[[[[",     "{}",
                                        "\"",       "\\u0000",
                                        "\xff",     "<",
                                        "｜DSML｜", "</think>",
                                        "99999999", "0",
                                        ",",        ":"};
  for (int i = static_cast<int>(random() % 4) + 1; i > 0; --i) {
    const size_t at = input.empty() ? 0 : random() % input.size();
    switch (random() % 6) {
      case 0:
        if (!input.empty()) input[at] = static_cast<char>(input[at] ^ (1 << random() % 8));
        break;
      case 1:
        if (!input.empty()) input[at] = static_cast<char>(random());
        break;
      case 2:
        input.erase(at, random() % 40);
        break;
      case 3:
        input.insert(at, kTokens[random() % std::size(kTokens)]);
        break;
      case 4:
        input.insert(at, input.substr(at, random() % 60));
        break;
      default: {
        const std::string& other = seeds[random() % seeds.size()];
        const size_t from = other.empty() ? 0 : random() % other.size();
        input.insert(at, other.substr(from, random() % 80));
      }
    }
  }
  return input;
}

constexpr uint32_t kSeed = 20260;

// What TC_FUZZ_SEED says; nothing when it is neither a number of 32 bits nor `random`.
std::optional<uint32_t> mutation_seed() {
  const char* const text = std::getenv("TC_FUZZ_SEED");
  if (!text || !*text) return kSeed;
  const std::string_view given = text;
  if (given == "random") return std::random_device{}();
  uint32_t seed = 0;
  const auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), seed);
  if (error != std::errc() || end != given.data() + given.size()) return std::nullopt;
  return seed;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: %s ROUNDS SEED_FILE...\n", argv[0]), 2;
  std::vector<std::string> seeds;
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) return std::fprintf(stderr, "cannot read %s\n", argv[i]), 2;
    if (std::string(argv[i]).ends_with(".jsonl")) {
      for (std::string line; std::getline(file, line) && seeds.size() < 400;) seeds.push_back(line);
    } else {
      seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
  }
  const std::optional<uint32_t> first = mutation_seed();
  if (!first) return std::fprintf(stderr, "TC_FUZZ_SEED should be a number of 32 bits or 'random'\n"), 2;
  const int rounds = std::atoi(argv[1]);
  std::printf("%zu seeds, %d mutations; again with TC_FUZZ_SEED=%u\n", seeds.size(), rounds, *first);
  std::fflush(stdout);
  for (const std::string& seed : seeds) run(seed);
  std::mt19937 random(*first);
  for (int i = 0; i < rounds; ++i) run(mutate(seeds[random() % seeds.size()], random, seeds));
  return 0;
}
