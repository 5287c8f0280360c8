#!/usr/bin/env bash
# clang-format over every source, then clang-tidy (.clang-tidy says what for) over what meets outside bytes or other
# threads, with compile commands of its own: build/style, where nothing is built. --all: clang-tidy over every source, a
# quarter of an hour.
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
cmake --preset release -B build/style -DTC_CUDA=OFF --log-level=NOTICE
# One source a process. GCC's own warning flags mean nothing to it; "N warnings generated" says nothing.
find $TIDY_FOLDERS -name '*.cc' -print0 |
  xargs -0 -n 1 -P "$(nproc)" $TIDY --quiet --extra-arg=-Wno-unknown-warning-option -p build/style \
    2> >(grep -Ev '^[0-9]+ warnings? (generated|treated)|^Suppressed|^Use -header-filter' >&2)
