"""`lowmem_budget` and `lowmem="auto"` in a trainer: search before anything is set up, on the main process, and train
with what was found.

The search runs the trainers themselves, so this stands above them and is found by name when one of them is set. `auto`
is a search in the memory that is free, or in `lowmem_budget`, which takes nothing that was measured to cost more than
`losses.BOUND` in loss. What it chose is kept in the run's checkpoints (hf_lowmem/training/chosen.py).
"""

import hashlib
import logging
import os
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedConfig

from hf_lowmem import rules
from hf_lowmem.memory import human_bytes, parameter_bytes
from hf_lowmem.memory.free import free_bytes
from hf_lowmem.memory.progress import stages
from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.four_bit import quantization_of
from hf_lowmem.planner.methods import METHODS
from hf_lowmem.planner.models import meta_model
from hf_lowmem.planner.quiet import quiet
from hf_lowmem.planner.search.auto import auto_lines
from hf_lowmem.planner.search.explain import describe
from hf_lowmem.planner.search.fastest import search
from hf_lowmem.planner.simulate import CUDA_CONTEXT, config_and_dtype, plan
from hf_lowmem.rules.run import fsdp_asked
from hf_lowmem.rules.table import BY_HAND
from hf_lowmem.training.arguments import LowMemArguments
from hf_lowmem.training.chosen import CHOSEN, asked_of, kept_choice
from hf_lowmem.training.presets import AUTO
from hf_lowmem.training.sft import LowMemSFTConfig

__all__ = ["measured_budget", "within_budget"]

logger = logging.getLogger(__name__)
Values = dict[str, Any]

SPARED = 20  # one part in so many of what is free is left: for fragmentation, and for what others take
GRAIN = 2**28  # bytes that a measured budget is a multiple of, so that a little more or less decides nothing


def within_budget(trainer: object, asked_for: LowMemArguments, given: Values) -> tuple[LowMemArguments, Values]:
    """A copy of the arguments with the fastest of the open settings that fit, and the plan of it.

    Args:
        trainer: not yet constructed.
        asked_for: its arguments.
        given: the other arguments of its constructor, by name.

    Of a model that is passed, the config and the dtype count; parameters that were frozen by hand are taken for
    trained, so that what is predicted is too much for them.

    Raises:
        ValueError: where nothing fits, with what would; where what trains cannot be planned.
    """
    args = cast(LowMemSFTConfig, asked_for)  # or another config that `_check` knows, which has the same fields
    automatic = args.lowmem == AUTO
    label = "lowmem='auto'" if automatic else f"lowmem_budget={args.lowmem_budget!r}"
    _check(trainer, args, given, label)
    model = given.get("model")
    asked = _model(model, given.get("peft_config"), label)
    if given.get("quantization_config") is not None:
        asked["quantization_config"] = given["quantization_config"]
    world = args.world_size
    asked |= {
        "world_size": world,
        "parallel": None if world == 1 else "fsdp2" if fsdp_asked(args) else "ddp",
        "device": "cpu" if args.device.type == "cpu" else "cuda",
    }
    found: list[Any] = [None, None]
    problem: Exception | None = None
    if args.process_index == 0:  # one search, so that all processes choose the same
        try:
            found[0] = (_automatic if automatic else _asked)(args, asked, given, label)
        except (CannotSimulate, TypeError, ValueError) as error:
            problem, found[1] = error, str(error)
    if world > 1:
        found = broadcast_object_list(found)
    if problem is not None:
        raise problem
    if found[1] is not None:
        raise ValueError(found[1])
    chosen, made, question = found[0]
    settled = args.lowmem_settle(**chosen)
    if automatic:
        vars(settled)[CHOSEN] = {"asked": question, "chosen": chosen}
    return settled, made


def _asked(args: LowMemSFTConfig, asked: Values, given: Values, label: str) -> tuple[Values, Values, None]:
    assert args.lowmem_budget is not None
    with stages(label, shown=not args.disable_tqdm) as progress:
        best = search(args=args, budget=args.lowmem_budget, label="lowmem_budget", progress=progress, **asked)
    # A warning, because it changes how the user's model is trained.
    logger.warning("%s, searched for %.0f s.\n%s", label, best.seconds, best.why)
    return best.chosen, best.plan.to_dict(), None


def _automatic(args: LowMemSFTConfig, asked: Values, given: Values, label: str) -> tuple[Values, Values, Values]:
    question = asked_of(args, _digest(args, asked))
    kept = kept_choice(args, question)
    if kept is not None:
        folder, chosen = kept
        with stages(label, shown=not args.disable_tqdm) as progress:
            made = plan(args=args.lowmem_replace(**chosen), progress=progress, **asked)
        need = human_bytes(made.reserved_bytes)
        logger.warning("%s keeps what %s was trained with: %s. It needs %s.", label, folder, describe(chosen), need)
        return chosen, made.to_dict(), question
    budget: int | str
    if args.lowmem_budget is not None:
        budget, whence = args.lowmem_budget, "lowmem_budget"
    else:
        budget, whence = measured_budget(args.device, given.get("model"))
    with stages(label, shown=not args.disable_tqdm) as progress:
        best = search(args=args, budget=budget, label=label, progress=progress, **asked)
    logger.warning("%s", auto_lines(best, whence, args))
    return best.chosen, best.plan.to_dict(), question


def _digest(args: LowMemSFTConfig, asked: Values) -> str:
    """A digest of what memory depends on in a model: shape and dtype of each weight, and whether it is trained.

    Not of the config, nor of PEFT's: trainers write in them, and they are saved otherwise than they were made.
    """
    config, dtype = config_and_dtype(asked["model"], args, asked.get("dtype"))
    init = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    stored = quantization_of(config, asked.get("quantization_config") or init.get("quantization_config"))
    with quiet():
        model = meta_model(config, dtype, asked["peft_config"], stored)
    weights = sorted(f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for p in model.parameters())
    return hashlib.sha256("\n".join([config.model_type, *weights]).encode()).hexdigest()


def measured_budget(device: torch.device, model: object = None) -> tuple[int, str]:
    """(bytes that a run may take on a device, where they are from, in words).

    What a model that is there already takes of the device is the run's too, and so is the context of a GPU in which
    this process has begun.
    """
    free = free_bytes(device)
    there = list(model.parameters()) if isinstance(model, nn.Module) else []
    own = parameter_bytes([p for p in there if p.device.type == device.type])
    context = CUDA_CONTEXT if device.type == "cuda" else 0
    size = max(GRAIN, (free - free // SPARED + own + context) // GRAIN * GRAIN)
    where = "the GPU" if device.type == "cuda" else "this machine's RAM"
    return size, f"{human_bytes(free)} of {where} are free"


def _check(trainer: object, args: LowMemSFTConfig, given: Values, label: str) -> None:
    name = type(trainer).__name__
    methods = [m for m in METHODS.values() if isinstance(args, m.config) and isinstance(trainer, m.trainer)]
    if not methods:
        known = " or ".join(f"{m.trainer.__name__} with {m.config.__name__}" for m in METHODS.values())
        raise ValueError(
            f"{label} with {name} and {type(args).__name__}: only the steps of {known} can be planned. Take one "
            f"of them, {BY_HAND}."
        )
    passed = [k for k in ("optimizers", "optimizer_cls_and_kwargs") if any(given.get(k) or ())]
    rules.check(rules.Run.from_arguments(args).knowing(passed=f"{passed[0]}=" if passed else None))


def _model(model: Any, peft_config: object, label: str) -> Values:
    """Arguments of `search` that describe the model: `model`, `peft_config` and perhaps `dtype`."""
    if isinstance(model, str | os.PathLike):
        return {"model": model, "peft_config": peft_config}
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        peft_config = next(iter(model.peft_config.values()))
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"{label}: a {type(model).__name__} has no config of transformers to plan from. Pass a model of "
            f"transformers or its name, {BY_HAND}."
        )
    return {"model": config, "peft_config": peft_config, "dtype": model.dtype}
