// `thermocline synth`: a random checkpoint with the layer shapes of a published model.
#include "runtime/cli/command.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

struct SynthOptions {
  std::string like = "v4-flash", out;
  int layers = 0, experts = 0;
  deepseek_v4::SynthesizeOptions synthesize;
};

Status synth(const SynthOptions& o) {
  TC_ASSIGN(const ModelGeometry geometry, deepseek_v4::published_geometry(o.like, o.layers, o.experts));
  return deepseek_v4::synthesize(geometry, o.out, o.synthesize);
}

}  // namespace

void add_synth(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<SynthOptions>();
  CLI::App* command = app.add_subcommand("synth", "Write a random checkpoint in the published format");
  command
      ->add_option("--like", o->like, "Whose layer shapes: v4-flash, v4-pro, demo, or those of a folder's config.json")
      ->capture_default_str();
  command->add_option("--layers", o->layers, "The first N layers; 0: all")->capture_default_str();
  command->add_option("--experts", o->experts, "Routed experts of a layer, a token has as many as ever; 0: all")
      ->capture_default_str();
  command->add_option("--seed", o->synthesize.seed, "The same seed gives the same bytes")->capture_default_str();
  command->add_option("--out", o->out, "Folder to create")->required();
  command->add_flag("--quiet,-q", o->synthesize.quiet, "No progress");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(synth(*o)); });
}

}  // namespace thermocline::cli
