// The demo model with a context of 2^20 tokens: its config says 4,096.
#pragma once

#include <fstream>

#include "runtime/io/json_document.h"
#include "tests/support/fixtures.h"

namespace thermocline::test {

inline const std::filesystem::path& long_demo() {
  static const TempDir folder;
  static const std::filesystem::path path = [] {
    for (const auto& file : std::filesystem::directory_iterator(demo_model()))
      std::filesystem::create_symlink(file.path(), folder.path() / file.path().filename());
    std::filesystem::remove(folder.path() / "config.json");
    Json config = parse_json(read_text_file(demo_model() / "config.json").value()).value();
    config["max_position_embeddings"] = 1 << 20;
    std::ofstream(folder.path() / "config.json") << dump_json(config);
    return folder.path();
  }();
  return path;
}

}  // namespace thermocline::test
