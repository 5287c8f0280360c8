#!/usr/bin/env bash
# Installs, builds and passes every test: the release build, then the same suite under ASan + UBSan and under TSan, and
# the report on compiled GPU kernels. --quick runs the release build only. On 2 cores: about 45 minutes the first time,
# --quick about 12.
. "$(dirname "$0")/common.sh"

install_packages $BUILD_PACKAGES $TEST_PACKAGES
make_venv
export CTEST_OUTPUT_ON_FAILURE=1
CMAKE_OPTIONS="-DTC_TESTS=ON"

presets="release asan-ubsan tsan"
if [ "${1:-}" = "--quick" ]; then presets=release; fi
for preset in $presets; do
  build "$preset" all
  say "test: preset $preset"
  ctest --test-dir "build/$preset" -j 2 --no-tests=error
done
if [ "${1:-}" != "--quick" ]; then
  say "gpu report: every kernel compiled for sm_80, sm_90 and sm_120"
  scripts/gpu_report.sh
fi
say "all tests passed: $presets"
