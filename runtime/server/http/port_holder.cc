#include "runtime/server/http/port_holder.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

namespace thermocline::server {
namespace {

namespace fs = std::filesystem;

// Lines of net/tcp: "sl local_address:port remote state tx:rx tr:when retrnsmt uid timeout inode", numbers but the last
// in hexadecimal. State 0A listens.
void add_listening_sockets(const fs::path& table, uint16_t port, std::set<std::string>& inodes) {
  std::ifstream in(table);
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    std::vector<std::string> fields;
    for (std::string word; words >> word;) fields.push_back(word);
    if (fields.size() < 10 || fields[3] != "0A") continue;
    const std::string& local = fields[1];
    const size_t colon = local.rfind(':');
    unsigned found = 0;
    if (colon == std::string::npos) continue;
    std::from_chars(local.data() + colon + 1, local.data() + local.size(), found, 16);
    if (found == port) inodes.insert("socket:[" + fields[9] + "]");
  }
}

bool has_socket(const fs::path& process, const std::set<std::string>& inodes) {
  std::error_code error;
  for (fs::directory_iterator file(process / "fd", error), end; !error && file != end; file.increment(error)) {
    std::error_code unread;
    if (inodes.count(fs::read_symlink(file->path(), unread).string()) > 0) return true;
  }
  return false;
}

}  // namespace

std::string port_holder(uint16_t port, const fs::path& proc) {
  std::set<std::string> inodes;
  for (const char* const table : {"net/tcp", "net/tcp6"}) add_listening_sockets(proc / table, port, inodes);
  if (inodes.empty()) return "";
  std::error_code error;
  for (fs::directory_iterator process(proc, error), end; !error && process != end; process.increment(error)) {
    const std::string pid = process->path().filename().string();
    if (!std::all_of(pid.begin(), pid.end(), [](unsigned char c) { return std::isdigit(c); })) continue;
    if (!has_socket(process->path(), inodes)) continue;
    std::string name;
    std::ifstream comm(process->path() / "comm");
    std::getline(comm, name);
    return (name.empty() ? "a process" : name) + " (pid " + pid + ")";
  }
  return "";
}

}  // namespace thermocline::server
