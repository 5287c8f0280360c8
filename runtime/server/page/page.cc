#include "runtime/server/page/page.h"

#include <algorithm>
#include <cctype>

#include "runtime/server/page/page_files.h"

namespace thermocline::server {
namespace {

using Headers = std::vector<std::pair<std::string, std::string>>;

// Nothing but our own files and our own API, and nobody's frame.
constexpr const char* kPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

const PageFile* file_of(std::string_view path) {
  constexpr std::string_view folder = "/page/";
  if (path != "/" && !path.starts_with(folder)) return nullptr;
  const std::string_view name = path == "/" ? "index.html" : path.substr(folder.size());
  const std::span<const PageFile> files = page_files();
  const auto file = std::find_if(files.begin(), files.end(), [&](const PageFile& f) { return f.name == name; });
  return file == files.end() ? nullptr : &*file;
}

std::string type_of(std::string_view name) {
  if (name.ends_with(".html")) return "text/html; charset=utf-8";
  if (name.ends_with(".js")) return "text/javascript; charset=utf-8";
  if (name.ends_with(".css")) return "text/css; charset=utf-8";
  return name.ends_with(".svg") ? "image/svg+xml" : "application/octet-stream";
}

// The items of a header's list, lower case and without spaces.
std::vector<std::string> items_of(std::string_view list) {
  std::vector<std::string> items(1);
  for (const char c : list) {
    if (c == ',')
      items.emplace_back();
    else if (c != ' ' && c != '\t')
      items.back() += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return items;
}

// `q=0` is a no, with any number of zeros behind the point.
bool takes_gzip(const std::string& accept_encoding) {
  for (const std::string& item : items_of(accept_encoding)) {
    const size_t end = item.find(';');
    if (item.substr(0, end) != "gzip") continue;
    const size_t quality = item.find("q=");
    return quality == std::string::npos || item.find_first_of("123456789", quality) != std::string::npos;
  }
  return false;
}

bool has_already(const std::string& if_none_match, const std::string& etag) {
  for (const std::string& item : items_of(if_none_match))
    if (item == "*" || item == etag || item == "w/" + etag) return true;
  return false;
}

}  // namespace

std::optional<Reply> page_reply(const std::string& path, const HttpHead& head) {
  const PageFile* const file = file_of(path);
  if (!file) return std::nullopt;
  const bool gzip = takes_gzip(head.accept_encoding);
  const std::string etag = "\"" + std::string(file->hash) + (gzip ? "-gz" : "") + "\"";
  Headers headers = {{"ETag", etag},
                     {"Cache-Control", "no-cache"},
                     {"Vary", "Accept-Encoding"},
                     {"Content-Security-Policy", kPolicy},
                     {"X-Content-Type-Options", "nosniff"},
                     {"Referrer-Policy", "no-referrer"}};
  if (has_already(head.if_none_match, etag)) return Reply{304, "", std::move(headers)};
  headers.emplace_back("Content-Type", type_of(file->name));
  if (gzip) headers.emplace_back("Content-Encoding", "gzip");
  return Reply{200, std::string(gzip ? file->gzip : file->bytes), std::move(headers)};
}

std::vector<Endpoint> page_endpoints(Services&) {
  const auto answer = [](const Call& call) -> Outcome {
    if (std::optional<Reply> reply = page_reply(call.path, call.http.head)) return std::move(*reply);
    return error_reply(404, "not_found_error", "not_found", "the page has no " + call.path.substr(0, 200));
  };
  using enum Endpoint::Access;
  return {{.method = "GET", .path = "/", .access = open, .model = false, .answer = answer},
          {.method = "GET", .path = "/page/*", .access = open, .model = false, .answer = answer}};
}

}  // namespace thermocline::server
