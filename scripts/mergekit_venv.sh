#!/bin/sh
# The peer in a virtual environment of its own (.venv-mergekit, git-ignored), for `make bench` and the tests marked `mergekit`:
#     scripts/mergekit_venv.sh && pytest -m mergekit tests/test_references.py
# Ours and theirs need different versions of the same libraries, and theirs (LGPL) is only ever run, never imported or copied.
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-mergekit
.venv-mergekit/bin/pip install --quiet torch==2.13.0 mergekit==0.1.5 immutables
.venv-mergekit/bin/python -c "from mergekit.merge_methods import merge_tensors"
