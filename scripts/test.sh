#!/usr/bin/env bash
# README's second command: sets up the test environment and runs ruff, pyright and pytest.
# Arguments go to pytest: `bash scripts/test.sh -m slow` runs the slow tests, which are left out otherwise, and
# `-m "not train and not slow"` what neither trains, compiles a model nor starts a process.
# `bash scripts/test.sh --oldest` runs pytest alone, with the oldest torch, transformers, triton, trl, accelerate and peft
# that pyproject.toml allows, in an environment of its own, .venv-oldest. CI runs the newest; run this before a release, or
# after a lower bound or a use of one of these libraries' private names has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${1:-}" = --oldest ]; then
    shift
    ensure_oldest_env test
else
    ensure_env test
    # Style and types are one for all versions: those that a newcomer's install brings.
    ruff format --check .
    ruff check .
    pyright
fi
if [ "$#" -eq 0 ]; then
    set -- -m "not slow"
fi
# A worker takes neighbours, which share what a module or a folder makes once, and in the end what others have left.
exec python -m pytest -q -n "${PYTEST_WORKERS:-2}" --dist worksteal "$@"
