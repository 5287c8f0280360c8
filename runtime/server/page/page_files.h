// What runtime/cmake/embed_files.cmake makes of the page's files.
#pragma once

#include <span>
#include <string_view>

namespace thermocline::server {

struct PageFile {
  std::string_view name;  // chat.js
  std::string_view hash;  // of the content, hex
  std::string_view bytes, gzip;
};

std::span<const PageFile> page_files();

}  // namespace thermocline::server
