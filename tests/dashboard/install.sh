#!/bin/sh
# Debian's Chromium, for the tests of the dashboard: installed where that may be done, else said plainly.
# With LATENTWIRE_REQUIRE_CHROMIUM=1 a failure is an error.
missing() {
  echo "The tests of the dashboard in a browser will be skipped: $1"
  [ "${LATENTWIRE_REQUIRE_CHROMIUM:-0}" != 1 ] || exit 1
  exit 0
}
command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || missing "chromium not found, and there is no apt-get to install it"
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
  missing "chromium not found; as root: apt-get install chromium"
fi
echo "installing Chromium for the tests of the dashboard"
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
  missing "apt-get install chromium failed"
