#!/usr/bin/env bash
# Sets up what is missing, then lints and tests: scripts/test.sh [--all-versions] [--nightly] [pytest arguments]
#   (none)           Python 3.12, megatron-core 0.19.2
#   --all-versions   also the same tests on Python 3.11 with megatron-core 0.16.1, and import, install and
#                    uninstall on the versions in between
#   --nightly        also the tests that are too long for every change: hours
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

all_versions=false
selection=()
while :; do
    case "${1:-}" in
        --all-versions) all_versions=true ;;
        --nightly) selection=(-m "") ;;
        *) break ;;
    esac
    shift
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
failed=()

# check NAME COMMAND...: runs it, says what it was, remembers a failure and goes on.
check() {
    local name=$1
    shift
    say "$name"
    "$@" || failed+=("$name")
}

make_env 3.12
bin="$env_dir/.venv-3.12/bin"
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "pyright" "$bin/pyright" --pythonpath "$bin/python"
check "import-linter" "$bin/lint-imports" --no-cache
if $all_versions; then
    make_env 3.11
    for version in 0.17.1 0.18.2; do
        side=$(side_megatron "$version")
        check "versions.py on megatron-core $version" \
            env PYTHONPATH="$side:$repo" "$bin/python" tests/integration/versions.py
    done
    check "pytest on Python 3.11, megatron-core 0.16.1" "$env_dir/.venv-3.11/bin/python" -m pytest "${selection[@]}" "$@"
fi
check "pytest on Python 3.12, megatron-core 0.19.2" "$bin/python" -m pytest "${selection[@]}" "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf -v list '; %s' "${failed[@]}"
    say "FAILED: ${list:2}"
    exit 1
fi
say "all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
