"""Preference training in less memory: ASFT, which needs no reference model, or any loss of TRL's DPOTrainer.

    hf-lowmem dpo --config integrations/trl/asft_apollo_mini.yaml --output_dir out

The data set has the columns prompt, chosen and rejected. Every field of trl's ScriptArguments and ModelConfig and of
LowMemDPOConfig is a flag and a key of the YAML file; an unknown one is an error.

With `--sft_first` the model first learns the chosen answers, by SFT in the same process with the same fields:

    hf-lowmem dpo --config ... --output_dir out --sft_first --sft_epochs 1 --sft_learning_rate 2e-5

Its result is saved to out/sft, is what the preference stage starts from, and is its reference model, if the loss needs
one. Adapters are merged into it, so that the second stage has new ones and their absence is the reference. As two
commands, on other data for instance: `hf-lowmem sft`, then this with its --output_dir as --model_name_or_path.
"""

import copy
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from trl import maybe_extract_prompt

from hf_lowmem.cli.train import train
from hf_lowmem.training.callbacks import LowMemCallback
from hf_lowmem.training.dpo import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer

# What the stages do not share: the loss, and what speaks of the whole run or of the second stage's progress.
NOT_SHARED = (
    "loss_type",
    "max_steps",
    "resume_from_checkpoint",
    "push_to_hub",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
TWO_COMMANDS = "Run `hf-lowmem sft`, then `hf-lowmem dpo` on what it saved"


@dataclass
class FirstStage:
    """Flags of an SFT stage before the preference stage.

    Raises:
        ValueError: for a value out of range, or one that has no effect because there is no such stage.
    """

    sft_first: bool = field(
        default=False, metadata={"help": "Before the preference stage, train on prompt + chosen. Saved to out/sft."}
    )
    sft_epochs: float | None = field(default=None, metadata={"help": "Epochs of the SFT stage. Default: 1."})
    sft_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the SFT stage, usually ten times the preference stage's or more. Default: "
            f"{LowMemSFTConfig.__dataclass_fields__['learning_rate'].default:g}, trl's own for SFT."
        },
    )

    def __post_init__(self) -> None:
        for name in ("sft_epochs", "sft_learning_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if not self.sft_first:
                raise ValueError(f"{name}={value!r} has no effect without an SFT stage. Add --sft_first, or drop it.")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: it must be a finite number above 0.")

    def run(self, *, model: str, args: Any, **given: Any) -> str:
        """The model to go on from: the one trained here, or `model` where no stage was asked for.

        Raises:
            ValueError: where the two stages cannot be one command, or a resumed run's first stage is not there.
        """
        if not self.sft_first:
            return model
        folder = Path(args.output_dir) / "sft"
        if args.resume_from_checkpoint:
            if not folder.is_dir():
                raise ValueError(
                    f"resume_from_checkpoint={args.resume_from_checkpoint!r}: {folder}, from which that run's "
                    "preference stage started, is not there. Give its output_dir, or start anew."
                )
            return str(folder)
        check(args, **given)
        train_first(model, self.arguments(args, folder), given)
        return str(folder)

    def arguments(self, args: Any, folder: Path) -> LowMemSFTConfig:
        """`args` of the preference stage for the SFT stage: every field of both that was set."""
        values = {}
        for f in fields(LowMemSFTConfig):
            if f.init and f.name not in NOT_SHARED and getattr(args, f.name, f.default) != f.default:
                values[f.name] = getattr(args, f.name)
        values |= {"output_dir": str(folder), "num_train_epochs": self.sft_epochs or 1.0}
        values.pop("learning_rate", None)
        if self.sft_learning_rate is not None:
            values["learning_rate"] = self.sft_learning_rate
        return LowMemSFTConfig(**values)


def check(args: Any, *, train_dataset: Any, quantization_config: Any, peft_config: Any, **_: Any) -> None:
    """Raise ValueError where the SFT stage cannot be part of this command."""
    if quantization_config is not None:
        raise ValueError(
            "sft_first=True with a quantised model: adapters cannot be merged into quantised weights without loss. "
            f"{TWO_COMMANDS}, or load the model unquantised."
        )
    if peft_config is not None and getattr(args, "fsdp", None):
        raise ValueError(f"sft_first=True with fsdp: adapters cannot be merged into sharded weights. {TWO_COMMANDS}.")
    if not hasattr(train_dataset, "__len__"):
        raise ValueError(
            "sft_first=True with dataset_streaming=True: a stream has no length that epochs could count. "
            f"{TWO_COMMANDS}, both with --max_steps."
        )


def train_first(model: str, args: LowMemSFTConfig, given: dict[str, Any]) -> None:
    """Train `model` by SFT, save it to `args.output_dir`, and keep nothing of it in memory."""
    test = given["eval_dataset"]
    trainer: Any = LowMemSFTTrainer(
        model,
        args=args,
        train_dataset=answered(given["train_dataset"]),
        eval_dataset=None if test is None else answered(test),
        processing_class=given["processing_class"],
        peft_config=copy.deepcopy(given["peft_config"]),  # peft writes the model's name into it
        callbacks=[LowMemCallback()],
    )
    trainer.train()
    if given["peft_config"] is None:
        trainer.save_model(args.output_dir)
    else:
        whole = trainer.model.merge_and_unload()
        if trainer.is_world_process_zero():
            whole.save_pretrained(args.output_dir)
            given["processing_class"].save_pretrained(args.output_dir)
        del whole
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer  # with it, model, gradients and optimizer state; the trainer is part of reference cycles
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answered(dataset: Any) -> Any:
    """Columns prompt and completion, the chosen answer; and those that a chat template reads."""

    def row(example: dict[str, Any]) -> dict[str, Any]:
        pair = maybe_extract_prompt(example)
        template = {name: example[name] for name in ("tools", "chat_template_kwargs") if name in example}
        return {"prompt": pair["prompt"], "completion": pair["chosen"]} | template

    return dataset.map(row, remove_columns=dataset.column_names)


def run(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Train as `arguments` say (default: the process's); the exit status."""
    return train(LowMemDPOConfig, LowMemDPOTrainer, FirstStage, arguments=arguments, command=command)


if __name__ == "__main__":
    sys.exit(run())
