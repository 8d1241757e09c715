"""Preference training in less memory: `hf-lowmem dpo` as a script, for launchers that take one.

    python scripts/train_preference.py --config integrations/trl/asft_apollo_mini.yaml --output_dir out
    hf-lowmem launch --config_file integrations/accelerate/fsdp2.yaml scripts/train_preference.py --config ...

See hf_lowmem/cli/dpo.py for the columns of the data set and for `--sft_first`.
"""

import sys

from hf_lowmem.cli.dpo import run

if __name__ == "__main__":
    sys.exit(run())
