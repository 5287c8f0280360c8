// The pre-tokenizer of a tokenizer.json: cuts text into pieces that BPE never merges across. Patterns run in PCRE2 with
// JIT, UTF and UCP, under a match limit.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/io/json_document.h"

namespace thermocline {

/// A compiled pattern. Thread-safe.
class Regex {
 public:
  /// Errors: corrupt, with the offset in the pattern.
  static Result<Regex> compile(const std::string& pattern);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  struct Match {
    size_t begin = 0, end = 0;
  };
  /// Match state for one thread at a time.
  class Scratch {
   public:
    explicit Scratch(const Regex& regex);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class Regex;
    void* data_;
  };
  /// Finds the first match at or after `from`. text is well-formed UTF-8.
  /// Errors: invalid_argument when the match limit is reached.
  Result<bool> find(std::string_view text, size_t from, Scratch& scratch, Match& match) const;

 private:
  Regex() = default;
  void* code_ = nullptr;
};

/// Offsets of a piece in the text it was cut from.
struct Piece {
  size_t begin = 0, end = 0;
};

class PreTokenizer {
 public:
  /// Reads the "pre_tokenizer" member: a ByteLevel, a Split, Digits, or a Sequence of them.
  /// Errors: corrupt, unsupported; both name the part.
  static Result<PreTokenizer> parse(const SortedJson& json);

  /// Match state and buffers of one thread, kept from text to text.
  class Scratch {
   public:
    explicit Scratch(const PreTokenizer& pre_tokenizer) {
      for (const Step& step : pre_tokenizer.steps_) matches_.push_back(std::make_unique<Regex::Scratch>(step.regex));
    }

   private:
    friend class PreTokenizer;
    std::vector<std::unique_ptr<Regex::Scratch>> matches_;  // one a step
    std::vector<Piece> next_;
  };

  /// The pieces of `text` (well-formed UTF-8) in order. Errors: invalid_argument from a match limit.
  Status split(std::string_view text, Scratch& scratch, std::vector<Piece>& pieces) const;

 private:
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  struct Step {
    Regex regex;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
  };
  Status add(const SortedJson& json);
  Status add_split(const std::string& pattern, Behavior behavior, bool invert);
  static Status apply(const Step& step, Regex::Scratch& scratch, std::string_view text, const std::vector<Piece>& in,
                      std::vector<Piece>& out);
  std::vector<Step> steps_;
};

}  // namespace thermocline
