# Shared by demo.sh, test.sh and style.sh: installs what is missing, builds in release. Sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

BUILD_PACKAGES="g++ cmake libbenchmark-dev ninja-build pkg-config libboost1.81-dev libboost-context1.81-dev libcli11-dev libfmt-dev libhwloc-dev libjs-marked libmimalloc-dev
                libpcre2-dev libsodium-dev libspdlog-dev libtbb-dev liburing-dev libutf8proc-dev libxxhash-dev nlohmann-json3-dev prometheus-cpp-dev"
TEST_PACKAGES="chromium chromium-driver dpkg-dev file fonts-dejavu-core libgtest-dev mold python3 python3-venv"
STYLE_PACKAGES="clang-format-14 clang-tidy-14"

# install_packages NAME...: apt-get for those that are not there; nothing at all when all are.
install_packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    say "packages: all ${#} are installed"
    return
  fi
  say "packages: installing ${missing[*]}"
  local root=()
  if [ "$(id -u)" -ne 0 ]; then root=(sudo); fi
  "${root[@]}" apt-get update -q
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# make_venv FOLDER LIST: the Python packages of a list of tests/, made once and again when the list changes.
make_venv() {
  local folder=$1 list=$2
  if cmp -s "$list" "$folder/requirements.txt"; then
    say "python: $folder is up to date"
    return
  fi
  say "python: installing the packages of $list into $folder"
  python3 -m venv "$folder"
  # What is imported is compiled then; of the clients that is a small part.
  "$folder/bin/pip" install -q --disable-pip-version-check --no-compile -r "$list"
  cp "$list" "$folder/requirements.txt"
}

# build PRESET TARGET... with cmake options in CMAKE_OPTIONS. A unity build: all of it is built a third faster, one changed
# file slower, so `cmake --preset release` by hand is none.
build() {
  local preset=$1
  shift
  say "build: preset $preset, targets: $*"
  cmake --preset "$preset" -DCMAKE_UNITY_BUILD=ON ${CMAKE_OPTIONS:-} --log-level=NOTICE
  cmake --build --preset "$preset" --target "$@"
}
