#include "runtime/kv/prefix_keys.h"

#include <sodium.h>

#include <algorithm>

#include "runtime/base/check.h"
#include "runtime/kv/kv_layout.h"

namespace thermocline {
namespace {

class Hash {
 public:
  explicit Hash(const std::array<uint8_t, PrefixSecret::kBytes>& key) {
    TC_CHECK_EQ(crypto_generichash_init(&state_, key.data(), key.size(), sizeof(PrefixName)), 0);
  }
  Hash& add(const void* data, size_t bytes) {
    crypto_generichash_update(&state_, static_cast<const unsigned char*>(data), bytes);
    return *this;
  }
  Hash& add_text(std::string_view text) {
    const uint64_t size = text.size();
    return add(&size, sizeof size).add(text.data(), text.size());
  }
  PrefixName finish() {
    PrefixName name;
    crypto_generichash_final(&state_, name.data(), name.size());
    return name;
  }

 private:
  crypto_generichash_state state_;
};

}  // namespace

PrefixSecret::PrefixSecret() {
  TC_CHECK(sodium_init() >= 0, "libsodium does not start");
  randombytes_buf(key_.data(), key_.size());
}

PrefixSecret::PrefixSecret(std::string_view bytes) {
  TC_CHECK(sodium_init() >= 0, "libsodium does not start");
  TC_CHECK_EQ(bytes.size(), kBytes);
  std::copy(bytes.begin(), bytes.end(), key_.begin());
}

PrefixName PrefixSecret::root(std::string_view model, std::string_view salt) const {
  return Hash(key_).add_text(model).add_text(salt).finish();
}

PrefixName PrefixSecret::next(const PrefixName& name, std::span<const int32_t> page) const {
  return Hash(key_).add(name.data(), name.size()).add(page.data(), page.size_bytes()).finish();
}

// A byte more than ids, so that it is never what next() hashes.
PrefixName PrefixSecret::with_tail(const PrefixName& name, std::span<const int32_t> tail) const {
  return Hash(key_).add(name.data(), name.size()).add(tail.data(), tail.size_bytes()).add("t", 1).finish();
}

const PrefixName& PrefixKeys::of(std::span<const int32_t> ids, int64_t pages) {
  while (static_cast<int64_t>(names_.size()) <= pages) {
    const auto first = (names_.size() - 1) * static_cast<size_t>(kPageTokens);
    names_.push_back(secret_->next(names_.back(), ids.subspan(first, kPageTokens)));
  }
  return names_[static_cast<size_t>(pages)];
}

}  // namespace thermocline
