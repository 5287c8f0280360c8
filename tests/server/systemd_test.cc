// What systemd hears, by a socket of the test in its place.
#include "runtime/server/systemd.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace thermocline::server {
namespace {

using std::chrono::seconds;

struct Environment {
  explicit Environment(const std::string& socket) { set("NOTIFY_SOCKET", socket); }
  ~Environment() {
    for (const char* name : {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}) unsetenv(name);
  }
  void set(const char* name, const std::string& value) { setenv(name, value.c_str(), 1); }
};

// Listens where NOTIFY_SOCKET says.
class Manager {
 public:
  explicit Manager(const std::string& address) : address_(address) {
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    std::memcpy(at.sun_path, address.data(), address.size());
    if (address[0] == '@') at.sun_path[0] = 0;
    fd_ = socket(AF_UNIX, SOCK_DGRAM, 0);
    const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
    EXPECT_EQ(bind(fd_, reinterpret_cast<const sockaddr*>(&at), size), 0) << address;
  }
  ~Manager() {
    close(fd_);
    if (address_[0] == '/') unlink(address_.c_str());
  }
  // The next datagram; empty where none has come.
  std::string next() {
    char buffer[4096];
    const ssize_t n = recv(fd_, buffer, sizeof(buffer), MSG_DONTWAIT);
    return n > 0 ? std::string(buffer, static_cast<size_t>(n)) : "";
  }

 private:
  const std::string address_;
  int fd_ = -1;
};

std::string path(const char* name) { return testing::TempDir() + name + std::to_string(getpid()); }

void expect_a_whole_life(const std::string& address) {
  Manager manager(address);
  const Environment environment(address);
  Systemd systemd;
  systemd.loading(0.42);
  EXPECT_EQ(manager.next(), "STATUS=loading the model: 42 %\nEXTEND_TIMEOUT_USEC=300000000");
  systemd.loading(0.43);
  EXPECT_EQ(manager.next(), "") << "within a second of the last";
  systemd.ready("serving demo");
  EXPECT_EQ(manager.next(), "READY=1\nSTATUS=serving demo");
  systemd.reloading();
  EXPECT_TRUE(manager.next().starts_with("RELOADING=1\nMONOTONIC_USEC="));
  systemd.alive();
  EXPECT_EQ(manager.next(), "WATCHDOG=1");
  systemd.stopping(seconds(30));
  EXPECT_EQ(manager.next(), "STOPPING=1\nSTATUS=draining: answers in progress end\nEXTEND_TIMEOUT_USEC=90000000");
}

TEST(Systemd, HearsOfAWholeLifeAtAPath) { expect_a_whole_life(path("notify")); }
TEST(Systemd, HearsOfAWholeLifeAtAnAbstractName) { expect_a_whole_life("@" + path("notify")); }

TEST(Systemd, NobodyListens) {
  Systemd none;  // no variable at all
  none.ready("x");
  EXPECT_FALSE(none.alive_period());
  for (const std::string& address :
       {path("nobody"), std::string("relative"), std::string("@"), std::string(200, '/'), std::string("vsock:2:1")}) {
    Environment environment(address);
    environment.set("WATCHDOG_USEC", "1000000");
    Systemd systemd;
    systemd.ready("x");
    EXPECT_FALSE(systemd.alive_period()) << address;
  }
  auto manager = std::make_unique<Manager>(path("gone"));
  const Environment environment(path("gone"));
  Systemd systemd;
  manager.reset();
  systemd.ready("x");  // a log line, no signal
}

TEST(Systemd, AFullSocketCostsASecondAtMost) {
  Manager manager(path("full"));
  const Environment environment(path("full"));
  Systemd systemd;
  const auto start = std::chrono::steady_clock::now();
  int sent = 0;
  for (; sent < 10'000 && std::chrono::steady_clock::now() - start < std::chrono::milliseconds(900); ++sent)
    systemd.alive();
  EXPECT_LT(sent, 10'000) << "the queue was never full";
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(30));
}

TEST(Systemd, TheWatchdogIsFedTwiceAsOftenAsItAsks) {
  Manager manager(path("dog"));
  Environment environment(path("dog"));
  EXPECT_FALSE(Systemd().alive_period());
  environment.set("WATCHDOG_USEC", "30000000");
  EXPECT_EQ(Systemd().alive_period(), seconds(15));
  environment.set("WATCHDOG_PID", std::to_string(getpid()));
  EXPECT_EQ(Systemd().alive_period(), seconds(15));
  environment.set("WATCHDOG_PID", "1");
  EXPECT_FALSE(Systemd().alive_period()) << "it waits for another process";
  environment.set("WATCHDOG_PID", "");
  for (const char* wrong : {"0", "-5", "soon", "99999999999999999999"}) {
    environment.set("WATCHDOG_USEC", wrong);
    EXPECT_FALSE(Systemd().alive_period()) << wrong;
  }
}

}  // namespace
}  // namespace thermocline::server
