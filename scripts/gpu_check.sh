#!/usr/bin/env bash
# Checks everything about one GPU in ten minutes at most: kernels, attention, ranks that share the GPU, Megatron's
# training, speed. Needs this checkout, Python 3.11 or newer with PyTorch, and one NVIDIA GPU; downloads nothing.
#   scripts/gpu_check.sh --limit 520 --out FOLDER     all of it; FOLDER/record.json after every step, FOLDER/log.txt
#   scripts/gpu_check.sh --cpu                        what a CPU can run of it
#   scripts/gpu_check.sh --only Megatron kernel | --list | --docs | --commit HASH
# PYTHON names another interpreter. Pure-Python packages can be carried in by PYTHONPATH.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
GPU_CHECK_STARTED=$(date +%s)
export GPU_CHECK_STARTED
exec "${PYTHON:-python3}" -W ignore -m benchmarks.gpu "$@"
