#!/usr/bin/env bash
# Compares multi-crop with torchvision in a new environment, because torchvision needs a matching
# release of torch. Runs the comparison tests, then the benchmark. Needs several GB and some minutes.
#
#     benchmarks/multicrop_environment.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-.venv-torchvision}"
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 \
    hypothesis kornia matplotlib numpy opencv-python-headless pillow pytest pytest-xdist \
    scikit-image scipy
"$folder/bin/pip" install --quiet --no-deps --editable .
export OMP_NUM_THREADS=1
"$folder/bin/pytest" --numprocesses=1 tests/test_multicrop_torchvision.py
"$folder/bin/python" -m benchmarks multicrop
