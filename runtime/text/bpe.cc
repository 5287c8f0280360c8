#include "runtime/text/bpe.h"

#include <algorithm>
#include <array>

#include "runtime/text/utf8.h"

namespace thermocline {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 24;
constexpr size_t kCachedPieceBytes = 64;  // longer pieces rarely come back
constexpr size_t kCachedPieces = 1 << 16;

// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and on.
std::array<uint32_t, 256> byte_alphabet() {
  std::array<uint32_t, 256> alphabet{};
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

uint32_t code_point(std::string_view text, int length) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
  if (length == 1) return byte(0);
  if (length == 2) return (byte(0) & 31) << 6 | (byte(1) & 63);
  if (length == 3) return (byte(0) & 15) << 12 | (byte(1) & 63) << 6 | (byte(2) & 63);
  return (byte(0) & 7) << 18 | (byte(1) & 63) << 12 | (byte(2) & 63) << 6 | (byte(3) & 63);
}

// A token text in the byte alphabet as bytes; one with any other character is taken literally, as byte-level decoders
// do.
std::string raw_bytes(const std::string& token) {
  static const auto byte_of = [] {
    std::array<int, 512> map;
    map.fill(-1);
    const auto alphabet = byte_alphabet();
    for (int byte = 0; byte < 256; ++byte) map[alphabet[static_cast<size_t>(byte)]] = byte;
    return map;
  }();
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const std::string_view rest = std::string_view(token).substr(i);
    const int length = utf8_length(rest);
    if (length <= 0) return token;
    const uint32_t c = code_point(rest, length);
    if (c >= byte_of.size() || byte_of[c] < 0) return token;
    bytes += static_cast<char>(byte_of[c]);
    i += static_cast<size_t>(length);
  }
  return bytes;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

Status check_variant(const SortedJson& json) {
  TC_ASSIGN(const std::string type, get_string(json, "type"));
  if (type != "BPE") return unsupported("model type '" + type + "' is not BPE");
  for (const char* name : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"})
    if (json.contains(name) && !json[name].is_null() && json[name] != "")
      return unsupported("a BPE model with '" + std::string(name) + "' is not byte-level");
  if (json.contains("byte_fallback") && json["byte_fallback"] != false)
    return unsupported("a BPE model with byte_fallback is not byte-level");
  if (!json.contains("vocab") || !json["vocab"].is_object()) return corrupt("field 'vocab' is missing or no object");
  if (!json.contains("merges") || !json["merges"].is_array()) return corrupt("field 'merges' is missing or no array");
  return {};
}

Result<std::pair<std::string, std::string>> merge_pair(const SortedJson& merge, size_t index) {
  const std::string where = "merges[" + std::to_string(index) + "]";
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  if (!merge.is_string()) return corrupt(where + " is neither 'left right' nor a pair");
  const std::string text = merge.get<std::string>();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
    return corrupt(where + " = '" + text + "' is not 'left right'");
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

}  // namespace

Result<BpeModel> BpeModel::parse(const SortedJson& json, std::vector<std::string>& token_bytes) {
  TC_RETURN_IF_ERROR(check_variant(json));
  BpeModel model;
  std::unordered_map<std::string, int32_t> ids;
  for (const auto& [token, id] : json["vocab"].items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMaxTokens)
      return corrupt("vocab['" + token + "'] is no token id");
    const size_t index = id.get<size_t>();
    if (token.empty()) return corrupt("the vocabulary holds an empty token");
    if (token_bytes.size() <= index) token_bytes.resize(index + 1);
    if (!token_bytes[index].empty())
      return corrupt("vocab['" + token + "'] = " + std::to_string(index) + " is the id of another token too");
    token_bytes[index] = raw_bytes(token);
    ids.emplace(token, static_cast<int32_t>(index));
  }
  const auto alphabet = byte_alphabet();
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string character;
    if (alphabet[byte] < 128)
      character = static_cast<char>(alphabet[byte]);
    else
      character = {static_cast<char>(0xc0 | alphabet[byte] >> 6), static_cast<char>(0x80 | (alphabet[byte] & 63))};
    const auto it = ids.find(character);
    if (it == ids.end())
      return corrupt("the vocabulary has no token for byte " + std::to_string(byte) + ": not byte-level");
    model.byte_ids_[byte] = it->second;
  }
  const SortedJson& merges = json["merges"];
  model.merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    TC_ASSIGN(const auto pair, merge_pair(merges[rank], rank));
    const auto left = ids.find(pair.first), right = ids.find(pair.second), merged = ids.find(pair.first + pair.second);
    for (const auto& [it, token] :
         {std::pair(left, pair.first), std::pair(right, pair.second), std::pair(merged, pair.first + pair.second)})
      if (it == ids.end())
        return corrupt("merges[" + std::to_string(rank) + "] needs the token '" + token +
                       "', which the vocabulary lacks");
    model.merges_.insert_or_assign(pair_key(left->second, right->second),
                                   Merge{static_cast<int32_t>(rank), merged->second});
  }
  if (json.contains("ignore_merges") && json["ignore_merges"] == true)
    for (const auto& [token, id] : ids) model.whole_pieces_.emplace(token_bytes[static_cast<size_t>(id)], id);
  return model;
}

void BpeModel::encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  const bool cacheable = piece.size() <= kCachedPieceBytes;
  if (cacheable) {
    if (const auto it = scratch.cache_.find(piece); it != scratch.cache_.end()) {
      const auto begin = scratch.cached_ids_.begin() + it->second.first;
      ids.insert(ids.end(), begin, begin + it->second.second);
      return;
    }
  }
  const size_t first = ids.size();
  const auto whole = whole_pieces_.empty() ? whole_pieces_.end() : whole_pieces_.find(std::string(piece));
  if (whole != whole_pieces_.end())
    ids.push_back(whole->second);
  else
    merge(piece, scratch, ids);
  if (!cacheable) return;
  if (scratch.cache_.size() >= kCachedPieces) {
    scratch.cache_.clear();
    scratch.cached_ids_.clear();
  }
  scratch.cache_.emplace(
      piece, std::pair(static_cast<uint32_t>(scratch.cached_ids_.size()), static_cast<uint32_t>(ids.size() - first)));
  scratch.cached_ids_.insert(scratch.cached_ids_.end(), ids.begin() + static_cast<std::ptrdiff_t>(first), ids.end());
}

// Puts the merge of symbol `left` with its successor on the heap, if there is one.
void BpeModel::consider(Scratch& scratch, int32_t left) const {
  const int32_t right = scratch.symbols_[static_cast<size_t>(left)].next;
  if (right < 0) return;
  const int32_t left_id = scratch.symbols_[static_cast<size_t>(left)].id,
                right_id = scratch.symbols_[static_cast<size_t>(right)].id;
  const auto it = merges_.find(pair_key(left_id, right_id));
  if (it == merges_.end()) return;
  scratch.heap_.push_back({it->second.rank, left, left_id, right_id, it->second.id});
  std::push_heap(scratch.heap_.begin(), scratch.heap_.end());
}

// The lowest rank first, then the leftmost. A candidate whose symbols changed since it was pushed is stale.
void BpeModel::merge(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  auto& symbols = scratch.symbols_;
  const int32_t n = static_cast<int32_t>(piece.size());
  symbols.resize(piece.size());
  for (int32_t i = 0; i < n; ++i)
    symbols[static_cast<size_t>(i)] = {byte_ids_[static_cast<unsigned char>(piece[static_cast<size_t>(i)])], i - 1,
                                       i + 1 < n ? i + 1 : -1};
  scratch.heap_.clear();
  for (int32_t i = 0; i + 1 < n; ++i) consider(scratch, i);
  while (!scratch.heap_.empty()) {
    std::pop_heap(scratch.heap_.begin(), scratch.heap_.end());
    const Scratch::Candidate top = scratch.heap_.back();
    scratch.heap_.pop_back();
    Scratch::Symbol& left = symbols[static_cast<size_t>(top.position)];
    if (left.id != top.left || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != top.right) continue;
    left.id = top.merged;
    left.next = right.next;
    right.id = -1;  // gone: no candidate matches it
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = top.position;
    consider(scratch, top.position);
    if (left.previous >= 0) consider(scratch, left.previous);
  }
  for (int32_t i = 0; i >= 0 && i < n; i = symbols[static_cast<size_t>(i)].next)
    ids.push_back(symbols[static_cast<size_t>(i)].id);
}

}  // namespace thermocline
