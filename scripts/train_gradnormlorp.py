"""GradNormLoRP (arXiv 2412.19616): weight-normalised adapters whose gradients are projected to a smaller rank still.

    python scripts/train_gradnormlorp.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --use_peft --use_dora --lora_target_modules all-linear --lora_r 32 --lora_alpha 64 \
        --optim galore --lowmem_rank 8 --lowmem_state 8bit --learning_rate 1e-4

It is two things that exist, put together:
- DoRA adapters of peft: W = magnitude * (W0 + s * B @ A) / norm of each row of (W0 + s * B @ A);
- a projected method for A and B: `galore`, or another low-rank one. The magnitudes, being vectors, take Adam.

Adam's moments of an adapter of rank 32 then have rank `lowmem_rank`, which must be below `lora_r`. The paper projects
from both sides, here it is the smaller one, as in the rest of the family.

Flags and keys of a YAML file as for scripts/train_sft.py, and a setting that would make it another method is an error.
Not for you when all weights can be trained: `galore` alone does that with no adapter, and its result is no low-rank
change.
"""

from typing import Any

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.cli.train import train
from hf_lowmem.optim import methods_with


class GradNormLoRPTrainer(LowMemSFTTrainer):
    """LowMemSFTTrainer that makes sure of the combination.

    Raises:
        ValueError: where the adapters are not DoRA's, or the method does not project their gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        adapters, optim = kwargs["peft_config"], kwargs["args"].optim
        if not getattr(adapters, "use_dora", False):
            raise ValueError(
                f"peft_config={adapters!r}: GradNormLoRP trains DoRA adapters. Add --use_peft --use_dora and "
                "--lora_target_modules all-linear."
            )
        if optim not in methods_with("rank"):
            raise ValueError(
                f"optim={optim!r} does not project gradients. Choose one of: {', '.join(methods_with('rank'))}."
            )
        super().__init__(*args, **kwargs)


if __name__ == "__main__":
    train(LowMemSFTConfig, GradNormLoRPTrainer)
