// PrefixKeys: names for the prefixes of one list of token ids: a chain of keyed BLAKE2b over pages. Two prefixes with
// one name are the same tokens, of the same model, for the same salt.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace thermocline {

using PrefixName = std::array<uint8_t, 32>;
/// Of a map by name: a name is a hash already.
struct PrefixNameHash {
  size_t operator()(const PrefixName& name) const {
    size_t value;
    std::memcpy(&value, name.data(), sizeof value);
    return value;
  }
};

/// The secret that names are made with: nobody can tell from outside which tokens meet in one.
class PrefixSecret {
 public:
  static constexpr size_t kBytes = 32;

  PrefixSecret();  // from the system's random numbers
  /// One that was kept: kBytes.
  explicit PrefixSecret(std::string_view bytes);
  std::string_view bytes() const { return {reinterpret_cast<const char*>(key_.data()), key_.size()}; }
  /// What a chain begins with: everything but tokens that rows depend on, and who may share them.
  PrefixName root(std::string_view model, std::string_view salt) const;
  PrefixName next(const PrefixName& name, std::span<const int32_t> page) const;
  /// Of a prefix that ends within a page: that of its whole pages, and the tokens behind them.
  PrefixName with_tail(const PrefixName& name, std::span<const int32_t> tail) const;

 private:
  std::array<uint8_t, kBytes> key_;
};

class PrefixKeys {
 public:
  PrefixKeys() = default;
  PrefixKeys(const PrefixSecret& secret, const PrefixName& root) : secret_(&secret), names_{root} {}
  /// The name of the first `pages` pages of `ids`, kPageTokens each; `ids` begins as in earlier calls.
  const PrefixName& of(std::span<const int32_t> ids, int64_t pages);

 private:
  const PrefixSecret* secret_ = nullptr;
  std::vector<PrefixName> names_;  // [i]: of i pages
};

}  // namespace thermocline
