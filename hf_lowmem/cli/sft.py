"""Supervised fine-tuning in less memory.

    hf-lowmem sft --config integrations/trl/sft_apollo_mini.yaml --output_dir out

Every field of trl's ScriptArguments and ModelConfig and of LowMemSFTConfig is a flag and a key of the YAML file; an
unknown one is an error.
"""

import sys
from collections.abc import Sequence

from hf_lowmem.cli.train import train
from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer


def run(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Train as `arguments` say (default: the process's); the exit status."""
    return train(LowMemSFTConfig, LowMemSFTTrainer, arguments=arguments, command=command)


if __name__ == "__main__":
    sys.exit(run())
