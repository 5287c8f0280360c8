// runtime/io: JSON from strangers.
#include <gtest/gtest.h>

#include "runtime/io/json_document.h"

namespace thermocline {
namespace {

std::string error_of(const std::string& text, const JsonLimits& limits = {}) {
  const Result<Json> json = parse_bounded_json(text, limits);
  return json ? "" : json.error().message;
}

TEST(BoundedJson, ReadsWhatTheOrdinaryParserReads) {
  for (const char* text : {"null", "true", "-5", "18446744073709551615", "1.5e3", "\"a\\u00e9\\n\"", "[]", "{}",
                           "[1,[2,[3]],{\"b\":1,\"a\":[{}]}]", " { \"z\" : [ 1 , 2 ] , \"a\" : null } "})
    EXPECT_EQ(parse_bounded_json(text, {}).value(), parse_json(text).value()) << text;
  EXPECT_EQ(dump_json(parse_bounded_json("{\"z\":1,\"a\":2}", {}).value()), "{\"z\":1,\"a\":2}")
      << "in the order they came";
}

TEST(BoundedJson, RefusesWhatIsNoJsonAndSaysWhere) {
  EXPECT_EQ(error_of("[1,2"), "JSON ends too early, at byte 4");
  EXPECT_EQ(error_of(""), "JSON ends too early, at byte 0");
  EXPECT_EQ(error_of("[1,x]"), "not JSON at byte 3");
  for (const char* text : {"{\"a\":\"\\ud83d\"}", "\"\xff\"", "{} {}", "[1e999]"})
    EXPECT_NE(error_of(text), "") << text;
}

TEST(BoundedJson, WhatItCannotHoldIsNamedByItsPlace) {
  for (const auto& [text, field, message] : std::vector<std::tuple<const char*, const char*, const char*>>{
           {R"({"m":[{"a":"\ud83d"}]})", "m[0].a", R"(m[0].a holds half of a surrogate pair (\ud83d), at byte 12)"},
           {R"({"m":["x","\\ud83d \uDE00."]})", "m[1]", R"(m[1] holds half of a surrogate pair (\uDE00), at byte 19)"},
           {R"(["\ud83d\ude00 \ud83d\ud83d\ude00"])", "[0]",
            R"([0] holds half of a surrogate pair (\ud83d), at byte 15)"},
           {R"("\ud83d\n")", "", R"(it holds half of a surrogate pair (\ud83d), at byte 1)"},
           {R"({"a":1,"m":{"b":[],"\udc00":1}})", "m",
            R"(m has a key that holds half of a surrogate pair (\udc00), at byte 20)"},
           {R"({"\ud83d":1})", "", R"(it has a key that holds half of a surrogate pair (\ud83d), at byte 2)"},
           {R"({"b":{"1":1e400}})", "b[1]", "b[1] is out of range, at byte 10"},
           {R"({"t":{"u":{}},"v":-1e999})", "v", "v is out of range, at byte 18"},
           {"1e400", "", "it is out of range, at byte 0"}}) {
    const Result<Json> json = parse_bounded_json(text, {});
    ASSERT_FALSE(json) << text;
    EXPECT_EQ(json.error().message, message) << text;
    EXPECT_EQ(json.error().field, field) << text;
    EXPECT_EQ(json.error().code == ErrorCode::invalid_argument,
              json.error().message.find("range") != std::string::npos);
  }
  EXPECT_EQ(error_of(R"({"a":"\ud83d)"), "JSON ends too early, at byte 12") << "the other half may have been to come";
  EXPECT_EQ(error_of(R"(["\ud83d\ude00\\ud83d"])"), "");
}

TEST(BoundedJson, NestingKeysAndValuesAreBounded) {
  const auto nested = [](int n) {
    return std::string(static_cast<size_t>(n), '[') + std::string(static_cast<size_t>(n), ']');
  };
  EXPECT_EQ(error_of(nested(64)), "");
  EXPECT_EQ(error_of(nested(65)), "it is nested more than 64 deep");
  EXPECT_EQ(error_of(std::string(1'000'000, '[')), "it is nested more than 64 deep");
  EXPECT_EQ(error_of("{\"a\":1,\"b\":2}", {.keys = 1}), "an object has more than 1 keys");
  EXPECT_EQ(error_of("[1,2,3]", {.values = 3}), "it holds more than 3 values") << "the list is one itself";
  EXPECT_EQ(error_of("[1,2,3]", {.values = 4}), "");
}

TEST(BoundedJson, AKeyTwiceIsRefusedInSmallAndInLargeObjects) {
  EXPECT_EQ(error_of("{\"a\":1,\"a\":2}"), "the key 'a' appears twice in one object");
  EXPECT_EQ(error_of("[{\"a\":1},{\"a\":2}]"), "");
  for (const int repeated : {0, 15, 16, 17, 99}) {
    std::string text = "{";
    for (int i = 0; i < 100; ++i) text += "\"k" + std::to_string(i) + "\":0,";
    EXPECT_EQ(error_of(text + "\"k" + std::to_string(repeated) + "\":1}"),
              "the key 'k" + std::to_string(repeated) + "' appears twice in one object");
    EXPECT_EQ(error_of(text + "\"k\":1}"), "");
  }
}

}  // namespace
}  // namespace thermocline
