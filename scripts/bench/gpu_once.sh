#!/usr/bin/env bash
# Everything that only a CUDA device can show, in one command of less than ten minutes:
#   bash scripts/bench/gpu_once.sh                          rows to $OUT/gpu.jsonl (default: gpu_out/gpu.jsonl)
#   ONLY="whole full" LIMIT=150 bash scripts/bench/gpu_once.sh    some steps, in less time; goes on where a run stopped
#   TOY=1 bash scripts/bench/gpu_once.sh                    tiny sizes on a CPU, in Triton's interpreter
# Then: python scripts/bench/gpu_report.py $OUT/gpu.jsonl
# Steps stand in the order of what they are worth; each has a budget in seconds, and what is cut loses no row that was made.
# Needs torch, triton, transformers and this clone, no network and no hub; uses trl, liger-kernel, bitsandbytes and
# torchao where they are, also as wheels in .whl/, which are unpacked beside $OUT and not installed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
START=$(date +%s)
: "${OUT:=gpu_out}" "${LIMIT:=560}" "${ONLY:=}" "${TOY:=}" "${PYTHON:=python3}"
STEPS=" smoke proofs roof optimizer kernels layers whole products full peers "
for name in $ONLY; do
    [[ "$STEPS" == *" $name "* ]] || { echo "ONLY=\"$ONLY\": there is no step $name. Choose of:$STEPS" >&2; exit 2; }
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
BESIDE=$(mktemp -d)
trap 'rm -rf "$BESIDE"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$BESIDE/triton}" TORCHINDUCTOR_CACHE_DIR="$BESIDE/inductor"
shopt -s nullglob
wheels=(.whl/*.whl)
if [ "${#wheels[@]}" -gt 0 ]; then
    timeout 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$BESIDE/site" "${wheels[@]}" || true
fi
export PYTHONPATH="$PWD:$PWD/scripts/bench:$BESIDE/site${PYTHONPATH:+:$PYTHONPATH}"
failed=0

seconds() { echo $(($(date +%s) - START)); }
say() { echo "[$(seconds) s] $*" | tee -a "$OUT/log.txt"; }
once() { # arguments of gpu_once.py, under the time that `budget` says
    timeout -k 3 "$budget" "$PYTHON" scripts/bench/gpu_once.py "$@" ${TOY:+--toy} --record "$OUT/gpu.jsonl" >>"$OUT/steps.txt" 2>&1
}
begin() { # name, budget: whether there is anything to do, and in `budget` the time for it
    [ -z "$ONLY" ] || [[ " $ONLY " == *" $1 "* ]] || return 1
    local left=$((LIMIT - $(seconds)))
    budget=$(($2 < left ? $2 : left))
    [ "$budget" -ge 10 ] || { say "$1: left out, no time"; return 1; }
}
end() { # name, exit status
    [ "$2" -eq 0 ] || failed=1
    [ "$2" -eq 124 ] && say "$1: cut after $budget s" || say "$1: exit status $2"
}
step() { # name, budget in seconds
    begin "$1" "$2" || return 0
    once "$1"
    end "$1" $?
}
checks() { # name, budget, cases of a kernel: all kernels at once, so that they compile on all cores
    begin "$1" "$2" || return 0
    local status=0 job kernel jobs=()
    if [ -n "$TOY" ]; then
        once check --cases 1 || status=$?
    else
        for kernel in $("$PYTHON" -c 'from hf_lowmem.kernels import KERNELS; print(*KERNELS)'); do
            once check --kernel "$kernel" --cases "$3" &
            jobs+=($!)
        done
        for job in "${jobs[@]}"; do wait "$job" || status=$?; done
    fi
    end "$1" "$status"
}

nvidia-smi -q -d CLOCK,POWER,MEMORY >"$OUT/smi.txt" 2>&1 || true
checks smoke 90 4          # does every kernel compile, and give the reference's bits
step proofs 25             # conversions, reciprocals and roots over all values
step roof 15               # what the device can do at best
step optimizer 95          # an update of 1.2e9 weights: device and host
step kernels 75            # bytes a second of each kernel
step layers 110            # 8 layers, forward and backward
step whole 90              # a Llama-3-8B, whole steps: peaks and tokens a second
step products 90           # whole steps in 8 bits beside bf16, at 2k, 8k and 16k tokens
checks full 120 100000     # every case of every kernel
step peers 90              # Liger, torch.compile, bitsandbytes, torchao
say "end"
exit "$failed"
