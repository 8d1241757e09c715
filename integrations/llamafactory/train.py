"""LLaMA-Factory with hf_lowmem's optimizers and saved activations.

    HF_LOWMEM_CONFIG='{"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "checkpoint_fp8"}' \\
        python integrations/llamafactory/train.py examples/train_full/llama3_full_sft.yaml

LLaMA-Factory has no door for an optimizer from outside. It builds its own in one function, which every stage imports by
name; this script puts ours in that function's place before the stages are imported, and hands LLaMA-Factory a callback
for the activations, through the argument that it has for callbacks. Learning rate, weight decay and seed are
LLaMA-Factory's own settings.
"""

import sys
from typing import Any

from hf_lowmem import LowMemCallback, rules
from hf_lowmem.optim import ALL_METHODS
from hf_lowmem.training import section
from hf_lowmem.training.plugin import LowMemPlugin


class Settings(LowMemPlugin):
    """The fields of HF_LOWMEM_CONFIG."""

    PROGRAM = "LLaMA-Factory"


def optimizer_for(model: Any, training_args: Any) -> Any:
    """Ours, by HF_LOWMEM_CONFIG; None where it names none."""
    if Settings.from_env().optim not in ALL_METHODS:
        return None
    values = section.from_env() | {
        "learning_rate": training_args.learning_rate,
        "weight_decay": training_args.weight_decay,
    }
    plugin = Settings.from_section(section.VARIABLE, values)
    run = rules.Run.from_arguments(training_args).asking(rules.Run.from_arguments(plugin))
    rules.check(run.knowing(clips="LLaMA-Factory"))
    plugin.seed = training_args.seed
    return plugin.make_optimizer(model)


def main() -> None:
    tiers = Settings.from_env().lowmem_activations
    from llamafactory.train import trainer_utils  # pyright: ignore[reportMissingImports]

    theirs = trainer_utils.create_custom_optimizer

    def create_custom_optimizer(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        ours = optimizer_for(model, training_args)
        return theirs(model, training_args, finetuning_args) if ours is None else ours

    trainer_utils.create_custom_optimizer = create_custom_optimizer
    from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

    run_exp(callbacks=[LowMemCallback(tiers)] if tiers is not None else None)


if __name__ == "__main__":
    sys.exit(main())
