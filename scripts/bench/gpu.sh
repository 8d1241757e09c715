#!/usr/bin/env bash
# Everything that only a CUDA device can show, in parts of under eight minutes each:
#   bash scripts/bench/gpu.sh                     all parts, one after the other
#   bash scripts/bench/gpu.sh --part optimizer    one part
#   bash scripts/bench/gpu.sh --toy               tiny sizes; without a device the kernels run in Triton's interpreter
# Needs torch, triton, transformers and this clone; uses trl, liger-kernel, bitsandbytes and torchao where they are.
# Rows go to scripts/bench/records/gpu.jsonl (toy: to a temporary file). No network, no hub: random weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! nvidia-smi -L >/dev/null 2>&1; then
    export TRITON_INTERPRET=1
fi
case " $* " in
*" --part "*) exec python scripts/bench/gpu.py "$@" ;;
esac
for part in kernels optimizer training plan; do
    python scripts/bench/gpu.py --part "$part" "$@"
done
exec python scripts/bench/gpu.py --part report "$@"
