// Byte-pair merging by rank, with a heap: n bytes cost O(n log n) whatever they are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/io/json_document.h"

namespace thermocline {

class BpeModel {
 public:
  /// Reads the "model" member of a tokenizer.json (type BPE, byte-level vocabulary). token_bytes gets every token's raw
  /// bytes by id; ids without a token stay empty. Errors: corrupt, unsupported.
  static Result<BpeModel> parse(const SortedJson& json, std::vector<std::string>& token_bytes);

  /// Buffers of one encoding thread, and a cache of pieces already merged.
  class Scratch {
    friend class BpeModel;
    struct Symbol {
      int32_t id, previous, next;
    };
    struct Candidate {
      int32_t rank, position, left, right, merged;
      bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : position > o.position; }
    };
    std::vector<Symbol> symbols_;
    std::vector<Candidate> heap_;
    std::unordered_map<std::string_view, std::pair<uint32_t, uint32_t>> cache_;  // piece -> range of cached_ids_
    std::vector<int32_t> cached_ids_;
  };

  /// Appends the tokens of one piece. Pieces given to one scratch stay alive as long as it does.
  void encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank, id;
  };
  void merge(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void consider(Scratch& scratch, int32_t left) const;

  int32_t byte_ids_[256];
  std::unordered_map<uint64_t, Merge> merges_;             // (left id, right id) -> rank and result
  std::unordered_map<std::string, int32_t> whole_pieces_;  // ignore_merges: pieces that are a token
};

}  // namespace thermocline
