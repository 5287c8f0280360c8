// How far apart two words are, for "did you mean".
#pragma once

#include <algorithm>
#include <cctype>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace thermocline {

/// Letters to change, add or leave out to get from one word to the other; a letter's case costs nothing.
inline size_t edits(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t changed = diagonal + (lower(a[i]) != lower(b[j]));
      diagonal = row[j + 1];
      row[j + 1] = std::min({changed, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

/// The known word that `word` was probably meant to be: a third of its letters may be wrong, but three at most. Empty
/// where none is that near; of two as near, the first.
inline std::string nearest(std::string_view word, const std::vector<std::string>& known) {
  std::string best;
  size_t least = std::min<size_t>(3, (word.size() + 2) / 3) + 1;
  if (word.size() > 256) return best;
  for (const std::string& candidate : known)
    if (const size_t away = edits(word, candidate); away < least) least = away, best = candidate;
  return best;
}

}  // namespace thermocline
