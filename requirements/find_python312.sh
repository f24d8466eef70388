#!/usr/bin/env bash
# Print the path of a Python 3.12 that runs, from PATH or from pyenv; fail when there is none.
# A pyenv shim on PATH may exist and still refuse to run, so every candidate is tried.
set -uo pipefail
candidates=$(type -ap python3.12)
if pyenv_root=$(pyenv root 2>/dev/null); then
    candidates+=" $(ls -d "$pyenv_root"/versions/3.12*/bin/python3.12 2>/dev/null)"
fi
for candidate in $candidates; do
    if "$candidate" -c 'import sys, venv; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
        echo "$candidate"
        exit 0
    fi
done
exit 1
