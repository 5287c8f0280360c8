#include "runtime/server/http/guard.h"

#include <algorithm>
#include <boost/asio/ip/address.hpp>

namespace thermocline::server {
namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

bool is_digits(std::string_view text) {
  return text.size() <= 5 && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

bool is_name(std::string_view text) {
  const auto ok = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
  };
  return !text.empty() && text.size() <= 255 && std::all_of(text.begin(), text.end(), ok);
}

bool is_loopback(const std::string& host) {
  if (host == "localhost") return true;
  boost::system::error_code error;
  const auto address = boost::asio::ip::make_address(host, error);
  return !error && address.is_loopback();
}

}  // namespace

std::optional<Authority> parse_authority(std::string_view text) {
  Authority parts;
  std::string_view rest;
  boost::system::error_code error;
  if (text.starts_with('[')) {
    const size_t end = text.find(']');
    if (end == std::string_view::npos) return std::nullopt;
    const auto address = boost::asio::ip::make_address_v6(std::string(text.substr(1, end - 1)), error);
    if (error) return std::nullopt;
    parts.host = address.to_string();
    rest = text.substr(end + 1);
  } else {
    const size_t colon = std::min(text.find(':'), text.size());
    parts.host = lower(text.substr(0, colon));
    if (parts.host.size() > 1 && parts.host.back() == '.') parts.host.pop_back();  // the root's dot means the same name
    if (!is_name(parts.host)) return std::nullopt;
    rest = text.substr(colon);
  }
  if (rest.empty()) return parts;
  if (rest.front() != ':' || !is_digits(rest.substr(1))) return std::nullopt;
  parts.port = rest.substr(1);
  return parts;
}

bool is_origin(std::string_view text) {
  const size_t scheme = text.find("://");
  return scheme != std::string_view::npos && parse_authority(text.substr(scheme + 3));
}

bool is_local_address(const std::string& address) { return address.starts_with("unix:") || is_loopback(address); }

HostGuard::HostGuard(const std::string& address, const std::vector<std::string>& allowed,
                     const std::vector<std::string>& origins)
    : address_(address) {
  for (const std::string& origin : origins) origins_.push_back(lower(origin));
  for (const std::string& name : allowed) {
    any_ |= name == "*";
    const std::optional<Authority> parts = parse_authority(name);
    if (parts) allowed_.push_back(parts->port.empty() ? parts->host : parts->host + ":" + parts->port);
  }
  enforced_ = is_loopback(address) || !allowed.empty();
}

bool HostGuard::listed(const Authority& host) const {
  return any_ || std::any_of(allowed_.begin(), allowed_.end(), [&](const std::string& name) {
           return name == host.host || name == host.host + ":" + host.port;
         });
}

bool HostGuard::allows_host(const Authority& host, std::string_view local_address) const {
  return !enforced_ || is_loopback(host.host) || host.host == address_ || host.host == local_address || listed(host);
}

bool HostGuard::allows_origin(std::string_view origin, const std::optional<Authority>& host) const {
  for (const std::string& listed : origins_)
    if (listed == "*" || listed == lower(origin)) return true;
  const size_t scheme = origin.find("://");
  if (scheme == std::string_view::npos) return false;  // "null": a sandboxed frame or a file
  const std::optional<Authority> from = parse_authority(origin.substr(scheme + 3));
  if (!from) return false;
  return host && from->host == host->host && from->port == host->port;
}

}  // namespace thermocline::server
