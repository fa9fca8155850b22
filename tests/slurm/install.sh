#!/bin/sh
# Debian's Slurm, for the private cluster of the tests: installed where that may be done, else said plainly.
# With LATENTWIRE_REQUIRE_SLURM=1 a failure is an error.
missing() {
  echo "The tests against a real Slurm will be skipped: $1"
  [ "${LATENTWIRE_REQUIRE_SLURM:-0}" != 1 ] || exit 1
  exit 0
}
PATH="$PATH:/usr/sbin:/sbin"
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || lacking="${lacking:-} $program"
done
[ -n "${lacking:-}" ] || exit 0
command -v apt-get >/dev/null || missing "$lacking not found, and there is no apt-get to install them"
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
  missing "$lacking not found; as root: apt-get install slurm-wlm munge"
fi
echo "installing Slurm for the tests:$lacking"
$sudo apt-get update -qq &&
  $sudo env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge >/dev/null ||
  missing "apt-get install slurm-wlm munge failed"
