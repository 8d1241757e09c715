"""`lowmem_budget` in a trainer: search before anything is set up, on the main process, and train with what was found.

The search runs the trainers themselves, so this stands above them and is found by name when a budget is set.
"""

import logging
import os
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from hf_lowmem import rules
from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.methods import METHODS
from hf_lowmem.planner.search.fastest import search
from hf_lowmem.rules.run import fsdp_asked
from hf_lowmem.rules.table import BY_HAND

__all__ = ["within_budget"]

logger = logging.getLogger(__name__)


def within_budget(trainer: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A copy of `args` with the fastest of the open settings that fit, and the plan of it.

    Args:
        trainer: not yet constructed.
        given: the other arguments of its constructor, by name.

    Of a model that is passed, the config and the dtype count; parameters that were frozen by hand are taken for
    trained, so that what is predicted is too much for them.

    Raises:
        ValueError: where nothing fits, with what would; where what trains cannot be planned.
    """
    label = f"lowmem_budget={args.lowmem_budget!r}"
    _check(trainer, args, given, label)
    model = given.get("model")
    asked = _model(model, given.get("peft_config"), label)
    if given.get("quantization_config") is not None:
        asked["quantization_config"] = given["quantization_config"]
    world = args.world_size
    found: list[Any] = [None, None]
    problem: Exception | None = None
    if args.process_index == 0:  # one search, so that all processes choose the same
        try:
            best = search(
                args=args,
                budget=args.lowmem_budget,
                world_size=world,
                parallel=None if world == 1 else "fsdp2" if fsdp_asked(args) else "ddp",
                device="cpu" if args.device.type == "cpu" else "cuda",
                label="lowmem_budget",
                **asked,
            )
            found[0] = best.chosen, best.plan.to_dict()
            # A warning, because it changes how the user's model is trained.
            logger.warning("%s, searched for %.0f s.\n%s", label, best.seconds, best.why)
        except (CannotSimulate, TypeError, ValueError) as error:
            problem, found[1] = error, str(error)
    if world > 1:
        found = broadcast_object_list(found)
    if problem is not None:
        raise problem
    if found[1] is not None:
        raise ValueError(found[1])
    chosen, plan = found[0]
    return args.lowmem_settle(**chosen), plan


def _check(trainer: Any, args: Any, given: dict[str, Any], label: str) -> None:
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


def _model(model: Any, peft_config: Any, label: str) -> dict[str, Any]:
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
