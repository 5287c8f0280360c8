#!/usr/bin/env bash
# clang-format over every source, then clang-tidy (.clang-tidy says what for) over what meets outside bytes or other
# threads, with compile commands of its own: build/style, where nothing is built. Four to five minutes on 2 cores.
#   --all   clang-tidy over every source
. "$(dirname "$0")/common.sh"

# One version: another formats differently and finds other things.
FORMAT=clang-format-14
TIDY=clang-tidy-14
TIDY_FOLDERS="runtime/io runtime/engine runtime/server scheduler"
if [ "${1:-}" = --all ]; then TIDY_FOLDERS="runtime scheduler kernels_cpu"; fi

say "style: $FORMAT over every source"
find bench kernels_cpu kernels_gpu runtime scheduler tests -regex '.*\.\(cc\|h\|cu\|cuh\)' -print0 |
  xargs -0 $FORMAT --dry-run -Werror

say "style: $TIDY over $TIDY_FOLDERS"
cmake --preset release -B build/style -DTC_CUDA=OFF -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=4 --log-level=NOTICE
python3 scripts/tidy.py --program $TIDY --build build/style $TIDY_FOLDERS
