#!/usr/bin/env bash
# Tabulates what every GPU kernel of the release build takes on sm_80, sm_90 and sm_120: registers, spills (there must be
# none), shared memory, occupancy, and the instructions of its inner loop. Needs no GPU; compiles only what the build has
# not. Fails on a compile error or a spill; without the CUDA toolkit it says so and succeeds. --out FILE writes the table
# as Markdown.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH="$PATH:/usr/local/cuda/bin"
if ! command -v nvcc >/dev/null; then
  echo "gpu report: skipped, as nvcc is not on PATH (CUDA toolkit 12.4 or newer; sm_120 needs 12.8)"
  exit 0
fi
# nvdisasm comes with the toolkit, and as a Python package of its own.
if ! command -v nvdisasm >/dev/null; then
  tools=build/nvdisasm
  [ -x "$tools/bin/python" ] || python3 -m venv "$tools"
  "$tools/bin/pip" install -q --disable-pip-version-check nvidia-cuda-nvdisasm || true
  found=$(find "$tools" -name nvdisasm -type f | head -1)
  if [ -n "$found" ]; then chmod +x "$found" && PATH="$PATH:$(dirname "$found")"; fi
fi
cmake --preset release --log-level=NOTICE
cmake --build --preset release --target tc_kernels_cuda
exec python3 scripts/gpu_report.py "$@"
