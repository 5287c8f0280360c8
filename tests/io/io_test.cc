// runtime/io: files, JSON, and every way a safetensors file or an index can lie.
#include "runtime/io/file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <functional>
#include <set>

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

TEST(File, AFileCutWhileItIsOpenIsAnError) {
  const test::TempDir dir;
  ASSERT_TRUE(write_text_file(dir.path() / "f", std::string(100'000, 'x')).ok());
  for (const ReadMode mode : {ReadMode::buffered, ReadMode::direct}) {
    std::filesystem::resize_file(dir.path() / "f", 100'000);
    const InputFile file = InputFile::open(dir.path() / "f", mode).value();
    std::filesystem::resize_file(dir.path() / "f", 50'000);
    std::vector<std::byte> out(20'000);
    EXPECT_TRUE(file.read_at(0, out).ok());
    const Status status = file.read_at(40'000, out);
    ASSERT_FALSE(status.ok());
    EXPECT_NE(status.error().message.find((dir.path() / "f").string()), std::string::npos) << status.error().message;
  }
}

TEST(File, AbsentAndFolderAreNamed) {
  const Result<InputFile> absent = InputFile::open("/no/such/file");
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code, ErrorCode::not_found);
  EXPECT_NE(absent.error().message.find("/no/such/file"), std::string::npos);
  EXPECT_FALSE(InputFile::open("/tmp"));
}

std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

using Names = std::vector<std::string>;

TEST(OutputFile, UnfinishedOneLeavesWhatWasThere) {
  const test::TempDir dir;
  for (const bool before : {false, true}) {
    const Names expected = before ? Names{"out"} : Names{};
    if (before) {
      ASSERT_TRUE(write_text_file(dir.path() / "out", "before").ok());
    }
    {
      OutputFile file = OutputFile::create(dir.path() / "out").value();
      ASSERT_TRUE(file.write(std::as_bytes(std::span("abc"))).ok());
      OutputFile moved = std::move(file);
      ASSERT_TRUE(moved.write(std::as_bytes(std::span("def"))).ok());
    }
    EXPECT_EQ(names_in(dir.path()), expected);
  }
  EXPECT_EQ(read_text_file(dir.path() / "out").value(), "before");
}

TEST(OutputFile, FinishedOneReplacesTheContentAndKeepsThePermissions) {
  const test::TempDir dir;
  const std::filesystem::path out = dir.path() / std::string(255, 'n');  // the longest name there can be
  ASSERT_TRUE(write_text_file(out, "before").ok());
  std::filesystem::permissions(out, std::filesystem::perms(0640));
  ASSERT_TRUE(write_text_file(out, "after").ok());
  EXPECT_EQ(read_text_file(out).value(), "after");
  EXPECT_EQ(std::filesystem::status(out).permissions(), std::filesystem::perms(0640));
  EXPECT_EQ(names_in(dir.path()).size(), 1u);
}

TEST(OutputFile, TwoWritersOfOnePathDoNotMix) {
  const test::TempDir dir;
  OutputFile first = OutputFile::create(dir.path() / "out").value(),
             second = OutputFile::create(dir.path() / "out").value();
  ASSERT_TRUE(first.write(std::as_bytes(std::span("first", 5))).ok());
  ASSERT_TRUE(second.write(std::as_bytes(std::span("2nd", 3))).ok());
  ASSERT_TRUE(first.close().ok());
  EXPECT_EQ(read_text_file(dir.path() / "out").value(), "first");
  ASSERT_TRUE(second.close().ok());
  EXPECT_EQ(read_text_file(dir.path() / "out").value(), "2nd");
  EXPECT_EQ(names_in(dir.path()), Names{"out"});
}

TEST(OutputFile, LinksStayAndWhatTheyLeadToIsReplaced) {
  const test::TempDir dir;
  std::filesystem::create_directory(dir.path() / "there");
  std::filesystem::create_symlink("there/middle", dir.path() / "link");
  std::filesystem::create_symlink("file", dir.path() / "there" / "middle");  // of its own folder, and nothing yet
  for (const char* const text : {"new", "replaced"}) {
    ASSERT_TRUE(write_text_file(dir.path() / "link", text).ok());
    EXPECT_TRUE(std::filesystem::is_symlink(dir.path() / "link"));
    EXPECT_TRUE(std::filesystem::is_symlink(dir.path() / "there" / "middle"));
    EXPECT_EQ(read_text_file(dir.path() / "there" / "file").value(), text);
    EXPECT_EQ(names_in(dir.path() / "there"), (Names{"file", "middle"}));
  }
  std::filesystem::create_symlink("round", dir.path() / "round");
  const Status status = write_text_file(dir.path() / "round", "x");
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find("round"), std::string::npos);
}

TEST(OutputFile, DevicesAndPipesAreWrittenToAndStay) {
  EXPECT_TRUE(write_text_file("/dev/null", "x").ok());
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  const test::TempDir dir;
  const std::filesystem::path pipe = dir.path() / "pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_GE(reader, 0);
  for (const bool finished : {true, false}) {
    OutputFile file = OutputFile::create(pipe).value();
    ASSERT_TRUE(file.write(std::as_bytes(std::span("abc", 3))).ok());
    if (finished) {
      ASSERT_TRUE(file.close().ok());
    }
    char got[4] = {};
    EXPECT_EQ(::read(reader, got, sizeof(got)), 3);
    EXPECT_STREQ(got, "abc");
  }
  ::close(reader);
  EXPECT_EQ(names_in(dir.path()), Names{"pipe"});
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
}

// As with `--out /dev/stdout >file`: a rename would leave this process writing to a file that is gone.
TEST(OutputFile, OpenFilesOfAProcessAreAppendedTo) {
  const test::TempDir dir;
  ASSERT_TRUE(write_text_file(dir.path() / "out", "before,").ok());
  const int fd = ::open((dir.path() / "out").c_str(), O_WRONLY | O_APPEND);
  ASSERT_GE(fd, 0);
  std::filesystem::create_symlink("/proc/self/fd/" + std::to_string(fd), dir.path() / "stdout");
  ASSERT_TRUE(write_text_file(dir.path() / "stdout", "in between,").ok());
  ASSERT_EQ(::write(fd, "after", 5), 5);
  ::close(fd);
  EXPECT_EQ(read_text_file(dir.path() / "out").value(), "before,in between,after");
}

TEST(OutputFile, ErrorsNameThePathAndLeaveNothing) {
  const test::TempDir dir;
  const auto error_of = [](const std::filesystem::path& path) {
    const Status status = write_text_file(path, "x");
    return status.ok() ? Error{} : status.error();
  };
  EXPECT_EQ(error_of(dir.path() / "absent" / "out").code, ErrorCode::not_found);
  for (const std::filesystem::path& path : {dir.path() / "absent" / "out", dir.path(), dir.path() / "new" / "",
                                            dir.path() / std::string(256, 'n'), std::filesystem::path("/dev/full")})
    EXPECT_NE(error_of(path).message.find(path.string()), std::string::npos) << path << ": " << error_of(path).message;
  EXPECT_NE(error_of("/dev/full").message.find("No space left"), std::string::npos);
  EXPECT_FALSE(write_text_file("", "x").ok());
  EXPECT_TRUE(names_in(dir.path()).empty());
}

// A limit on the size of files stands for a full disk: the write fails in the middle.
TEST(OutputFile, FailingWriteLeavesTheOldFile) {
  const test::TempDir dir;
  ASSERT_TRUE(write_text_file(dir.path() / "out", "before").ok());
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const rlimit small{4096, old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const Status status = write_text_file(dir.path() / "out", std::string(10'000, 'x'));
  signal(SIGXFSZ, handler);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.error().message.find((dir.path() / "out").string() + ": File too large"), std::string::npos)
      << status.error().message;
  EXPECT_EQ(read_text_file(dir.path() / "out").value(), "before");
  EXPECT_EQ(names_in(dir.path()), Names{"out"});
}

TEST(OutputFile, WhatMayNotBeWrittenStays) {
  const test::TempDir dir;
  const std::filesystem::path open_folder = dir.path() / "open", closed_folder = dir.path() / "closed";
  for (const auto& folder : {open_folder, closed_folder}) {
    std::filesystem::create_directory(folder);
    ASSERT_TRUE(write_text_file(folder / "out", "before").ok());
  }
  std::filesystem::permissions(dir.path(), std::filesystem::perms(0755));
  std::filesystem::permissions(open_folder, std::filesystem::perms(0777));
  std::filesystem::permissions(open_folder / "out", std::filesystem::perms(0444));
  std::filesystem::permissions(closed_folder / "out", std::filesystem::perms(0666));
  std::filesystem::permissions(closed_folder, std::filesystem::perms(0555));
  const bool root = geteuid() == 0;  // who may write everything
  if (root) {
    ASSERT_EQ(seteuid(65534), 0);
  }
  const Status read_only_file = write_text_file(open_folder / "out", "after"),
               closed = write_text_file(closed_folder / "out", "after");
  if (root) {
    ASSERT_EQ(seteuid(0), 0);
  }
  for (const auto& [status, folder] : {std::pair(&read_only_file, &open_folder), std::pair(&closed, &closed_folder)}) {
    ASSERT_FALSE(status->ok());
    EXPECT_NE(status->error().message.find((*folder / "out").string() + ": Permission denied"), std::string::npos)
        << status->error().message;
    EXPECT_EQ(read_text_file(*folder / "out").value(), "before");
    EXPECT_EQ(names_in(*folder), Names{"out"});
  }
  std::filesystem::permissions(closed_folder, std::filesystem::perms(0755));
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

TEST_F(IndexTest, SwappedAndOverwrittenShardsAreRefused) {
  const std::filesystem::path one = dir_.path() / "model-00001-of-00002.safetensors",
                              two = dir_.path() / "model-00002-of-00002.safetensors";
  const std::string index = dump_json(index_);
  const auto expect_refused = [&](const std::string& what) {
    EXPECT_NE(error_with(index).find(one.filename().string()), std::string::npos) << what;
  };
  for (size_t bit = 0; bit < 64; ++bit) {  // of the header's length
    std::fstream file(one, std::ios::in | std::ios::out | std::ios::binary);
    const auto flip = [&] {
      file.seekg(static_cast<std::streamoff>(bit / 8));
      const char byte = static_cast<char>(file.get() ^ (1 << bit % 8));
      file.seekp(static_cast<std::streamoff>(bit / 8)).put(byte).flush();
    };
    flip();
    expect_refused("bit " + std::to_string(bit));
    flip();
  }
  EXPECT_EQ(error_with(index), "") << "as it was";
  std::filesystem::rename(one, dir_.path() / "other");
  std::filesystem::rename(two, one);
  std::filesystem::rename(dir_.path() / "other", two);
  expect_refused("swapped");
  const auto bytes = std::filesystem::file_size(one);
  std::filesystem::resize_file(one, 0);
  std::filesystem::resize_file(one, bytes);
  expect_refused("zeros");
}

// From the end to the begin: at and behind every boundary, the header's included.
TEST_F(IndexTest, AShardThatIsCutAnywhereIsRefused) {
  const std::filesystem::path shard = dir_.path() / "model-00001-of-00002.safetensors";
  const uint64_t bytes = std::filesystem::file_size(shard);
  std::set<uint64_t, std::greater<>> cuts = {0, 7, 8, 9, bytes - 1};
  const std::vector<TensorInfo> whole = read_safetensors_header(InputFile::open(shard).value()).value();
  for (const TensorInfo& tensor : whole)
    for (const uint64_t cut : {tensor.begin, tensor.begin + 1}) cuts.insert(cut);
  EXPECT_GT(cuts.size(), 50u);
  for (const uint64_t cut : cuts) {
    std::filesystem::resize_file(shard, cut);
    const auto tensors = read_safetensors_header(InputFile::open(shard).value());
    ASSERT_FALSE(tensors) << cut;
    EXPECT_NE(tensors.error().message.find(shard.string()), std::string::npos) << cut;
  }
}

TEST(Safetensors, MillionsOfTensorsAreRefusedByTheirBytes) {
  const test::TempDir dir;
  const std::filesystem::path path = dir.path() / "x.safetensors";
  const uint64_t header = uint64_t{600} << 20;  // 10^7 entries of 60 bytes
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header >> 8 * i);
  ASSERT_TRUE(write_text_file(path, length).ok());
  std::filesystem::resize_file(path, 8 + header);  // holes, not bytes
  const auto tensors = read_safetensors_header(InputFile::open(path).value());
  ASSERT_FALSE(tensors);
  EXPECT_NE(tensors.error().message.find("offset 0"), std::string::npos) << tensors.error().message;
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
