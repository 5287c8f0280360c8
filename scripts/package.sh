#!/usr/bin/env bash
# Builds the Debian package of what is checked out: build/package/thermocline_VERSION_ARCH.deb. It runs on any x86-64 CPU
# and picks its kernels at the start. The GPU's are in it where the CUDA toolkit is found; its description says whether.
. "$(dirname "$0")/common.sh"

install_packages $BUILD_PACKAGES dpkg-dev file
build release thermocline
(cd build/release && cpack -G DEB -B "$PWD/../package")
package=$(ls -t build/package/*.deb | head -1)
dpkg-deb -f "$package" Depends Description
say "install it with: apt-get install ./$package"
