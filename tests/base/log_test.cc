// runtime/base/log_lines.h: nothing that a message quotes begins a line of its own.
#include "runtime/base/log_lines.h"

#include <gtest/gtest.h>

#include "runtime/io/json_document.h"

namespace thermocline {
namespace {

const std::string kForgery =
    "request x\nerror the disk is full\r\x1b[2K\x1b[31merror\x07 \x7f\xc2\x9b"
    "1A tab\there";

TEST(LogLines, TextKeepsAMessageToItsLine) {
  const std::string line = log_text(kForgery);
  for (const char c : line) EXPECT_TRUE(c == '\n' || c == '\t' || static_cast<unsigned char>(c) >= ' ') << line;
  EXPECT_EQ(line, "request x\n  error the disk is full\\x0d\\x1b[2K\\x1b[31merror\\x07 \\x7f\\u009b1A tab\there");
  EXPECT_EQ(log_text("Grüße, 温跃层"), "Grüße, 温跃层");
  EXPECT_EQ(log_text("ends in \xc2"), "ends in \xc2");
  EXPECT_EQ(log_text("memory\nhost\n  KV  1\n\nerror"), "memory\n  host\n  KV  1\n  \n  error");
}

TEST(LogLines, JsonIsOneObjectALine) {
  for (const std::string& message : {kForgery, std::string("no UTF-8: \xff\xfe"), std::string("zero \0 byte", 11),
                                     std::string("\"},{\"level\":\"error"), std::string()}) {
    const std::string line = log_json(12.5, "info", message);
    for (const char c : line) EXPECT_GE(static_cast<unsigned char>(c), ' ') << line;
    const Result<Json> json = parse_json(line);
    ASSERT_TRUE(json.has_value()) << line;
    EXPECT_EQ(json->size(), 3u);
    EXPECT_EQ(json->at("level"), "info");
    EXPECT_EQ(json->at("time"), 12.5);
    if (message.find(static_cast<char>(0xff)) == std::string::npos) {
      EXPECT_EQ(json->at("message"), message);
    }
  }
}

}  // namespace
}  // namespace thermocline
