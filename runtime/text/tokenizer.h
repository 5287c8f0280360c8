// Byte-level BPE from a tokenizer.json of the DeepSeek / Qwen / Llama-3 kind. Encoding: added tokens are cut out first,
// the text between them is normalised, pre-tokenised and merged.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/text/bpe.h"
#include "runtime/text/pre_tokenizer.h"

namespace thermocline {

/// Bytes [begin, end) of a text in which no special token is recognised: what a user or a tool wrote.
struct TextSpan {
  size_t begin = 0, end = 0;
};

/// Immutable after loading; any thread may encode.
class Tokenizer {
 public:
  /// Reads `folder`/tokenizer.json. Errors: not_found; corrupt and unsupported, naming file and field.
  static Result<std::unique_ptr<Tokenizer>> load(const std::filesystem::path& folder);
  static Result<std::unique_ptr<Tokenizer>> parse(std::string_view json_text);

  /// The tokens of any bytes; ill-formed UTF-8 is replaced by U+FFFD first. Added tokens written in the text are
  /// recognised, except where they, or the text they are normalised from, touch one of the `literal` spans (bytes of
  /// `text`, in any order). Otherwise spans change nothing: text is normalised and merged across their ends. Nothing is
  /// added. Errors: invalid_argument from the pattern's match limit.
  Result<std::vector<int32_t>> encode(std::string_view text, std::span<const TextSpan> literal = {}) const;

  /// The bytes of a token; empty for an id without one. They may be part of a UTF-8 character.
  std::string_view token_bytes(int32_t id) const;
  bool is_special(int32_t id) const;
  /// The id of an added or vocabulary token with exactly this text.
  std::optional<int32_t> id_of(std::string_view token) const;
  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }

 private:
  struct AddedToken {
    int32_t id = 0;
    std::string content;
    bool single_word = false, lstrip = false, rstrip = false, special = false;
  };
  /// Finds the longest added token at a position.
  class Trie {
   public:
    void insert(std::string_view content, int32_t index);
    /// Index of the longest token that starts at text[at], or -1.
    int32_t longest(std::string_view text, size_t at) const;
    bool may_start(char byte) const { return starts_[static_cast<unsigned char>(byte)]; }

   private:
    struct Node {
      std::vector<std::pair<unsigned char, int32_t>> children;
      int32_t token = -1;
    };
    std::vector<Node> nodes_ = std::vector<Node>(1);
    bool starts_[256] = {};
  };
  struct Segment {
    size_t begin, end;
    int32_t id;  // of an added token, or -1 for text
  };
  enum class Normalizer { none, nfc, nfd, nfkc, nfkd };

  Tokenizer() = default;
  Status read_normalizer(const SortedJson& json);
  Status read_added_tokens(const SortedJson& json);
  void cut(const Trie& trie, std::string_view text, Segment segment, std::span<const TextSpan> literal,
           std::vector<Segment>& out) const;
  Result<std::string> normalise(std::string_view text) const;
  Result<bool> separable(std::string_view text, size_t at) const;
  Result<std::string> normalise(std::string_view text, std::vector<TextSpan>& literal) const;
  struct Scratch {
    explicit Scratch(const Tokenizer& tokenizer) : split(tokenizer.pre_tokenizer_) {}
    PreTokenizer::Scratch split;
    BpeModel::Scratch merge;
    std::vector<Piece> pieces;
  };
  Status encode_normalised(const std::string& text, const std::vector<TextSpan>& literal, Scratch& scratch,
                           std::vector<int32_t>& ids) const;
  Status encode_text(std::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const;

  std::vector<std::string> tokens_;  // raw bytes by id
  std::vector<AddedToken> added_;
  std::vector<int32_t> added_of_id_;  // index into added_, or -1
  Trie raw_tokens_, normalized_tokens_;
  std::vector<Normalizer> normalizers_;
  PreTokenizer pre_tokenizer_;
  BpeModel bpe_;
  std::unordered_map<std::string, int32_t> ids_;
};

}  // namespace thermocline
