#!/usr/bin/env bash
# README's second command: sets up the test environment and runs ruff, pyright and pytest.
# Arguments go to pytest: `bash scripts/test.sh -m slow` runs the slow tests, which are left out otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
ensure_env test

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff format --check .
ruff check .
pyright
if [ "$#" -eq 0 ]; then
    set -- -m "not slow"
fi
exec python -m pytest -q -n "${PYTEST_WORKERS:-2}" "$@"
