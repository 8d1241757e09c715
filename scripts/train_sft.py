"""Supervised fine-tuning in less memory: `hf-lowmem sft` as a script, for launchers that take one.

python scripts/train_sft.py --config integrations/trl/sft_apollo_mini.yaml --output_dir out
hf-lowmem launch --config_file integrations/accelerate/fsdp2.yaml scripts/train_sft.py --config ...
"""

import sys

from hf_lowmem.cli.sft import run

if __name__ == "__main__":
    sys.exit(run())
