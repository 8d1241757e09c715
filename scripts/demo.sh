#!/usr/bin/env bash
# Installs hf-lowmem from this clone, in .venv unless an environment is active, and runs the demo.
# Arguments go to the demo: `bash scripts/demo.sh --quick`, `--model NAME`, `--output_dir FOLDER`; see `--help`.
set -euo pipefail

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env demo
hf-lowmem demo "$@"
