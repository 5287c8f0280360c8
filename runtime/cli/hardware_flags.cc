#include "runtime/cli/hardware_flags.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <optional>
#include <string>

namespace thermocline::cli {
namespace {

// What a message repeats of the user's text: a line at most.
std::string quoted(std::string_view text) {
  constexpr size_t kMost = 60;
  std::string shown;
  for (const char c : text.substr(0, kMost)) shown += static_cast<unsigned char>(c) < 32 ? '?' : c;
  return "'" + shown + (text.size() > kMost ? "...'" : "'");
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return text;
}

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return result;
}

// A number in front of a unit: digits and at most one point, so no sign, exponent, "nan" or "inf".
struct Amount {
  double value = 0;
  std::string unit;  // lower case
};

std::optional<Amount> amount_of(std::string_view text) {
  text = trimmed(text);
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  Amount amount;
  const auto [end, error] = std::from_chars(text.data(), text.data() + digits, amount.value, std::chars_format::fixed);
  if (digits == 0 || error != std::errc() || end != text.data() + digits || !std::isfinite(amount.value)) return {};
  amount.unit = lower(trimmed(text.substr(digits)));
  return amount;
}

// A whole number, or none.
std::optional<int> whole_of(std::string_view text) {
  text = trimmed(text);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return {};
  return value;
}

struct ByteUnit {
  const char* name;
  double bytes;
};
constexpr ByteUnit kByteUnits[] = {{"mb", 1e6},     {"gb", 1e9},     {"tb", 1e12},
                                   {"mib", 0x1p20}, {"gib", 0x1p30}, {"tib", 0x1p40}};

double factor_of(std::string_view unit) {
  for (const ByteUnit& known : kByteUnits)
    if (known.name == unit) return known.bytes;
  return 0;
}

}  // namespace

Result<double> parse_bytes(std::string_view text) {
  const std::optional<Amount> amount = amount_of(text);
  const double bytes = amount ? amount->value * factor_of(amount->unit) : 0;
  if (!(bytes > 0 && bytes <= 0x1p50))
    return invalid(quoted(text) +
                   " is no size of memory: give a number above 0 with GiB, GB, MiB, MB, TiB or TB, at "
                   "most 1024TiB, such as 384GiB");
  return bytes;
}

Result<double> parse_rate(std::string_view text) {
  const std::optional<Amount> amount = amount_of(text);
  double rate = 0;
  if (amount && amount->unit.ends_with("/s"))
    rate = amount->value * factor_of(trimmed(std::string_view(amount->unit).substr(0, amount->unit.size() - 2)));
  if (!(rate > 0 && rate <= 1e15))
    return invalid(quoted(text) + " is no rate: give a number above 0 with MB/s or GB/s, such as 7GB/s");
  return rate;
}

Result<int64_t> parse_tokens(std::string_view text) {
  const std::optional<Amount> amount = amount_of(text);
  const double factor = !amount                ? 0
                        : amount->unit.empty() ? 1
                        : amount->unit == "k"  ? 1 << 10
                        : amount->unit == "m"  ? 1 << 20
                                               : 0;
  const double tokens = amount ? amount->value * factor : 0;
  if (!(tokens >= 1 && tokens <= 0x1p30) || tokens != std::floor(tokens))
    return invalid(quoted(text) + " is no number of tokens: give 131072, 128k or 1M, from 1 to 1024M");
  return static_cast<int64_t>(tokens);
}

Result<sched::GpuSheet> parse_gpu(std::string_view text) {
  const size_t comma = std::min(text.find(','), text.size());
  const sched::GpuSheet* const known = sched::find_gpu_sheet(trimmed(text.substr(0, comma)));
  if (!known) {
    std::string names;
    for (const sched::GpuSheet& sheet : sched::gpu_sheets()) names += std::string(sheet.name) + ", ";
    return invalid(quoted(text) + " is no card with known figures: give one of " + names +
                   "with another memory size if need be (4090,48GiB), or none");
  }
  sched::GpuSheet sheet = *known;
  if (comma < text.size()) {
    Result<double> bytes = parse_bytes(text.substr(comma + 1));
    if (!bytes) return std::move(bytes).error().with("the memory of " + quoted(text));
    if (*bytes < 1e9 || *bytes > 1e13) return invalid("the memory of " + quoted(text) + " is outside 1GB..10TB");
    sheet.memory_bytes = *bytes;
  }
  return sheet;
}

Result<RamFlag> parse_ram(std::string_view text) {
  const size_t x = text.find_first_of("xX");
  const std::optional<int> channels = x < text.size() ? whole_of(text.substr(0, x)) : std::nullopt,
                           rate = x < text.size() ? whole_of(text.substr(x + 1)) : std::nullopt;
  if (!channels || !rate || *channels < 1 || *channels > 64 || *rate < 800 || *rate > 20'000)
    return invalid(quoted(text) +
                   " is no memory: give channels of all sockets (1 to 64) x MT/s (800 to 20000), such as 12x6000; its "
                   "size is --ram-size");
  return RamFlag{*channels, static_cast<double>(*rate)};
}

Result<CpuFlag> parse_cpu(std::string_view text) {
  const size_t comma = std::min(text.find(','), text.size());
  std::string count = lower(trimmed(text.substr(0, comma)));
  for (const std::string_view word : {"cores", "core"})
    if (count.ends_with(word)) count.resize(count.size() - word.size());
  const std::optional<int> cores = whole_of(count);
  CpuFlag flag;
  bool known = comma == text.size();
  for (size_t i = 0; i < sched::kCpuKernelNames.size() && !known; ++i) {
    known = lower(trimmed(text.substr(comma + 1))) == sched::kCpuKernelNames[i];
    flag.kernels = static_cast<sched::CpuKernels>(i);
  }
  if (!cores || *cores < 1 || *cores > 4096 || !known)
    return invalid(quoted(text) +
                   " is no processor: give its cores (1 to 4096) and the kernels it runs, avx512, amx, avx2 or scalar, "
                   "such as '64 cores, avx512'");
  flag.cores = *cores;
  return flag;
}

}  // namespace thermocline::cli
