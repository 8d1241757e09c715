"""`hf-lowmem plan`: every flag of the trainer's config, of TRL's ModelConfig and ScriptArguments, and a few of its own.

A YAML file that trains with scripts/train_sft.py plans with `--config` as it is, so what is planned is what will run.
With `--budget 24GiB`, or `lowmem_budget` in the file, the settings that were left open are searched for the fastest
that fits, as the trainer would; `--max_length auto` then asks for the longest sequence.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from hf_lowmem.cli.parsing import Parser
from hf_lowmem.cli.pictures import check_picture
from hf_lowmem.memory.progress import stages
from hf_lowmem.planner.advice import Advice, parse_tokens, step_law
from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.methods import METHODS
from hf_lowmem.planner.models import find_config
from hf_lowmem.planner.parallel import PARALLEL
from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.fastest import longest, search
from hf_lowmem.planner.search.ranking import Found
from hf_lowmem.planner.simulate import Plan, plan
from hf_lowmem.planner.step import IMPLEMENTATIONS
from hf_lowmem.specs import check_choice
from hf_lowmem.training.presets import AUTO

__all__ = ["PlanArguments", "run"]


@dataclass
class PlanArguments:
    """Options of `hf-lowmem plan`: what to plan, and how to show it."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "A model's folder, its config.json, or its id on the hub if the config is in the local cache. "
            "Default: model_name_or_path."
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Memory of one device, such as 24GiB: search the settings that were left open for the fastest that "
            "fits, as lowmem_budget does in a run. With --max_length auto, for the longest sequence."
        },
    )
    method: str = field(default="sft", metadata={"help": f"The trainer: {', '.join(METHODS)}."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of a table."})
    plot: str | None = field(default=None, metadata={"help": "Draw memory over the step into this file, a PNG."})
    world_size: int = field(default=1, metadata={"help": "Number of processes."})
    parallel: str | None = field(
        default=None, metadata={"help": f"How several processes share the work: {', '.join(PARALLEL)}."}
    )
    advise: str | None = field(
        default=None,
        metadata={
            "help": "Tokens of a whole pre-training, such as 20B: say which learning rate and batch the Step law has. "
            "Not for fine-tuning."
        },
    )
    implementation: str | None = field(
        default=None,
        metadata={
            "help": f"Of torch's AdamW: {', '.join(IMPLEMENTATIONS)}. Default: the one that optim takes on the device."
        },
    )
    device: str = field(
        default="cuda", metadata={"help": "cuda; or cpu, where other implementations run, with other temporaries."}
    )


def run(arguments: Sequence[str]) -> int:
    """Parse, plan, print; the exit status: 2 where the question has to be put right, 1 where there is no such plan.

    Either goes to stderr in one line.
    """
    if "--help" in arguments:
        _parse(arguments)  # prints it, and exits
    try:
        # The trainer's code may print; what is asked for is the one thing on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            arguments, auto = _without_auto(arguments)
            asked, args, model_args = _parse(arguments)
            if asked.plot is not None:
                check_picture("--plot", Path(asked.plot))
            advice = _advice(asked, args, model_args)
            made = _plan(asked, args, model_args, auto)
            if asked.plot is not None:
                from hf_lowmem.planner.plot import draw

                draw(made.plan if isinstance(made, Found) else made, Path(asked.plot))
    except (CannotSimulate, TypeError, ValueError) as error:
        print(f"hf-lowmem plan: {error}", file=sys.stderr)
        return 1 if isinstance(error, CannotSimulate | NothingFits) else 2
    if asked.json:
        print(json.dumps(made.to_dict() | ({} if advice is None else {"advice": advice.to_dict()})))
    else:
        print(made if advice is None else f"{made}\nadvice: {advice}")
    return 0


def _parse(arguments: Sequence[str]) -> tuple[PlanArguments, Any, ModelConfig]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--method", default="sft")
    method = early.parse_known_args(arguments)[0].method
    check_choice("--method", method, METHODS)
    classes: Any = (PlanArguments, METHODS[method].config, ModelConfig, ScriptArguments)
    parser = Parser(classes, prog="hf-lowmem plan", description="Predict the memory of a training step.")
    if not torch.cuda.is_available():
        # transformers refuses bf16 where there is no GPU. The plan is for another machine; see `--device`.
        parser.set_defaults(use_cpu=True)
    asked, args, model_args, _ = parser.read(arguments)
    return asked, args, model_args


def _without_auto(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--max_length auto`, whose field is an integer, and whether it was among them."""
    kept, auto = list(arguments), False
    for flag in ("--max_length", "--max-length"):
        if f"{flag}=auto" in kept:
            kept.remove(f"{flag}=auto")
            auto = True
        for at in [i for i, word in enumerate(kept) if word == flag and kept[i + 1 : i + 2] == ["auto"]]:
            del kept[at : at + 2]
            auto = True
    return kept, auto


def _budget(asked: PlanArguments, args: Any, auto: bool) -> str | None:
    if asked.budget is not None and args.lowmem_budget not in (None, asked.budget):
        raise ValueError(f"--budget {asked.budget} and lowmem_budget={args.lowmem_budget!r} differ: give one of them.")
    budget = asked.budget or args.lowmem_budget
    if budget is None and args.lowmem == AUTO:
        raise ValueError("--lowmem auto: the settings that fit in what? Give --budget, such as 24GiB.")
    if budget is None and auto:
        raise ValueError("--max_length auto: the longest sequence that fits in what? Give --budget, such as 24GiB.")
    if budget is not None and asked.implementation is not None:
        raise ValueError(
            f"--implementation {asked.implementation} with --budget: optimizers of hf_lowmem have one implementation "
            "only. Leave it unset."
        )
    return budget


def _advice(asked: PlanArguments, args: SFTConfig, model_args: ModelConfig) -> Advice | None:
    if asked.advise is None:
        return None
    tokens, model = parse_tokens("--advise", asked.advise), asked.model or model_args.model_name_or_path
    if asked.method != "sft" or model_args.use_peft or args.max_length is None or model is None:
        raise ValueError(
            f"--advise {asked.advise}: the Step law is of pre-training: all parameters, one length of sequences. Give "
            "--model and --max_length, neither --use_peft nor another --method than sft."
        )
    init = cast("dict[str, object] | None", args.model_init_kwargs)
    config = find_config(model, init, trust_remote_code=getattr(args, "trust_remote_code", False))
    return step_law(config, tokens, args.max_length)


def _plan(asked: PlanArguments, args: Any, model_args: ModelConfig, auto: bool) -> Plan | Found:
    model = asked.model or model_args.model_name_or_path
    if model is None:
        raise ValueError("--model is not set: give a model's folder, its config.json, or its id on the hub.")
    if model_args.attn_implementation is not None:
        init = {"attn_implementation": model_args.attn_implementation}
        args.model_init_kwargs = init | (args.model_init_kwargs or {})
    settings: dict[str, Any] = {
        "dtype": model_args.dtype,
        "peft_config": get_peft_config(model_args),
        "quantization_config": get_quantization_config(model_args),
        "world_size": asked.world_size,
        "parallel": asked.parallel,
        "device": asked.device,
    }
    budget = _budget(asked, args, auto)
    with stages("plan") as progress:
        if budget is None:
            return plan(model, args, implementation=asked.implementation, progress=progress, **settings)
        label, find = "--budget" if asked.budget else "lowmem_budget", longest if auto else search
        return find(model, args, budget=budget, label=label, progress=progress, **settings)
