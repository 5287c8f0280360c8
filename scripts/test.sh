#!/usr/bin/env bash
# Installs what is missing, builds in release and passes every test of it: about ten minutes on 2 cores.
#   --all   what CI runs: the tests under ASan + UBSan too, those with threads under TSan, style, and the report on
#           compiled GPU kernels. About 35 minutes on 2 cores; more than TC_TEST_MINUTES (55) is a failure.
# Tests with the label long are not part of either (tests/README.md).
. "$(dirname "$0")/common.sh"

all=
case "${1:-}" in
  "") ;;
  --all) all=1 ;;
  *) echo "usage: scripts/test.sh [--all]" >&2 && exit 2 ;;
esac
CMAKE_OPTIONS="-DTC_TESTS=ON"
STAGES=build/stages.tsv
mkdir -p build && : >"$STAGES"

# stage NAME COMMAND...: runs it and notes how long it took.
stage() {
  local name=$1 begin=$SECONDS
  shift
  "$@"
  printf '%s\t%d\n' "$name" $((SECONDS - begin)) >>"$STAGES"
}

run_tests() {
  local preset=$1
  say "test: preset $preset"
  ctest --test-dir "build/$preset" -j "$(nproc)" -LE long --no-tests=error --output-on-failure --output-junit test_times.xml
}

test_preset() {
  stage "build $1" build "$1" all
  stage "test $1" run_tests "$1"
}

stage packages install_packages $BUILD_PACKAGES $TEST_PACKAGES ${all:+$STYLE_PACKAGES}
stage python make_venv
test_preset release
if [ -n "$all" ]; then
  stage style scripts/style.sh
  test_preset asan-ubsan
  test_preset tsan
  say "gpu report: every kernel as compiled for sm_80, sm_90 and sm_120"
  stage "gpu report" scripts/gpu_report.sh
fi
say "times"
.venv/bin/python scripts/test_times.py --stages "$STAGES" ${all:+--minutes "${TC_TEST_MINUTES:-55}"}
say "all tests passed"
