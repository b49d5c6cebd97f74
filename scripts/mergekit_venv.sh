#!/bin/sh
# mergekit in a virtual environment of its own (.venv-mergekit, ignored by git), for `make bench` and the tests marked `mergekit`:
#     scripts/mergekit_venv.sh && pytest -m mergekit tests/test_references.py
# It needs other versions of the same libraries than we do. mergekit is LGPL: we only run it, and never import or copy it.
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-mergekit
.venv-mergekit/bin/pip install --quiet torch==2.13.0 mergekit==0.1.5 immutables
.venv-mergekit/bin/python -c "from mergekit.merge_methods import merge_tensors"
