#include "runtime/text/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "runtime/io/file.h"
#include "runtime/text/utf8.h"

namespace thermocline {
namespace {

// The character that ends before / starts at a byte, for the word and white-space rules of added tokens.
utf8proc_int32_t char_at(std::string_view text, size_t at, size_t* length = nullptr) {
  utf8proc_int32_t c = -1;
  if (at < text.size()) {
    const auto n = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                    static_cast<utf8proc_ssize_t>(text.size() - at), &c);
    if (length) *length = n > 0 ? static_cast<size_t>(n) : 1;
  }
  return c;
}

size_t previous_start(std::string_view text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80);
  return at;
}

bool is_space(utf8proc_int32_t c) {
  return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
         c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_word(utf8proc_int32_t c) {
  if (c < 0) return false;
  const auto category = utf8proc_category(c);
  return c == '_' || (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NO) ||
         category == UTF8PROC_CATEGORY_PC;
}

bool bool_of(const SortedJson& json, const char* name) { return json.contains(name) && json[name] == true; }

}  // namespace

void Tokenizer::Trie::insert(std::string_view content, int32_t index) {
  starts_[static_cast<unsigned char>(content[0])] = true;
  int32_t node = 0;
  for (const char c : content) {
    const unsigned char byte = static_cast<unsigned char>(c);
    auto& children = nodes_[static_cast<size_t>(node)].children;
    const auto it = std::lower_bound(children.begin(), children.end(), std::pair(byte, int32_t{0}));
    if (it != children.end() && it->first == byte) {
      node = it->second;
    } else {
      const int32_t child = static_cast<int32_t>(nodes_.size());
      children.insert(it, {byte, child});
      nodes_.emplace_back();
      node = child;
    }
  }
  nodes_[static_cast<size_t>(node)].token = index;
}

int32_t Tokenizer::Trie::longest(std::string_view text, size_t at) const {
  int32_t node = 0, best = -1;
  for (; at < text.size(); ++at) {
    const auto& children = nodes_[static_cast<size_t>(node)].children;
    const unsigned char byte = static_cast<unsigned char>(text[at]);
    const auto it = std::lower_bound(children.begin(), children.end(), std::pair(byte, int32_t{0}));
    if (it == children.end() || it->first != byte) break;
    node = it->second;
    if (nodes_[static_cast<size_t>(node)].token >= 0) best = nodes_[static_cast<size_t>(node)].token;
  }
  return best;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer.json";
  TC_ASSIGN(const std::string text, read_text_file(path, uint64_t{256} << 20));
  Result<std::unique_ptr<Tokenizer>> tokenizer = parse(text);
  if (!tokenizer) return std::move(tokenizer).error().with(path.string());
  return tokenizer;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::parse(std::string_view json_text) {
  TC_ASSIGN(const SortedJson json, parse_sorted_json(json_text));
  if (!json.is_object()) return corrupt("not a JSON object");
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  if (!json.contains("model") || !json["model"].is_object()) return corrupt("field 'model' is missing or no object");
  const auto in = [](const char* part, Status status) {
    return status.ok() ? Status() : Status(std::move(status).error().with(part));
  };
  Result<BpeModel> bpe = BpeModel::parse(json["model"], tokenizer->tokens_);
  if (!bpe) return std::move(bpe).error().with("model");
  tokenizer->bpe_ = std::move(*bpe);
  for (size_t id = 0; id < tokenizer->tokens_.size(); ++id)
    if (!tokenizer->tokens_[id].empty()) tokenizer->ids_.emplace(tokenizer->tokens_[id], static_cast<int32_t>(id));
  if (json.contains("pre_tokenizer")) {
    Result<PreTokenizer> pre_tokenizer = PreTokenizer::parse(json["pre_tokenizer"]);
    if (!pre_tokenizer) return std::move(pre_tokenizer).error().with("pre_tokenizer");
    tokenizer->pre_tokenizer_ = std::move(*pre_tokenizer);
  }
  if (json.contains("normalizer")) TC_RETURN_IF_ERROR(in("normalizer", tokenizer->read_normalizer(json["normalizer"])));
  if (json.contains("added_tokens"))
    TC_RETURN_IF_ERROR(in("added_tokens", tokenizer->read_added_tokens(json["added_tokens"])));
  return tokenizer;
}

Status Tokenizer::read_normalizer(const SortedJson& json) {
  if (json.is_null()) return {};
  TC_ASSIGN(const std::string type, get_string(json, "type"));
  if (type == "Sequence") {
    if (!json.contains("normalizers") || !json["normalizers"].is_array())
      return corrupt("field 'normalizers' is missing or no array");
    for (const SortedJson& part : json["normalizers"]) TC_RETURN_IF_ERROR(read_normalizer(part));
    return {};
  }
  static constexpr std::pair<const char*, Normalizer> kKnown[] = {
      {"NFC", Normalizer::nfc}, {"NFD", Normalizer::nfd}, {"NFKC", Normalizer::nfkc}, {"NFKD", Normalizer::nfkd}};
  for (const auto& [name, value] : kKnown)
    if (type == name) return normalizers_.push_back(value), Status();
  return unsupported("normalizer '" + type + "' is none of Sequence, NFC, NFD, NFKC, NFKD");
}

Status Tokenizer::read_added_tokens(const SortedJson& json) {
  if (!json.is_array()) return corrupt("should be an array");
  for (size_t i = 0; i < json.size(); ++i) {
    const SortedJson& entry = json[i];
    const std::string where = "[" + std::to_string(i) + "]";
    AddedToken token;
    Result<std::string> content = get_string(entry, "content");
    if (!content) return std::move(content).error().with(where);
    Result<int64_t> id = get_int(entry, "id");
    if (!id) return std::move(id).error().with(where);
    if (*id < 0 || *id >= 1 << 24 || content->empty())
      return corrupt(where + ": id " + std::to_string(*id) + " or content '" + *content + "' is impossible");
    token.id = static_cast<int32_t>(*id);
    token.content = *content;
    token.single_word = bool_of(entry, "single_word");
    token.lstrip = bool_of(entry, "lstrip");
    token.rstrip = bool_of(entry, "rstrip");
    token.special = bool_of(entry, "special");
    const size_t index = static_cast<size_t>(token.id);
    if (tokens_.size() <= index) tokens_.resize(index + 1);
    if (!tokens_[index].empty() && tokens_[index] != token.content)
      return corrupt(where + ": id " + std::to_string(token.id) + " belongs to another token");
    if (tokens_[index].empty()) tokens_[index] = token.content;
    if (added_of_id_.size() < tokens_.size()) added_of_id_.resize(tokens_.size(), -1);
    added_of_id_[index] = static_cast<int32_t>(added_.size());
    ids_.insert_or_assign(token.content, token.id);
    // A token that wants normalised text is looked for in the text after normalisation.
    const bool normalized = entry.contains("normalized") ? bool_of(entry, "normalized") : !token.special;
    (normalized && !normalizers_.empty() ? normalized_tokens_ : raw_tokens_)
        .insert(token.content, static_cast<int32_t>(added_.size()));
    added_.push_back(std::move(token));
  }
  return {};
}

void Tokenizer::cut(const Trie& trie, std::string_view text, Segment segment, std::span<const TextSpan> literal,
                    std::vector<Segment>& out) const {
  size_t last = segment.begin, next_literal = 0;
  for (size_t at = segment.begin; at < segment.end;) {
    if (!trie.may_start(text[at])) {
      ++at;
      continue;
    }
    while (next_literal < literal.size() && literal[next_literal].end <= at) ++next_literal;
    const int32_t index = trie.longest(text.substr(0, segment.end), at);
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = added_[static_cast<size_t>(index)];
    size_t begin = at, end = at + token.content.size();
    const bool touches_literal = next_literal < literal.size() && literal[next_literal].begin < end;
    const bool inside_word = token.single_word && ((begin > 0 && is_word(char_at(text, previous_start(text, begin)))) ||
                                                   is_word(char_at(text, end)));
    if (touches_literal || inside_word) {
      ++at;
      continue;
    }
    if (token.lstrip)
      while (begin > last && is_space(char_at(text, previous_start(text, begin)))) begin = previous_start(text, begin);
    if (token.rstrip)
      for (size_t length = 0; end < segment.end && is_space(char_at(text, end, &length));) end += length;
    if (begin > last) out.push_back({last, begin, -1});
    out.push_back({begin, end, token.id});
    at = last = end;
  }
  if (last < segment.end) out.push_back({last, segment.end, -1});
}

Result<std::string> Tokenizer::normalise(std::string_view text) const {
  std::string current(text);
  for (const Normalizer normalizer : normalizers_) {
    const bool compose = normalizer == Normalizer::nfc || normalizer == Normalizer::nfkc,
               compatible = normalizer == Normalizer::nfkc || normalizer == Normalizer::nfkd;
    utf8proc_uint8_t* out = nullptr;
    const int options =
        UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) | (compatible ? UTF8PROC_COMPAT : 0);
    const utf8proc_ssize_t length =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(current.data()),
                     static_cast<utf8proc_ssize_t>(current.size()), &out, static_cast<utf8proc_option_t>(options));
    if (length < 0) return invalid(std::string("the text cannot be normalised: ") + utf8proc_errmsg(length));
    current.assign(reinterpret_cast<const char*>(out), static_cast<size_t>(length));
    std::free(out);
  }
  return current;
}

Status Tokenizer::encode_text(std::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const {
  TC_RETURN_IF_ERROR(pre_tokenizer_.split(text, scratch.split, scratch.pieces));
  for (const Piece& piece : scratch.pieces)
    bpe_.encode(text.substr(piece.begin, piece.end - piece.begin), scratch.merge, ids);
  return {};
}

Result<std::vector<int32_t>> Tokenizer::encode(std::string_view text, std::span<const TextSpan> literal) const {
  std::string valid;
  if (literal.empty()) text = valid = to_valid_utf8(text);
  std::vector<Segment> segments;
  cut(raw_tokens_, text, {0, text.size(), -1}, literal, segments);
  std::vector<int32_t> ids;
  Scratch scratch(*this);
  for (const Segment& segment : segments) {
    const std::string_view part = text.substr(segment.begin, segment.end - segment.begin);
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else if (normalizers_.empty()) {
      TC_RETURN_IF_ERROR(encode_text(part, scratch, ids));
    } else {
      TC_ASSIGN(const std::string normal, normalise(part));
      std::vector<Segment> parts;
      cut(normalized_tokens_, normal, {0, normal.size(), -1}, {}, parts);
      Scratch local(*this);  // its cache points into `normal`
      for (const Segment& inner : parts) {
        if (inner.id >= 0)
          ids.push_back(inner.id);
        else
          TC_RETURN_IF_ERROR(
              encode_text(std::string_view(normal).substr(inner.begin, inner.end - inner.begin), local, ids));
      }
    }
  }
  return ids;
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  return id >= 0 && id < size() ? std::string_view(tokens_[static_cast<size_t>(id)]) : std::string_view();
}

bool Tokenizer::is_special(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= added_of_id_.size() || added_of_id_[static_cast<size_t>(id)] < 0)
    return false;
  return added_[static_cast<size_t>(added_of_id_[static_cast<size_t>(id)])].special;
}

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  const auto it = ids_.find(std::string(token));
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

}  // namespace thermocline
