#!/usr/bin/env bash
# Put the programs prometheus and promtool into a directory, from Debian's package,
# unless they are there. Needs apt, not root, and nothing that the package depends on.
# usage: tools/prometheus.sh DIRECTORY
set -euo pipefail
directory=$(realpath -m "$1")
if [ -x "$directory/prometheus" ]; then exit; fi
mkdir -p "$directory"
scratch=$(mktemp -d -p "$directory")
trap 'rm -r "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
cat >"$scratch/apt.conf" <<END
Dir::State::Lists "$scratch/lists";
Dir::Cache "$scratch/cache";
APT::Sandbox::User "root";
END
export APT_CONFIG=$scratch/apt.conf
# Lists of our own: those of the system may be missing or name a version that is gone.
apt-get -qq update
(cd "$scratch" && apt-get -qq download prometheus)
dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch"
# Others may be doing the same: programs appear whole, and the one asked for last.
mv "$scratch/usr/bin/promtool" "$directory"
mv "$scratch/usr/bin/prometheus" "$directory"
