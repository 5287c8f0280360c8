#include "runtime/text/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <deque>

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

// The same bytes as well-formed UTF-8, and the spans moved along: rising, disjoint, in whole characters.
std::string well_formed(std::string_view bytes, std::vector<TextSpan>& spans) {
  for (TextSpan& span : spans) span = {std::min(span.begin, bytes.size()), std::min(span.end, bytes.size())};
  std::erase_if(spans, [](const TextSpan& span) { return span.begin >= span.end; });
  std::sort(spans.begin(), spans.end(), [](const TextSpan& a, const TextSpan& b) { return a.begin < b.begin; });
  std::string text;
  text.reserve(bytes.size());
  std::vector<TextSpan> moved;
  size_t next = 0, literal_until = 0;  // the first span that begins at or after here, the end of those before
  for (size_t at = 0; at < bytes.size();) {
    int length = utf8_length(bytes.substr(at, 4));
    const bool good = length > 0;
    if (length == 0) length = static_cast<int>(bytes.size() - at);  // the text ends inside a character
    const size_t end = at + static_cast<size_t>(good || length > 0 ? length : -length), begin = text.size();
    text += good ? bytes.substr(at, end - at) : "\xef\xbf\xbd";
    for (; next < spans.size() && spans[next].begin < end; ++next)
      literal_until = std::max(literal_until, spans[next].end);
    if (literal_until > at) {
      if (!moved.empty() && moved.back().end == begin)
        moved.back().end = text.size();
      else
        moved.push_back({begin, text.size()});
    }
    at = end;
  }
  spans = std::move(moved);
  return text;
}

// How many characters around a cut decide whether normalisation crosses it: what composes is at most a few long.
constexpr int kNormalWindow = 8;

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

// Whether the parts on both sides of a byte normalise as they do together.
Result<bool> Tokenizer::separable(std::string_view text, size_t at) const {
  if (at == 0 || at == text.size()) return true;
  if (utf8proc_get_property(char_at(text, at))->combining_class != 0) return false;
  size_t begin = at, end = at;
  for (int i = 0; i < kNormalWindow && begin > 0; ++i) begin = previous_start(text, begin);
  for (size_t i = 0, length = 0; i < kNormalWindow && end < text.size(); ++i, end += length)
    char_at(text, end, &length);
  TC_ASSIGN(const std::string left, normalise(text.substr(begin, at - begin)));
  TC_ASSIGN(const std::string right, normalise(text.substr(at, end - at)));
  TC_ASSIGN(const std::string both, normalise(text.substr(begin, end - begin)));
  return both == left + right;
}

// The normalised text, and the spans in it. A span that ends where characters join takes those in.
Result<std::string> Tokenizer::normalise(std::string_view text, std::vector<TextSpan>& literal) const {
  std::string out;
  std::vector<TextSpan> moved;
  size_t done = 0;
  const auto up_to = [&](size_t end) -> Status {
    TC_ASSIGN(const std::string part, normalise(text.substr(done, end - done)));
    out += part;
    done = end;
    return {};
  };
  for (size_t i = 0; i < literal.size(); ++i) {
    auto [begin, end] = literal[i];
    while (begin > done) {
      TC_ASSIGN(const bool cut, separable(text, begin));
      if (cut) break;
      begin = previous_start(text, begin);
    }
    // On to the end; spans that this one reaches become part of it.
    for (size_t length = 0; end < text.size(); end += length) {
      for (; i + 1 < literal.size() && literal[i + 1].begin <= end; ++i) end = std::max(end, literal[i + 1].end);
      TC_ASSIGN(const bool cut, separable(text, end));
      if (cut) break;
      char_at(text, end, &length);
    }
    TC_RETURN_IF_ERROR(up_to(std::max(begin, done)));
    const size_t from = out.size();
    TC_RETURN_IF_ERROR(up_to(end));
    moved.push_back({from, out.size()});
  }
  TC_RETURN_IF_ERROR(up_to(text.size()));
  literal = std::move(moved);
  return out;
}

Status Tokenizer::encode_text(std::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const {
  TC_RETURN_IF_ERROR(pre_tokenizer_.split(text, scratch.split, scratch.pieces));
  for (const Piece& piece : scratch.pieces)
    bpe_.encode(text.substr(piece.begin, piece.end - piece.begin), scratch.merge, ids);
  return {};
}

// Text between added tokens: it is normalised, and the added tokens that want normalised text are cut out.
Status Tokenizer::encode_normalised(const std::string& text, const std::vector<TextSpan>& literal, Scratch& scratch,
                                    std::vector<int32_t>& ids) const {
  std::vector<Segment> parts;
  cut(normalized_tokens_, text, {0, text.size(), -1}, literal, parts);
  for (const Segment& part : parts) {
    if (part.id >= 0)
      ids.push_back(part.id);
    else
      TC_RETURN_IF_ERROR(encode_text(std::string_view(text).substr(part.begin, part.end - part.begin), scratch, ids));
  }
  return {};
}

Result<std::vector<int32_t>> Tokenizer::encode(std::string_view bytes, std::span<const TextSpan> literal) const {
  std::vector<TextSpan> spans(literal.begin(), literal.end());
  const std::string text = well_formed(bytes, spans);
  std::vector<Segment> segments;
  cut(raw_tokens_, text, {0, text.size(), -1}, spans, segments);
  std::vector<int32_t> ids;
  std::deque<std::string> normalised;  // scratch points into its texts
  Scratch scratch(*this);
  size_t next = 0;
  for (const Segment& segment : segments) {
    const std::string_view part = std::string_view(text).substr(segment.begin, segment.end - segment.begin);
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else if (normalizers_.empty()) {
      TC_RETURN_IF_ERROR(encode_text(part, scratch, ids));
    } else {
      std::vector<TextSpan> inside;
      while (next < spans.size() && spans[next].end <= segment.begin) ++next;
      for (size_t i = next; i < spans.size() && spans[i].begin < segment.end; ++i)
        inside.push_back({std::max(spans[i].begin, segment.begin) - segment.begin,
                          std::min(spans[i].end, segment.end) - segment.begin});
      TC_ASSIGN(std::string normal, normalise(part, inside));
      TC_RETURN_IF_ERROR(encode_normalised(normalised.emplace_back(std::move(normal)), inside, scratch, ids));
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
