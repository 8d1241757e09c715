"""Preference training in less memory: ASFT, which needs no reference model, or any loss of TRL's DPOTrainer.

    python scripts/train_preference.py --config integrations/trl/asft_apollo_mini.yaml --output_dir out

The data set has the columns prompt, chosen and rejected. Every field of trl's ScriptArguments and ModelConfig and of
LowMemDPOConfig is a flag and a key of the YAML file; an unknown one is an error.
"""

from _training import main

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer

if __name__ == "__main__":
    main(LowMemDPOConfig, LowMemDPOTrainer)
