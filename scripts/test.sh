#!/usr/bin/env bash
# Installs what is missing, builds in release and passes every test of it: about fifteen minutes on 2 cores.
#   --all   what CI runs: the tests under ASan + UBSan too, those with threads under TSan, style, the report on compiled
#           GPU kernels, and a soak of three minutes. About 45 minutes on 2 cores; more than TC_TEST_MINUTES (55) is a
#           failure, or up to half as much again where a fixed piece of work takes as much longer (test_times.py).
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

# note_speed: what this machine takes for a fixed piece of work just now.
note_speed() { printf 'fixed work\t%s\n' "$(.venv/bin/python scripts/test_times.py --fixed-work)" >>"$STAGES"; }

run_tests() {
  local preset=$1
  say "test: preset $preset"
  ctest --test-dir "build/$preset" -j "$(nproc)" -LE long --no-tests=error --output-on-failure --output-junit test_times.xml
}

test_preset() {
  note_speed
  stage "build $1" build "$1" all
  note_speed
  stage "test $1" run_tests "$1"
}

stage packages install_packages $BUILD_PACKAGES $TEST_PACKAGES ${all:+$STYLE_PACKAGES}
stage python make_venv .venv tests/requirements.txt
stage "python clients" make_venv .venv-clients tests/requirements-clients.txt
if [ -n "$all" ]; then export TC_SOAK_SECONDS=36; fi
test_preset release
if [ -n "$all" ]; then
  stage style scripts/style.sh
  test_preset asan-ubsan
  test_preset tsan
  say "gpu report: every kernel as compiled for sm_80, sm_90 and sm_120"
  stage "gpu report" scripts/gpu_report.sh
fi
note_speed
say "times"
.venv/bin/python scripts/test_times.py --stages "$STAGES" ${all:+--minutes "${TC_TEST_MINUTES:-55}"}
say "all tests passed"
