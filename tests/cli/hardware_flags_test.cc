// Hardware as users write it, and what is refused.
#include "runtime/cli/hardware_flags.h"

#include <gtest/gtest.h>

#include <string>

namespace thermocline::cli {
namespace {

TEST(HardwareFlags, Bytes) {
  EXPECT_EQ(parse_bytes("384GiB").value(), 384.0 * (1 << 30));
  EXPECT_EQ(parse_bytes(" 32 gb ").value(), 32e9);
  EXPECT_EQ(parse_bytes("1.5TiB").value(), 1.5 * 0x1p40);
  EXPECT_EQ(parse_bytes("512MB").value(), 512e6);
  for (const std::string bad :
       {"", "GiB", "0GiB", "-1GiB", "+1GiB", "384", "384G", "1e3GiB", "nanGiB", "infGiB", "1.2.3GiB", "0x10GiB",
        "384GiB extra", "384GiB/s", "1025TiB", ".GiB", "9999999999999999999999TiB"}) {
    const Result<double> bytes = parse_bytes(bad);
    ASSERT_FALSE(bytes.ok()) << bad << " is " << *bytes;
    EXPECT_EQ(bytes.error().code, ErrorCode::invalid_argument);
    EXPECT_NE(bytes.error().message.find("such as 384GiB"), std::string::npos) << bytes.error().message;
  }
  EXPECT_FALSE(parse_bytes(std::string(100'000, '9') + "GiB").ok());
  EXPECT_LT(parse_bytes(std::string(100'000, '9')).error().message.size(), 250u) << "a line, whatever was given";
  EXPECT_EQ(parse_bytes("1\n2GiB").error().message.find('\n'), std::string::npos);
}

TEST(HardwareFlags, Rates) {
  EXPECT_EQ(parse_rate("7GB/s").value(), 7e9);
  EXPECT_EQ(parse_rate("500 MB/s").value(), 500e6);
  EXPECT_EQ(parse_rate("3.5GiB/s").value(), 3.5 * 0x1p30);
  for (const char* bad :
       {"", "7", "7GB", "7GB/", "7GB/h", "-7GB/s", "0GB/s", "nan", "inf GB/s", "1e9GB/s", "/s", "9999999TB/s"})
    EXPECT_FALSE(parse_rate(bad).ok()) << bad;
  EXPECT_NE(parse_rate("fast").error().message.find("7GB/s"), std::string::npos);
}

TEST(HardwareFlags, Tokens) {
  EXPECT_EQ(parse_tokens("131072").value(), 131072);
  EXPECT_EQ(parse_tokens("128k").value(), 131072);
  EXPECT_EQ(parse_tokens("1M").value(), 1 << 20);
  EXPECT_EQ(parse_tokens("0.5k").value(), 512);
  for (const char* bad : {"", "k", "0", "-1", "1.5", "0.0001k", "nan", "1e6", "128kk", "128 tokens", "2000M",
                          "99999999999999999999", "9223372036854775808"})
    EXPECT_FALSE(parse_tokens(bad).ok()) << bad;
}

TEST(HardwareFlags, Cards) {
  EXPECT_STREQ(parse_gpu("5090").value().title, "RTX 5090");
  EXPECT_STREQ(parse_gpu(" H100 ").value().name, "h100");
  const sched::GpuSheet larger = parse_gpu("4090, 48GiB").value();
  EXPECT_EQ(larger.memory_bytes, 48.0 * (1 << 30));
  EXPECT_EQ(larger.bytes_per_second, parse_gpu("4090").value().bytes_per_second);
  for (const char* bad : {"", "gtx-9999", "none", "5090,", "5090,0GiB", "5090,-1GiB", "5090,32", "5090,1MiB",
                          "5090,900TiB", ",32GiB", "5090;32GiB"})
    EXPECT_FALSE(parse_gpu(bad).ok()) << bad;
  const std::string message = parse_gpu("voodoo").error().message;
  for (const sched::GpuSheet& sheet : sched::gpu_sheets())
    EXPECT_NE(message.find(sheet.name), std::string::npos) << "what would be right";
}

TEST(HardwareFlags, Memory) {
  const RamFlag ram = parse_ram("12x6000").value();
  EXPECT_EQ(ram.channels, 12);
  EXPECT_EQ(ram.megatransfers, 6000);
  EXPECT_EQ(parse_ram("2 X 5600").value().channels, 2);
  for (const char* bad : {"", "x", "12", "12x", "x6000", "0x6000", "-1x6000", "12x0", "12x-6000", "12x100000",
                          "65x6000", "1.5x6000", "12x6000x2", "nanx6000", "12x6e3", "99999999999x6000", "12x6000 MT/s"})
    EXPECT_FALSE(parse_ram(bad).ok()) << bad;
  EXPECT_NE(parse_ram("DDR5").error().message.find("12x6000"), std::string::npos);
}

TEST(HardwareFlags, Processors) {
  const CpuFlag cpu = parse_cpu("64 cores, amx").value();
  EXPECT_EQ(cpu.cores, 64);
  EXPECT_EQ(cpu.kernels, sched::CpuKernels::amx);
  EXPECT_EQ(parse_cpu("16").value().kernels, sched::CpuKernels::avx512);
  EXPECT_EQ(parse_cpu("1 core,AVX2").value().kernels, sched::CpuKernels::avx2);
  for (const char* bad : {"", "cores", "0", "-4", "4.5 cores", "4097", "64 cores,", "64 cores, neon", "64 threads",
                          "amx, 64", "64,amx,amx", "99999999999 cores", "nan cores"})
    EXPECT_FALSE(parse_cpu(bad).ok()) << bad;
  EXPECT_NE(parse_cpu("many").error().message.find("'64 cores, avx512'"), std::string::npos);
}

}  // namespace
}  // namespace thermocline::cli
