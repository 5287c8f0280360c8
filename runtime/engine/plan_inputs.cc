#include "runtime/engine/plan_inputs.h"

#include <algorithm>

#include "runtime/exec/device_part.h"
#include "runtime/exec/step_buffers.h"

namespace thermocline {

std::vector<sched::ChunkBuffers> chunk_buffers(const ModelGeometry& g, int64_t context, int batch, int threads,
                                               bool device) {
  std::vector<sched::ChunkBuffers> chunks;
  for (const int64_t wanted : {512, 2048, 8192}) {
    const int64_t tokens = std::max<int64_t>(std::min(wanted, context), batch);
    if (!chunks.empty() && chunks.back().tokens == tokens) continue;
    sched::ChunkBuffers buffers{.tokens = tokens};
    const int64_t logit_rows = std::max<int64_t>(std::min<int64_t>(tokens, 64), batch);  // as serve asks for
    if (device) {
      PartOptions o;
      o.last_layer = g.n_layers;
      o.max_tokens = tokens;
      o.max_logit_rows = logit_rows;
      o.max_context = context;
      buffers.device_bytes = static_cast<double>(DevicePart::activation_bytes(g, o) + 4 * tokens * g.dim);
      const int64_t pair = 4 * g.dim + 8 * g.moe_inter_dim;  // rows both ways, and the workers' hidden rows
      buffers.host_bytes = static_cast<double>(tokens * (8 * g.dim + g.n_activated_experts * pair));
    } else {
      const ExecOptions o{.max_tokens = tokens, .max_logit_rows = logit_rows, .max_context = context, .fp8_rows = true};
      buffers.host_bytes = static_cast<double>(StepBuffers::bytes(g, o, threads));
    }
    chunks.push_back(buffers);
  }
  return chunks;
}

}  // namespace thermocline
