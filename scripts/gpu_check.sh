#!/usr/bin/env bash
# Checks everything about one GPU in ten minutes at most: kernels, attention, ranks that share the GPU, Megatron's
# training, speed. Needs this checkout, Python 3.11 or newer with PyTorch, and one NVIDIA GPU; downloads nothing.
#   scripts/gpu_check.sh             run it all; a table, and a record in benchmarks/records/
#   scripts/gpu_check.sh --cpu       what a CPU can run of it; no record
#   scripts/gpu_check.sh --only Megatron kernels | --list | --docs | --json FILE
# PYTHON names another interpreter. Pure-Python packages can be carried in by PYTHONPATH.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python3}" -W ignore -m megatron_loong.bench.gpu "$@"
