"""Supervised fine-tuning in less memory.

    python scripts/train_sft.py --config integrations/trl/sft_apollo_mini.yaml --output_dir out

Every field of trl's ScriptArguments and ModelConfig and of LowMemSFTConfig is a flag and a key of the YAML file; an
unknown one is an error.
"""

from _training import main

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer

if __name__ == "__main__":
    main(LowMemSFTConfig, LowMemSFTTrainer)
