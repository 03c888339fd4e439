#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv and install everything of pyproject.toml into it; a second run finds its stamp and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
missing() {
  printf 'setup: %s is missing\n       %s\n       run: %s\n' "$1" "$2" "$3" >&2
  exit 1
}

command -v "$python" >/dev/null || missing "$python" "Cloister is written in Python" "sudo apt-get install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  missing "Python 3.11" "$("$python" --version) is too old" "PYTHON=/path/to/python3.11 make demo"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  missing "the venv module" "Debian and Ubuntu pack it apart" "sudo apt-get install python3-venv"

stamp=.venv/.setup-$("$python" -c 'import hashlib, pathlib, sys; print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest()[:16])' pyproject.toml scripts/setup.sh)
if [ -e "$stamp" ] && [ -x .venv/bin/cloister ]; then exit 0; fi

started=$SECONDS
[ -x .venv/bin/python ] || { say "1/3 making .venv with $("$python" --version)"; "$python" -m venv .venv; }
quiet=(--disable-pip-version-check); [ -t 1 ] || quiet+=(--quiet --progress-bar off)

if ! .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(not m.version("torch").startswith("2.13."))' 2>/dev/null; then
  say "2/3 installing PyTorch (the CPU build where one is to be had)"
  # A CPU build comes from wherever pip is told to look (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL); without one, the
  # registry's ordinary build is several gigabytes larger and runs as well.
  .venv/bin/pip install "${quiet[@]}" 'torch==2.13.0+cpu' 2>/dev/null ||
    { say "    no CPU build found; taking the ordinary one"; .venv/bin/pip install "${quiet[@]}" 'torch==2.13.0'; }
fi
say "3/3 installing Cloister, its services and its tools"
.venv/bin/pip install "${quiet[@]}" -e '.[train,serve,k8s,hsm,transit,data,dev,bench]'

rm -f .venv/.setup-*; touch "$stamp"
say "done in $((SECONDS - started)) s"
