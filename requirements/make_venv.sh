#!/usr/bin/env bash
# make_venv.sh VENV PYTHON: create or update the virtual environment VENV with the tested versions
# for PYTHON, and install this repository into it (editable).
# make_venv.sh VENV PYTHON PINS: the same with the versions in PINS, and without this repository.
set -euo pipefail
venv=$1 python=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

minor=$("$python" -c 'import sys; print(sys.version_info.minor if sys.version_info[0] == 3 else 0)')
if [ "$minor" -lt 11 ]; then
    echo "$python is Python 3.$minor, but 3.11 or newer is needed (DeepSpeed and Megatron-core)." >&2
    echo "Name one: make PYTHON=/path/to/python3.11 ..." >&2
    exit 2
fi
pins=requirements/cpu-py311.txt
[ "$minor" -ge 12 ] && pins=requirements/cpu-py312.txt
pins=${3:-$pins}

echo "installing $pins into $venv (Python 3.$minor)" >&2
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "import sys; assert sys.version_info.minor == $minor" 2>/dev/null; then
    "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
"${pip[@]}" -r "$pins"
if [ $# -lt 3 ]; then
    # The pinned setuptools builds this package; no second, temporary environment is fetched for it.
    "${pip[@]}" --no-deps --no-build-isolation --editable .
fi
