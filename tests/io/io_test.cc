// runtime/io: files, JSON, and every way a safetensors file or an index can lie.
#include "runtime/io/file.h"

#include "runtime/io/json_document.h"
#include "runtime/io/safetensors.h"
#include "tests/support/fixtures.h"

namespace thermocline {
namespace {

std::string read_error(std::string_view header, uint64_t data_bytes) {
  const Result<std::vector<TensorInfo>> tensors = parse_safetensors_header(header, 8 + header.size() + data_bytes);
  return tensors ? "" : tensors.error().message;
}

TEST(File, DirectAndBufferedReadsAgree) {
  const test::TempDir dir;
  std::string text(100'003, '\0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 31 >> 3);
  ASSERT_TRUE(write_text_file(dir.path() / "f", text).ok());
  for (const ReadMode mode : {ReadMode::buffered, ReadMode::direct}) {
    const InputFile file = InputFile::open(dir.path() / "f", mode).value();
    for (const auto& [offset, count] :
         {std::pair(0, 100'003), std::pair(1, 4096), std::pair(4095, 2), std::pair(100'002, 1), std::pair(50'000, 0)}) {
      std::vector<std::byte> out(static_cast<size_t>(count));
      ASSERT_TRUE(file.read_at(static_cast<uint64_t>(offset), out).ok());
      EXPECT_TRUE(std::equal(out.begin(), out.end(), reinterpret_cast<const std::byte*>(text.data()) + offset));
    }
    std::byte past[2];
    const Status status = file.read_at(100'002, past);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::corrupt);
  }
  const MappedFile mapped = MappedFile::open(dir.path() / "f").value();
  EXPECT_EQ(mapped.bytes().size(), text.size());
  EXPECT_EQ(std::memcmp(mapped.bytes().data(), text.data(), text.size()), 0);
}

TEST(File, AbsentAndFolderAreNamed) {
  const Result<InputFile> absent = InputFile::open("/no/such/file");
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code, ErrorCode::not_found);
  EXPECT_NE(absent.error().message.find("/no/such/file"), std::string::npos);
  EXPECT_FALSE(InputFile::open("/tmp"));
}

TEST(File, UnfinishedOutputIsRemoved) {
  const test::TempDir dir;
  {
    OutputFile file = OutputFile::create(dir.path() / "part").value();
    ASSERT_TRUE(file.write(std::as_bytes(std::span("abc"))).ok());
  }
  EXPECT_FALSE(std::filesystem::exists(dir.path() / "part"));
}

TEST(Json, DepthSyntaxAndRepeatedKeysAreErrors) {
  EXPECT_TRUE(parse_json(std::string(64, '[') + std::string(64, ']')));
  EXPECT_FALSE(parse_json(std::string(65, '[') + std::string(65, ']')));
  EXPECT_FALSE(parse_json(std::string(1'000'000, '[')));
  EXPECT_TRUE(parse_json("\"" + std::string(100, '[') + "\""));
  EXPECT_NE(parse_json("{\"a\": 1, }").error().message.find("byte 9"), std::string::npos);
  EXPECT_FALSE(parse_json("\"\xff\""));
  EXPECT_TRUE(parse_json("{\"a\": 1, \"a\": 2}"));
  EXPECT_FALSE(parse_json("{\"a\": 1, \"a\": 2}", true));
  EXPECT_TRUE(parse_json("{\"a\": {\"b\": 1}, \"b\": 2}", true));
}

TEST(Safetensors, GoodHeaderIsRead) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"I8","shape":[],"data_offsets":[24,25]}})";
  const auto good = parse_safetensors_header(header, 8 + header.size() + 25);
  ASSERT_TRUE(good) << good.error().message;
  ASSERT_EQ(good->size(), 2u);
  EXPECT_EQ((*good)[0].elements(), 6);
  EXPECT_EQ((*good)[1].begin, 8 + header.size() + 24);
}

TEST(Safetensors, EveryBrokenPromiseOfAHeaderIsNamed) {
  struct Case {
    const char* header;
    uint64_t data_bytes;
    const char* expected;
  };
  const Case cases[] = {
      {"[]", 0, "no JSON object"},
      {R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4, "F33"},
      {R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4, "dtype"},
      {R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4, "shape"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "shape"},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "shape"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "before their begin"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8, "need 4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 3, "truncated"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5, "the file has"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", 4, "overflows"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4, "overflows"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551616]}})", 4, "64 bits"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       6, "overlaps"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}})",
       10, "hole"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "twice"},
      {R"({"a":)", 0, "too early"},
  };
  for (const Case& c : cases) {
    const std::string error = read_error(c.header, c.data_bytes);
    EXPECT_NE(error.find(c.expected), std::string::npos) << c.header << " gave: " << error;
  }
}

TEST(Safetensors, HeaderLengthIsChecked) {
  const test::TempDir dir;
  const auto error_of = [&](const std::string& bytes) {
    EXPECT_TRUE(write_text_file(dir.path() / "x.safetensors", bytes).ok());
    const InputFile file = InputFile::open(dir.path() / "x.safetensors").value();
    const auto tensors = read_safetensors_header(file);
    return tensors ? std::string() : tensors.error().message;
  };
  EXPECT_NE(error_of("").find("too few"), std::string::npos);
  EXPECT_NE(error_of(std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8)).find("offset 0"), std::string::npos);
  EXPECT_NE(error_of(std::string("\x10\0\0\0\0\0\0\0{}", 10)).find("offset 0"), std::string::npos);
  EXPECT_EQ(error_of(std::string("\x02\0\0\0\0\0\0\0{}", 10)), "");
}

TEST(Safetensors, WriterAndReaderAgree) {
  const test::TempDir dir;
  TensorInfo a;
  a.name = "a";
  a.dtype = DType::f32;
  a.shape = {3};
  const float values[] = {1, 2, 3};
  SafetensorsWriter writer = SafetensorsWriter::create(dir.path() / "model.safetensors", {a}).value();
  ASSERT_TRUE(writer.write(std::as_bytes(std::span(values))).ok());
  ASSERT_TRUE(writer.close().ok());
  const Checkpoint checkpoint = Checkpoint::open(dir.path()).value();
  float read[3];
  ASSERT_TRUE(checkpoint.read(*checkpoint.find("a"), 0, std::as_writable_bytes(std::span(read))).ok());
  EXPECT_EQ(read[2], 3);
  EXPECT_EQ(checkpoint.find("b"), nullptr);
}

class IndexTest : public ::testing::Test {
 protected:
  void SetUp() override {
    test::copy_model(test::golden("tiny-csa"), dir_.path());
    index_ = parse_json(read_text_file(dir_.path() / "model.safetensors.index.json").value()).value();
  }
  std::string error_with(const std::string& index_text) {
    EXPECT_TRUE(write_text_file(dir_.path() / "model.safetensors.index.json", index_text).ok());
    const Result<Checkpoint> checkpoint = Checkpoint::open(dir_.path());
    return checkpoint ? "" : checkpoint.error().message;
  }
  test::TempDir dir_;
  Json index_;
};

TEST_F(IndexTest, LiesAreCaught) {
  EXPECT_EQ(error_with(dump_json(index_)), "");
  Json missing = index_;
  missing["weight_map"].erase("norm.weight");
  EXPECT_NE(error_with(dump_json(missing)).find("'norm.weight'"), std::string::npos);
  Json moved = index_;
  const bool first = index_["weight_map"]["norm.weight"] == "model-00001-of-00002.safetensors";
  moved["weight_map"]["norm.weight"] = first ? "model-00002-of-00002.safetensors" : "model-00001-of-00002.safetensors";
  EXPECT_NE(error_with(dump_json(moved)).find("norm.weight"), std::string::npos);
  Json invented = index_;
  invented["weight_map"]["ghost"] = "model-00001-of-00002.safetensors";
  EXPECT_NE(error_with(dump_json(invented)).find("'ghost' is missing"), std::string::npos);
  Json no_file = index_;
  no_file["weight_map"]["ghost"] = "model-00009-of-00002.safetensors";
  EXPECT_NE(error_with(dump_json(no_file)).find("model-00009"), std::string::npos);
  Json outside = index_;
  outside["weight_map"]["norm.weight"] = "../secret";
  EXPECT_NE(error_with(dump_json(outside)).find("plain file name"), std::string::npos);
  EXPECT_NE(error_with("{}").find("weight_map"), std::string::npos);
  EXPECT_NE(error_with("{\"weight_map\": {}}").find("empty"), std::string::npos);
  EXPECT_NE(error_with("{\"weight_map\": {\"a\": 1}}").find("file name"), std::string::npos);
  EXPECT_NE(error_with("not json").find("byte"), std::string::npos);
}

TEST(Checkpoint, AnEmptyFolderSaysWhatItHolds) {
  const test::TempDir dir;
  ASSERT_TRUE(write_text_file(dir.path() / "readme.txt", "x").ok());
  const Result<Checkpoint> checkpoint = Checkpoint::open(dir.path());
  ASSERT_FALSE(checkpoint);
  EXPECT_NE(checkpoint.error().message.find("readme.txt"), std::string::npos);
}

}  // namespace
}  // namespace thermocline
