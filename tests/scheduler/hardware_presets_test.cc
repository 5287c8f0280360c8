// Presets by their data sheets, and the assumed hits of an expert cache.
#include "scheduler/cost/hardware_presets.h"

#include <gtest/gtest.h>

#include "scheduler/cost/hit_curve.h"

namespace thermocline::sched {
namespace {

TEST(HardwarePresets, AreTheConstantsOfTheSpec) {
  struct Row {
    const char* name;
    double bytes_per_second, h2d, flops;
  };
  for (const Row& row : {Row{"h100", 2850e9, 52e9, 500e12}, Row{"h100-pcie", 1730e9, 52e9, 380e12},
                         Row{"5090", 1520e9, 52e9, 200e12}, Row{"4090", 860e9, 25e9, 120e12}}) {
    const GpuSheet* const sheet = find_gpu_sheet(row.name);
    ASSERT_NE(sheet, nullptr) << row.name;
    const GpuProfile gpu = gpu_profile(*sheet, 490e9);
    EXPECT_NEAR(gpu.bytes_per_second / row.bytes_per_second, 1, 0.01) << row.name;
    EXPECT_EQ(gpu.h2d_bytes_per_second, row.h2d) << row.name;
    EXPECT_EQ(sheet->flops, row.flops) << row.name;
    EXPECT_NEAR(1 / gpu.weights[1].ns_per_byte(1), gpu.bytes_per_second / 1e9, 1e-6) << row.name;
  }
  EXPECT_NEAR(dram_bytes_per_second(16, 5600), 610e9, 1e9);
  EXPECT_NEAR(dram_bytes_per_second(12, 6000), 490e9, 1e9);
  EXPECT_NEAR(dram_bytes_per_second(2, 5600), 75e9, 2e9);
}

TEST(HardwarePresets, EverySheetIsComplete) {
  for (const GpuSheet& sheet : gpu_sheets()) {
    EXPECT_EQ(find_gpu_sheet(sheet.name), &sheet);
    EXPECT_EQ(find_gpu_sheet(sheet.title), &sheet);
    EXPECT_GT(sheet.memory_bytes, 20e9) << sheet.name;
    EXPECT_LT(sheet.memory_bytes, 200e9) << sheet.name;
    EXPECT_GT(sheet.bytes_per_second, 700e9) << sheet.name;
    EXPECT_GT(sheet.flops, 50e12) << sheet.name;
    const GpuProfile gpu = gpu_profile(sheet, 20e9);
    EXPECT_GT(gpu.cpu_read_share_beside_h2d, 0) << "a slow host still reads beside copies";
  }
}

TEST(HardwarePresets, AreFoundByUsersAndDriversNames) {
  EXPECT_EQ(find_gpu_sheet("RTX-PRO-6000"), find_gpu_sheet("rtx pro 6000"));
  EXPECT_EQ(find_gpu_sheet(""), nullptr);
  EXPECT_EQ(find_gpu_sheet("509"), nullptr);
  EXPECT_STREQ(gpu_sheet_of_device("NVIDIA GeForce RTX 5090")->name, "5090");
  EXPECT_STREQ(gpu_sheet_of_device("NVIDIA H100 80GB HBM3")->name, "h100");
  EXPECT_STREQ(gpu_sheet_of_device("NVIDIA H100 PCIe")->name, "h100-pcie");
  EXPECT_STREQ(gpu_sheet_of_device("NVIDIA RTX 6000 Ada Generation")->name, "rtx-6000-ada");
  EXPECT_EQ(gpu_sheet_of_device("NVIDIA GeForce RTX 4090 Laptop GPU"), nullptr) << "another chip, half the memory";
  EXPECT_EQ(gpu_sheet_of_device("Tesla K80"), nullptr);
}

TEST(HardwarePresets, FewCoresCannotReadAllChannels) {
  const CpuProfile few = cpu_profile({.cores = 2, .read_bytes_per_second = 490e9}),
                   many = cpu_profile({.cores = 64, .read_bytes_per_second = 490e9});
  EXPECT_EQ(few.read_bytes_per_second, 48e9) << "24 GB/s of MXFP4 a core";
  EXPECT_EQ(many.read_bytes_per_second, 490e9);
  EXPECT_GT(cpu_profile({.cores = 64, .kernels = CpuKernels::amx}).attention_flops_many, many.attention_flops_many);
}

TEST(HardwarePresets, NextMemorySizes) {
  constexpr double kGiB = 1 << 30;
  EXPECT_EQ(next_gpu_memory(find_gpu_sheet("4090")->memory_bytes), 32 * kGiB);
  EXPECT_EQ(next_gpu_memory(find_gpu_sheet("5090")->memory_bytes), 48 * kGiB);
  EXPECT_EQ(next_gpu_memory(find_gpu_sheet("b200")->memory_bytes), 0);
}

TEST(HitCurve, MeetsThePublishedPoints) {
  EXPECT_EQ(expected_hits(0), 0);
  EXPECT_NEAR(expected_hits(14.0 / 256), 0.405, 1e-9);
  EXPECT_NEAR(expected_hits(28.0 / 256), 0.594, 1e-9);
  EXPECT_NEAR(expected_hits(56.0 / 256), 0.744, 1e-9);
  EXPECT_NEAR(expected_hits(112.0 / 256), 0.865, 1e-9);
  EXPECT_EQ(expected_hits(1), 1);
  EXPECT_EQ(expected_hits(2), 1);
  EXPECT_EQ(expected_hits(-1), 0);
  for (double share = 0; share <= 1; share += 1.0 / 512) {
    EXPECT_GE(expected_hits(share), share - 1e-12) << "no worse than uniform routing";
    EXPECT_LE(expected_hits(share), expected_hits(share + 1.0 / 512)) << share;
  }
}

TEST(HardwarePresets, AModestServerStandsForWhatIsNotKnown) {
  const MachineProfile box = modest_server();
  EXPECT_EQ(box.cpu.read_bytes_per_second, 100e9);
  ASSERT_EQ(box.gpus.size(), 1u);
  EXPECT_EQ(box.gpus[0].h2d_bytes_per_second, 25e9);
}

}  // namespace
}  // namespace thermocline::sched
