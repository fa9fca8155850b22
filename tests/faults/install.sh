#!/bin/sh
# A C compiler, for the failing disk of tests/faults: installed where that may be done, else said plainly.
# With LATENTWIRE_REQUIRE_SLURM=1 (CI: nothing is skipped) a failure is an error.
missing() {
  echo "The tests of a failing disk will be skipped: $1"
  [ "${LATENTWIRE_REQUIRE_SLURM:-0}" != 1 ] || exit 1
  exit 0
}
if command -v gcc >/dev/null || command -v cc >/dev/null; then exit 0; fi
command -v apt-get >/dev/null || missing "gcc not found, and there is no apt-get to install it"
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
  missing "gcc not found; as root: apt-get install gcc libc6-dev"
fi
echo "installing gcc for the tests of a failing disk"
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null ||
  missing "apt-get install gcc libc6-dev failed"
