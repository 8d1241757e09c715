"""Training on rewards of answers that the model makes: GRPO, RLOO, and ReMax (arXiv 2310.10505), in less memory.

    python scripts/train_rewards.py grpo --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --reward rewards.py:short --optim apollo --lowmem_state 8bit --learning_rate 1e-6
    python scripts/train_rewards.py remax --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --reward rewards.py:short --optim apollo --lowmem_state 8bit --learning_rate 1e-6

The first word says what a reward is compared with, its baseline:

    grpo    the mean of the same prompt's answers, over their deviation    TRL's GRPOTrainer
    rloo    the mean of the same prompt's other answers                    TRL's RLOOTrainer
    remax   the reward of the greedy answer, which is not trained on       RLOOTrainer with pairs of two kinds

TRL has no greedy baseline. With two answers a prompt the mean of the others is the other answer's reward, so one is
sampled and one is greedy, and of each pair the sampled one alone goes on to the loss: REINFORCE with ReMax's baseline,
at one forward and backward pass a prompt. Where `beta` is above zero both rewards have their KL penalty, as TRL's do.

A reward is FILE.py:NAME, a function as TRL calls it (prompts, completions, completion_ids, the data's columns), or the
name or folder of a reward model; several add up (`reward_weights`). DATA has a column prompt. All other flags, and keys
of a YAML file, are TRL's and hf_lowmem's. Methods of zeroth order are refused: these batches are made while it trains.

Not for you when pairs or right answers are at hand: `hf-lowmem dpo` and `sft` cost no generation, which takes most of
the time here, and on a CPU nearly all. The quality of the three was not compared here.
"""

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_lowmem import with_lowmem
from hf_lowmem.cli.train import train
from hf_lowmem.training.mixin import LowMemTrainerMixin

Reward = Callable[..., object] | str
GrpoFields, RlooFields = with_lowmem(GRPOConfig), with_lowmem(RLOOConfig)
HELP = "FILE.py:NAME of a function, or a reward model's name or folder. Several add up."


def rewards(named: Sequence[str] | None) -> list[Reward]:
    """What scores answers. Raises ValueError where there is nothing of that name."""
    if not named:
        raise ValueError("reward is not set: give --reward FILE.py:NAME, or a reward model.")
    return [_function(*name.rsplit(":", 1)) if ".py:" in name else name for name in named]


def _function(file: str, name: str) -> Reward:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ValueError(f"reward={file}:{name}: there is no such file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"reward={file}:{name}: the file has no function of that name.")
    return found


@dataclass
class GrpoArguments(GrpoFields):
    """GRPOConfig with the fields of LowMemArguments, and the rewards."""

    reward: list[str] | None = field(default=None, metadata={"help": HELP})


@dataclass
class RlooArguments(RlooFields):
    """RLOOConfig with the fields of LowMemArguments, and the rewards."""

    reward: list[str] | None = field(default=None, metadata={"help": HELP})


class LowMemGRPOTrainer(LowMemTrainerMixin, GRPOTrainer):
    """GRPOTrainer with the fields."""


class LowMemRLOOTrainer(LowMemTrainerMixin, RLOOTrainer):
    """RLOOTrainer with the fields."""


class ReMaxTrainer(LowMemRLOOTrainer):
    """LowMemRLOOTrainer whose baseline is the reward of the greedy answer.

    Raises:
        ValueError: for settings with which there is no pair of a sampled and a greedy answer on one process.
    """

    def __init__(self, model: object, reward_funcs: object, args: RLOOConfig, **kwargs: object) -> None:
        wanted: dict[str, tuple[object, ...]] = {
            "num_generations": (2,),
            "num_generations_eval": (2, None),
            "use_vllm": (False,),
            "use_transformers_continuous_batching": (False,),
            "normalize_advantages": (False,),
        }
        for name, right in wanted.items():
            if getattr(args, name) not in right:
                raise ValueError(
                    f"{name}={getattr(args, name)!r}: remax pairs one sampled with one greedy answer, made by "
                    f"transformers, and its advantage is the difference of rewards. Set it to {right[0]!r}."
                )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(args, name) % 2:
                raise ValueError(f"{name}={getattr(args, name)!r}: remax needs pairs on one process. Make it even.")
        super().__init__(model, reward_funcs, args=args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: object, multimodal_fields: object
    ) -> list[list[int]]:
        """A sampled and a greedy answer by turns, as the prompts come twice each."""
        if images is not None or multimodal_fields:
            raise ValueError("remax is of text here. Train models of images with rloo.")
        make = super()._generate_single_turn
        sampled, plain = make(prompt_ids[0::2], None, {}), self.generation_config
        self.generation_config = copy.deepcopy(plain)
        self.generation_config.do_sample = False
        try:
            greedy = make(prompt_ids[1::2], None, {})
        finally:
            self.generation_config = plain
        return [answer for pair in zip(sampled, greedy, strict=True) for answer in pair]

    def _generate_and_score_completions(self, inputs: list[dict[str, object]]) -> dict[str, Tensor]:
        """The sampled answers; their advantage is over the greedy one's reward."""
        made = super()._generate_and_score_completions(inputs)
        odd = [name for name, value in made.items() if not isinstance(value, Tensor) or len(value) != len(inputs)]
        assert not odd, odd  # TRL has learnt to hand on something else than a row an answer
        return {name: value[0::2] for name, value in made.items()}


KINDS: dict[str, tuple[type, Callable[..., Trainer]]] = {
    "grpo": (GrpoArguments, LowMemGRPOTrainer),
    "rloo": (RlooArguments, LowMemRLOOTrainer),
    "remax": (RlooArguments, ReMaxTrainer),
}


def made(
    trainer_class: Callable[..., Trainer], *, model: str, args: "GrpoArguments | RlooArguments", **given: object
) -> Trainer:
    """The trainer, with its rewards."""
    return trainer_class(model, rewards(args.reward), args=args, **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit status."""
    kind, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if kind not in KINDS:
        print(f"train_rewards: {kind!r}: the first word is one of {', '.join(KINDS)}.", file=sys.stderr)
        return 2
    config, trainer_class = KINDS[kind]
    return train(config, functools.partial(made, trainer_class), arguments=rest[:-1], command=f"train_rewards {kind}")


if __name__ == "__main__":
    sys.exit(main())
