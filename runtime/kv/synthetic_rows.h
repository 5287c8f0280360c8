// A long context without its prefill, for benches: rows that are random and valid in their formats.
#pragma once

#include <memory>

#include "runtime/hw/worker_pool.h"
#include "runtime/kv/kv_store.h"

namespace thermocline {

/// A sequence of `length` tokens whose rows were never computed. Its pages repeat after a while; one seed gives one
/// content. Errors: out_of_memory; internal (a device fault).
Result<std::unique_ptr<SequenceKv>> synthetic_sequence(KvStore& store, const ModelGeometry& geometry, WorkerPool& pool,
                                                       int64_t length, uint32_t seed = 1);

}  // namespace thermocline
