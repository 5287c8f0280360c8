#include "runtime/text/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <utility>

namespace thermocline {
namespace {

constexpr uint32_t kMatchLimit = 50'000'000;
constexpr size_t kMaxPatternBytes = 1 << 16;

// The pattern of a ByteLevel pre-tokenizer with use_regex (GPT-2).
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// \s in Oniguruma and in Rust is the White_Space property; PCRE2's has U+180E too. So \s is spelled out.
constexpr const char* kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

std::string spell_out_white_space(const std::string& pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's')
        out += in_class ? std::string(kWhiteSpace) : "[" + std::string(kWhiteSpace) + "]";
      else if (escaped == 'S' && !in_class)
        out += "[^" + std::string(kWhiteSpace) + "]";
      else
        (out += '\\') += escaped;
      continue;
    }
    if (c == '[' && !in_class) {
      in_class = true;
      out += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
      continue;
    }
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

std::string escape_literal(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 128 && !std::isalnum(static_cast<unsigned char>(c))) out += '\\';
    out += c;
  }
  return out;
}

pcre2_code* code_of(void* code) { return static_cast<pcre2_code*>(code); }

}  // namespace

Result<Regex> Regex::compile(const std::string& pattern) {
  if (pattern.size() > kMaxPatternBytes)
    return corrupt("a pattern of " + std::to_string(pattern.size()) + " bytes is too long");
  const std::string text = spell_out_white_space(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  Regex regex;
  regex.code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (!regex.code_) {
    char message[256] = {};
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof message);
    return corrupt("pattern '" + pattern + "': " + message + " at offset " + std::to_string(offset));
  }
  pcre2_jit_compile(code_of(regex.code_), PCRE2_JIT_COMPLETE);  // where JIT is refused, matching is interpreted
  return regex;
}

Regex::Regex(Regex&& other) noexcept : code_(std::exchange(other.code_, nullptr)) {}
Regex& Regex::operator=(Regex&& other) noexcept {
  std::swap(code_, other.code_);
  return *this;
}
Regex::~Regex() { pcre2_code_free(code_of(code_)); }

namespace {

struct MatchState {
  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

}  // namespace

Regex::Scratch::Scratch(const Regex& regex) {
  auto* state =
      new MatchState{pcre2_match_data_create_from_pattern(code_of(regex.code_), nullptr),
                     pcre2_match_context_create(nullptr), pcre2_jit_stack_create(32 * 1024, 1024 * 1024, nullptr)};
  pcre2_set_match_limit(state->context, kMatchLimit);
  pcre2_jit_stack_assign(state->context, nullptr, state->stack);
  data_ = state;
}

Regex::Scratch::~Scratch() {
  auto* state = static_cast<MatchState*>(data_);
  pcre2_match_data_free(state->data);
  pcre2_match_context_free(state->context);
  pcre2_jit_stack_free(state->stack);
  delete state;
}

Result<bool> Regex::find(std::string_view text, size_t from, Scratch& scratch, Match& match) const {
  auto* state = static_cast<MatchState*>(scratch.data_);
  const int rc = pcre2_match(code_of(code_), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                             PCRE2_NO_UTF_CHECK, state->data, state->context);
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  if (rc < 0)
    return invalid("the tokenizer's pattern needs more than " + std::to_string(kMatchLimit) +
                   " steps on this text (PCRE2 error " + std::to_string(rc) + ")");
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(state->data);
  match = {offsets[0], offsets[1]};
  return true;
}

Result<PreTokenizer> PreTokenizer::parse(const SortedJson& json) {
  PreTokenizer pre_tokenizer;
  if (json.is_null()) return pre_tokenizer;
  TC_RETURN_IF_ERROR(pre_tokenizer.add(json));
  return pre_tokenizer;
}

Status PreTokenizer::add_split(const std::string& pattern, Behavior behavior, bool invert) {
  TC_ASSIGN(Regex regex, Regex::compile(pattern));
  steps_.push_back({std::move(regex), behavior, invert});
  return {};
}

Status PreTokenizer::add(const SortedJson& json) {
  TC_ASSIGN(const std::string type, get_string(json, "type"));
  const auto flag = [&](const char* name, bool fallback) {
    return json.contains(name) && json[name].is_boolean() ? json[name].get<bool>() : fallback;
  };
  if (type == "Sequence") {
    if (!json.contains("pretokenizers") || !json["pretokenizers"].is_array())
      return corrupt("field 'pretokenizers' is missing or no array");
    for (const SortedJson& part : json["pretokenizers"]) TC_RETURN_IF_ERROR(add(part));
    return {};
  }
  if (type == "ByteLevel") {
    if (flag("add_prefix_space", true)) return unsupported("ByteLevel with add_prefix_space is not supported");
    return flag("use_regex", true) ? add_split(kByteLevelPattern, Behavior::isolated, false) : Status();
  }
  if (type == "Digits")
    return add_split(flag("individual_digits", false) ? "\\p{N}" : "\\p{N}+", Behavior::isolated, false);
  if (type != "Split") return unsupported("pre-tokenizer '" + type + "' is none of Sequence, Split, ByteLevel, Digits");

  TC_ASSIGN(const std::string behavior, get_string(json, "behavior"));
  static constexpr std::pair<const char*, Behavior> kBehaviors[] = {
      {"Isolated", Behavior::isolated},
      {"Removed", Behavior::removed},
      {"MergedWithPrevious", Behavior::merged_with_previous},
      {"MergedWithNext", Behavior::merged_with_next},
      {"Contiguous", Behavior::contiguous}};
  if (!json.contains("pattern") || !json["pattern"].is_object())
    return corrupt("field 'pattern' of a Split is missing or no object");
  const SortedJson& pattern = json["pattern"];
  std::string text;
  if (pattern.contains("Regex")) {
    TC_ASSIGN(text, get_string(pattern, "Regex"));
  } else {
    TC_ASSIGN(text, get_string(pattern, "String"));
    text = escape_literal(text);
  }
  for (const auto& [name, value] : kBehaviors)
    if (behavior == name) return add_split(text, value, flag("invert", false));
  return unsupported("Split behavior '" + behavior + "' is not supported");
}

Status PreTokenizer::split(std::string_view text, Scratch& scratch, std::vector<Piece>& pieces) const {
  pieces.clear();
  if (!text.empty()) pieces.push_back({0, text.size()});
  for (size_t i = 0; i < steps_.size(); ++i) {
    scratch.next_.clear();
    TC_RETURN_IF_ERROR(apply(steps_[i], *scratch.matches_[i], text, pieces, scratch.next_));
    std::swap(pieces, scratch.next_);
  }
  return {};
}

// A piece is a text of its own: look-ahead and anchors stop at its end.
Status PreTokenizer::apply(const Step& step, Regex::Scratch& scratch, std::string_view text,
                           const std::vector<Piece>& in, std::vector<Piece>& out) {
  struct Part {
    Piece piece;
    bool matched;
  };
  std::vector<Part> parts;
  for (const Piece& piece : in) {
    const std::string_view subject = text.substr(piece.begin, piece.end - piece.begin);
    parts.clear();
    size_t last = 0;
    for (size_t from = 0; from <= subject.size();) {
      Regex::Match match;
      TC_ASSIGN(const bool found, step.regex.find(subject, from, scratch, match));
      if (!found) break;
      if (match.end == match.begin) {  // an empty match cuts nothing; look on one character later
        from = match.end + 1;
        while (from < subject.size() && (static_cast<unsigned char>(subject[from]) & 0xc0) == 0x80) ++from;
        continue;
      }
      if (match.begin > last) parts.push_back({{piece.begin + last, piece.begin + match.begin}, step.invert});
      parts.push_back({{piece.begin + match.begin, piece.begin + match.end}, !step.invert});
      from = last = match.end;
    }
    if (last < subject.size()) parts.push_back({{piece.begin + last, piece.end}, step.invert});

    const size_t first_out = out.size();
    for (size_t i = 0; i < parts.size(); ++i) {
      const auto& [part, matched] = parts[i];
      const bool has_previous = out.size() > first_out;
      switch (step.behavior) {
        case Behavior::isolated:
          out.push_back(part);
          break;
        case Behavior::removed:
          if (!matched) out.push_back(part);
          break;
        case Behavior::merged_with_previous:
          if (matched && has_previous && !parts[i - 1].matched)
            out.back().end = part.end;
          else
            out.push_back(part);
          break;
        case Behavior::merged_with_next:
          if (i > 0 && !matched && parts[i - 1].matched)
            out.back().end = part.end;
          else
            out.push_back(part);
          break;
        case Behavior::contiguous:
          if (i > 0 && matched == parts[i - 1].matched)
            out.back().end = part.end;
          else
            out.push_back(part);
          break;
      }
    }
  }
  return {};
}

}  // namespace thermocline
