#!/bin/sh
# Runs the C++ tests as aarch64 code and holds its bits against this machine's.
#
#     tests/cpp/neon.sh [BUILD_DIR]          BUILD_DIR: build/neon-check where not given
#
# Needs Debian's g++-aarch64-linux-gnu and qemu-user, and cmake, ninja and g++. Builds for this machine and for
# aarch64, runs all tests of the second build under qemu, and compares what `bits` prints on each instruction set of
# aarch64 (neon, generic) with what it prints here: not a bit may differ.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/neon-check}
emulator="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export OMP_WAIT_POLICY=passive

configure() { # name, options...
  name=$1
  shift
  cmake -S "$root" -B "$build/$name" -G Ninja -DBATCHNORM_TESTS=ON -DBATCHNORM_WERROR=ON "$@" >/dev/null
}
configure native
cmake --build "$build/native" --target bits
configure aarch64 --toolchain "$root/cpp/aarch64-linux-gnu.cmake"
cmake --build "$build/aarch64"
ctest --test-dir "$build/aarch64" --output-on-failure --no-tests=error

# The first line names the instruction set.
"$build/native/tests/cpp/bits" | tail -n +2 >"$build/native.txt"
for isa in $($emulator "$build/aarch64/tests/cpp/bits" --list); do
  BATCHNORM_ISA=$isa $emulator "$build/aarch64/tests/cpp/bits" | tail -n +2 >"$build/$isa.txt"
  diff "$build/native.txt" "$build/$isa.txt" >"$build/difference.txt" || {
    head -n 20 "$build/difference.txt"
    echo "$isa must give the bits of this machine, got the differences above" >&2
    exit 1
  }
  echo "$isa: the same $(wc -l <"$build/$isa.txt") results as this machine"
done
