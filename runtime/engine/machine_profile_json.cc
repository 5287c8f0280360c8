#include "runtime/engine/machine_profile_json.h"

#include <fmt/format.h>

#include <cmath>

namespace thermocline {
namespace {

using sched::KernelCurve;
using sched::kWeightFormatNames;

constexpr int64_t kVersion = 1;

Json curves_json(const std::array<KernelCurve, 3>& curves) {
  Json json = Json::object();
  for (size_t f = 0; f < curves.size(); ++f) json[kWeightFormatNames[f]] = curves[f].points();
  return json;
}

Json element_json(const sched::ElementCost& cost) { return {{"first_ns", cost.first_ns}, {"next_ns", cost.next_ns}}; }

Json cpu_json(const sched::CpuProfile& cpu) {
  return {{"name", cpu.name},
          {"nodes", cpu.nodes},
          {"cores", cpu.cores},
          {"memory_bytes", cpu.memory_bytes},
          {"read_bytes_per_second", cpu.read_bytes_per_second},
          {"ns_per_byte", curves_json(cpu.weights)},
          {"attention_flops_one", cpu.attention_flops_one},
          {"attention_flops_many", cpu.attention_flops_many},
          {"index_ops_one", cpu.index_ops_one},
          {"index_ops_many", cpu.index_ops_many},
          {"streams", element_json(cpu.streams)},
          {"rows", element_json(cpu.rows)},
          {"region_ns", cpu.region_ns}};
}

Json gpu_json(const sched::GpuProfile& gpu) {
  return {{"name", gpu.name},
          {"memory_bytes", gpu.memory_bytes},
          {"ns_per_byte", curves_json(gpu.weights)},
          {"attention_flops", gpu.attention_flops},
          {"index_ops", gpu.index_ops},
          {"bytes_per_second", gpu.bytes_per_second},
          {"kernel_ns", gpu.kernel_ns},
          {"h2d_bytes_per_second", gpu.h2d_bytes_per_second},
          {"h2d_ns", gpu.h2d_ns},
          {"cpu_read_share_beside_h2d", gpu.cpu_read_share_beside_h2d},
          {"sync_ns", gpu.sync_ns}};
}

/// An object of the document and where it is, for messages.
struct Place {
  const Json& json;
  std::string path;
  std::string name(const std::string& key) const { return path.empty() ? key : path + "." + key; }
};

Error should(const std::string& name, const char* what) { return corrupt(name + " should be " + what); }

Result<const Json*> member(const Place& at, const std::string& key) {
  const auto found = at.json.find(key);
  if (found == at.json.end()) return corrupt(at.name(key) + " is missing");
  return &*found;
}

Result<const Json*> object(const Place& at, const std::string& key) {
  TC_ASSIGN(const Json* const json, member(at, key));
  if (!json->is_object()) return should(at.name(key), "an object");
  return json;
}

Status read(const Json& json, const std::string& name, double& out, bool zero = false) {
  const double value = json.is_number() ? json.get<double>() : NAN;
  if (!(value >= 1e-12 && value <= 1e18) && !(value == 0 && zero))  // beyond are rates of no machine
    return should(name, zero ? "0, or a number from 1e-12 to 1e18" : "a number from 1e-12 to 1e18");
  out = value;
  return {};
}

struct Number {
  const char* key;
  double* out;
  bool zero = false;  // may be 0
};

Status read_numbers(const Place& at, std::initializer_list<Number> numbers) {
  for (const Number& number : numbers) {
    TC_ASSIGN(const Json* const json, member(at, number.key));
    TC_RETURN_IF_ERROR(read(*json, at.name(number.key), *number.out, number.zero));
  }
  return {};
}

Status read_count(const Place& at, const std::string& key, int& out) {
  TC_ASSIGN(const Json* const json, member(at, key));
  const int64_t value = json->is_number_integer() ? json->get<int64_t>() : 0;
  if (value < 1 || value > 1'000'000) return should(at.name(key), "a whole number, 1 to 1000000");
  out = static_cast<int>(value);
  return {};
}

Status read_text(const Place& at, const std::string& key, std::string& out) {
  TC_ASSIGN(const Json* const json, member(at, key));
  if (!json->is_string()) return should(at.name(key), "a string");
  out = json->get<std::string>();
  return {};
}

Status read_curves(const Place& at, std::array<KernelCurve, 3>& out) {
  TC_ASSIGN(const Json* const json, object(at, "ns_per_byte"));
  const Place curves{*json, at.name("ns_per_byte")};
  for (size_t f = 0; f < out.size(); ++f) {
    TC_ASSIGN(const Json* const points, member(curves, kWeightFormatNames[f]));
    const std::string name = curves.name(kWeightFormatNames[f]);
    KernelCurve::Points ns{};
    if (!points->is_array() || points->size() != ns.size())
      return corrupt(
          fmt::format("{} should have {} numbers, for 1 to {} tokens", name, ns.size(), KernelCurve::kTokens.back()));
    for (size_t i = 0; i < ns.size(); ++i)
      TC_RETURN_IF_ERROR(read((*points)[i], fmt::format("{}[{}]", name, i), ns[i]));
    out[f] = KernelCurve(ns);
  }
  return {};
}

Status read_element(const Place& at, const std::string& key, sched::ElementCost& out) {
  TC_ASSIGN(const Json* const json, object(at, key));
  return read_numbers({*json, at.name(key)}, {{"first_ns", &out.first_ns}, {"next_ns", &out.next_ns}});
}

Status read_cpu(const Place& at, sched::CpuProfile& cpu) {
  TC_RETURN_IF_ERROR(read_text(at, "name", cpu.name));
  TC_RETURN_IF_ERROR(read_count(at, "nodes", cpu.nodes));
  TC_RETURN_IF_ERROR(read_count(at, "cores", cpu.cores));
  TC_RETURN_IF_ERROR(read_curves(at, cpu.weights));
  TC_RETURN_IF_ERROR(read_element(at, "streams", cpu.streams));
  TC_RETURN_IF_ERROR(read_element(at, "rows", cpu.rows));
  return read_numbers(at, {{"memory_bytes", &cpu.memory_bytes},
                           {"read_bytes_per_second", &cpu.read_bytes_per_second},
                           {"attention_flops_one", &cpu.attention_flops_one},
                           {"attention_flops_many", &cpu.attention_flops_many},
                           {"index_ops_one", &cpu.index_ops_one},
                           {"index_ops_many", &cpu.index_ops_many},
                           {"region_ns", &cpu.region_ns}});
}

Status read_gpu(const Place& at, sched::GpuProfile& gpu) {
  TC_RETURN_IF_ERROR(read_text(at, "name", gpu.name));
  TC_RETURN_IF_ERROR(read_curves(at, gpu.weights));
  TC_RETURN_IF_ERROR(read_numbers(at, {{"memory_bytes", &gpu.memory_bytes},
                                       {"attention_flops", &gpu.attention_flops},
                                       {"index_ops", &gpu.index_ops},
                                       {"bytes_per_second", &gpu.bytes_per_second},
                                       {"kernel_ns", &gpu.kernel_ns},
                                       {"h2d_bytes_per_second", &gpu.h2d_bytes_per_second},
                                       {"h2d_ns", &gpu.h2d_ns, true},
                                       {"cpu_read_share_beside_h2d", &gpu.cpu_read_share_beside_h2d},
                                       {"sync_ns", &gpu.sync_ns, true}}));
  if (gpu.cpu_read_share_beside_h2d > 1) return should(at.name("cpu_read_share_beside_h2d"), "at most 1");
  return {};
}

Status read_gpus(const Place& at, std::vector<sched::GpuProfile>& out) {
  TC_ASSIGN(const Json* const gpus, member(at, "gpus"));
  if (!gpus->is_array() || gpus->size() > 64) return should("gpus", "an array of at most 64 devices");
  for (const Json& json : *gpus) {
    const std::string name = fmt::format("gpus[{}]", out.size());
    if (!json.is_object()) return should(name, "an object");
    TC_RETURN_IF_ERROR(read_gpu({json, name}, out.emplace_back()));
  }
  return {};
}

}  // namespace

Json machine_profile_json(const sched::MachineProfile& profile) {
  Json gpus = Json::array();
  for (const sched::GpuProfile& gpu : profile.gpus) gpus.push_back(gpu_json(gpu));
  return {{"version", kVersion},
          {"fingerprint", profile.fingerprint},
          {"tokens", KernelCurve::kTokens},
          {"cpu", cpu_json(profile.cpu)},
          {"gpus", gpus},
          {"disk",
           {{"read_bytes_per_second", profile.disk.read_bytes_per_second}, {"free_bytes", profile.disk.free_bytes}}}};
}

Result<sched::MachineProfile> parse_machine_profile(std::string_view text) {
  TC_ASSIGN(const Json json, parse_json(text, true));
  if (!json.is_object()) return corrupt("a machine profile should be an object");
  const Place root{json, ""};
  int version = 0;
  TC_RETURN_IF_ERROR(read_count(root, "version", version));
  if (version != kVersion)
    return corrupt(fmt::format("version {} is unknown: this program reads {}", version, kVersion));
  TC_ASSIGN(const Json* const tokens, member(root, "tokens"));
  if (*tokens != Json(KernelCurve::kTokens)) return should("tokens", Json(KernelCurve::kTokens).dump().c_str());
  sched::MachineProfile profile;
  TC_RETURN_IF_ERROR(read_text(root, "fingerprint", profile.fingerprint));
  TC_ASSIGN(const Json* const cpu, object(root, "cpu"));
  TC_RETURN_IF_ERROR(read_cpu({*cpu, "cpu"}, profile.cpu));
  TC_RETURN_IF_ERROR(read_gpus(root, profile.gpus));
  TC_ASSIGN(const Json* const disk, object(root, "disk"));
  TC_RETURN_IF_ERROR(
      read_numbers({*disk, "disk"}, {{"read_bytes_per_second", &profile.disk.read_bytes_per_second, true},
                                     {"free_bytes", &profile.disk.free_bytes, true}}));
  return profile;
}

}  // namespace thermocline
