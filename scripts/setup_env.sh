#!/usr/bin/env bash
# Makes the Python environments of this repository; sourced by test.sh and demo.sh, or run by hand:
#   scripts/setup_env.sh [3.12] [3.11]
# LOONG_ENV_DIR: the folder that holds them (default: the repository).
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_dir=${LOONG_ENV_DIR:-$repo}

say() { printf '== %s\n' "$*" >&2; }

# find_python 3.12 -> prints an interpreter of that version which can make environments, or fails.
find_python() {
    local version=$1 candidate candidates=("python$1")
    if command -v pyenv >/dev/null 2>&1; then
        candidate=$(pyenv versions --bare 2>/dev/null | grep -E "^${version//./\\.}\.[0-9]+$" | sort -V | tail -n 1) || true
        [ -z "$candidate" ] || candidates+=("$(pyenv prefix "$candidate")/bin/python")
    fi
    candidates+=(python3 python)
    local probe="import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')"
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c "$probe" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "No Python $version with venv and ensurepip found: tried ${candidates[*]}."
    say "Install one (a package python$version, or 'pyenv install $version') so that 'python$version' is on PATH."
    return 1
}

# quiet_pip SECONDS_EXPECTED PYTHON ARGUMENTS...: pip without chatter, but a line now and then while it works.
quiet_pip() {
    local expected=$1 python=$2 started=$SECONDS status=0 heartbeat
    shift 2
    while sleep 10 && kill -0 $$ 2>/dev/null; do
        say "  still installing: $((SECONDS - started)) s of about $expected s"
    done >&2 &
    heartbeat=$!
    "$python" -m pip --disable-pip-version-check --no-input -qq "$@" || status=$?
    kill "$heartbeat" 2>/dev/null || true
    return "$status"
}

# make_env 3.12 -> .venv-3.12 with the versions of requirements/py3.12.txt; nothing to do when it is up to date.
make_env() {
    local version=$1 pins="$repo/requirements/py$1.txt" env="$env_dir/.venv-$1" python stamp
    stamp=$(cat "$pins" "$repo/pyproject.toml" <(printf '%s\n' "$repo") | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$env/loong-stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    python=$(find_python "$version")
    say "Setting up $env with the versions of requirements/py$version.txt (once; up to 6 GB on disk)"
    rm -f "$env/loong-stamp"
    "$env/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$env"
    quiet_pip 120 "$env/bin/python" install -r "$pins"
    quiet_pip 20 "$env/bin/python" install --no-deps --no-build-isolation -e "$repo"
    printf '%s\n' "$stamp" >"$env/loong-stamp"
    say "$env is ready"
}

# side_megatron 0.17.1 -> prints a folder with that megatron-core alone, to be put on PYTHONPATH.
side_megatron() {
    local version=$1 folder="$env_dir/.venv-side/megatron-core-$1"
    if [ ! -e "$folder/loong-stamp" ]; then
        rm -rf "$folder"
        say "Fetching megatron-core $version"
        quiet_pip 20 "$env_dir/.venv-3.12/bin/python" install --no-deps --target "$folder" "megatron-core==$version"
        touch "$folder/loong-stamp"
    fi
    printf '%s\n' "$folder"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    for version in "${@:-3.12}"; do
        make_env "$version"
    done
fi
