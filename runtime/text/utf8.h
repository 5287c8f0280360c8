// UTF-8 cut at any byte: complete characters out, the open tail kept, ill-formed bytes replaced by U+FFFD, one for each
// maximal part (as the Unicode standard, Rust and Python do).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace thermocline {

/// The length of the well-formed character at the start of `bytes` (1..4); 0 when the bytes end inside what may still
/// become one; minus the length of the ill-formed part otherwise.
inline int utf8_length(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  int length = 0;
  unsigned char low = 0x80,
                high = 0xbf;  // bounds of the second byte: no overlong forms, no surrogates, at most U+10FFFF
  if (first >= 0xc2 && first <= 0xdf)
    length = 2;
  else if (first >= 0xe0 && first <= 0xef)
    length = 3, low = first == 0xe0 ? 0xa0 : 0x80, high = first == 0xed ? 0x9f : 0xbf;
  else if (first >= 0xf0 && first <= 0xf4)
    length = 4, low = first == 0xf0 ? 0x90 : 0x80, high = first == 0xf4 ? 0x8f : 0xbf;
  else
    return -1;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == bytes.size()) return 0;
    if (byte(static_cast<size_t>(i)) < low || byte(static_cast<size_t>(i)) > high) return -i;
    low = 0x80, high = 0xbf;
  }
  return length;
}

class Utf8Stream {
 public:
  /// The text that `bytes` completes. What may still become a character waits for the next call.
  std::string push(std::string_view bytes) {
    pending_ += bytes;
    std::string out;
    size_t i = 0;
    while (i < pending_.size()) {
      const int length = utf8_length(std::string_view(pending_).substr(i));
      if (length == 0) break;
      if (length > 0)
        out.append(pending_, i, static_cast<size_t>(length));
      else
        out += "\xef\xbf\xbd";
      i += static_cast<size_t>(length > 0 ? length : -length);
    }
    pending_.erase(0, i);
    return out;
  }
  /// The end: an open character becomes U+FFFD.
  std::string finish() {
    if (pending_.empty()) return "";
    pending_.clear();
    return "\xef\xbf\xbd";
  }

 private:
  std::string pending_;
};

/// The bytes as well-formed UTF-8.
inline std::string to_valid_utf8(std::string_view bytes) {
  Utf8Stream stream;
  std::string text = stream.push(bytes);
  return text + stream.finish();
}

}  // namespace thermocline
