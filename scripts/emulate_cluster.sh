#!/usr/bin/env bash
# A cluster on this machine: runs COMMAND once per rank, the nodes joined by slow NICs; --help tells more.
#   sudo scripts/emulate_cluster.sh NODES RANKS_PER_NODE --nic 400mbit --nics-per-node K [--report FILE] -- COMMAND
# Needs root and iproute2, and Python 3.11 or later: $PYTHON, or else the python3 on PATH.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.cluster_run "$@"
