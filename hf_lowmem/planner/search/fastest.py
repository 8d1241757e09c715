"""The fastest settings that fit: `search(model, args, budget=...)`; and the longest sequence that does: `longest`.

Candidates are all valid combinations of what the user left open (`space`). They are tried in an order of preference:
first by how far their optimizer departs from what was asked for, so that a rule which needs another learning rate is
taken only if nothing before it fits; then by the cost model (`cost`). The first of all is planned at once: where the
user's own settings fit in the form in which they run fastest, that is the answer. Else estimates (`estimate`) of what
each needs skip those that are far too large, and a rule whose weights, states and gradients alone are too large is not
estimated. What is left is planned by the real `plan()`, the answer always, and the preferred combination that was
nearest to fitting as well, if an estimate may have wronged it. Each plan corrects the estimates of its like.

The same question has the same answer: nothing is drawn at random, and ties are broken by the settings' names. Asked
again in the same process it costs nothing (`cache`).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_lowmem.memory import human_bytes
from hf_lowmem.memory.units import parse_bytes
from hf_lowmem.planner.four_bit import quantization_of
from hf_lowmem.planner.methods import method_of
from hf_lowmem.planner.modelled import check_modelled
from hf_lowmem.planner.search.cache import cached, key_of
from hf_lowmem.planner.search.estimate import Estimator
from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.losses import is_accepted, parts_of
from hf_lowmem.planner.search.ranking import STEP, Found, Search
from hf_lowmem.planner.search.space import candidates, layers_by_tier
from hf_lowmem.planner.simulate import Plan, config_and_dtype, plan
from hf_lowmem.training.presets import AUTO

__all__ = ["Found", "NothingFits", "Search", "longest", "prepare", "search"]

PROBE = 2048  # tokens of the longer of the two lengths that `longest` draws lines through


def search(
    model: str | Path | PreTrainedConfig,
    args: Any,
    *,
    budget: int | str,
    dtype: torch.dtype | str | None = None,
    peft_config: Any = None,
    world_size: int = 1,
    parallel: str | None = None,
    device: str = "cuda",
    label: str = "budget",
    progress: Callable[[str], None] = lambda message: None,
    **more: Any,
) -> Found:
    """The fastest settings of what `args` leaves open with which a step fits in `budget`.

    ```python
    found = search("meta-llama/Llama-3.1-8B", LowMemSFTConfig("out", max_length=2048), budget="24GiB", dtype="bfloat16")
    print(found.why)
    trainer = LowMemSFTTrainer(model, found.args, ...)
    ```

    Args:
        budget: memory of one device, in bytes, or such as "24GiB". `Plan.reserved_bytes` is what must be within it:
            with rounding, and on a GPU its context.
        label: how an error calls the budget.
        more: as for `plan`, as are all others.

    Raises:
        NothingFits: (a ValueError) with the smallest combination and its bytes.
        CannotSimulate, TypeError, ValueError: as `plan`.
    """
    began = time.perf_counter()
    size = parse_bytes(label, budget) if isinstance(budget, str) else budget
    config, weights = config_and_dtype(model, args, dtype)
    asked: dict[str, Any] = {
        "dtype": weights,
        "peft_config": peft_config,
        "world_size": world_size,
        "parallel": parallel,
        "device": device,
        **more,
    }
    made = cached(key_of(config, args, asked), lambda: prepare(config, args, progress=progress, **asked))
    made.began, made.args, made.estimator.progress = began, args, progress
    named = f"{label}={budget!r}" if "=" not in label else f"{label} in {human_bytes(size)}"
    return made.for_budget(named, size).answer(args.max_length)


def longest(
    model: str | Path | PreTrainedConfig, args: Any, *, budget: int | str, label: str = "budget", **asked: Any
) -> Found:
    """The longest `max_length`, a multiple of 64 up to the model's positions, for which something fits in `budget`, and
    the fastest settings that fit with it. Arguments and errors: see `search`; `args.max_length` is not looked at."""
    size = parse_bytes(label, budget) if isinstance(budget, str) else budget
    config, _ = config_and_dtype(model, args, None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 2 * STEP:
        raise ValueError(
            f"max_length='auto': the config's max_position_embeddings is {limit!r}, so there is no bound to search up "
            "to. Give max_length a number."
        )
    far = min(limit, PROBE) // STEP * STEP
    args = args.lowmem_replace(max_length=far)
    found = prepare(model, args, points=((1, max(STEP, far // 2 // STEP * STEP)), (1, far)), **asked)
    found.for_budget(f"{label}={budget!r}", size)
    return found.answer(found.longest(limit))


def prepare(
    model: str | Path | PreTrainedConfig,
    args: Any,
    *,
    dtype: torch.dtype | str | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    world_size: int = 1,
    parallel: str | None = None,
    device: str = "cuda",
    progress: Callable[[str], None] = lambda message: None,
    points: tuple[tuple[int, int], ...] | None = None,
    **more: Any,
) -> Search:
    """All candidates, and what their estimates need, simulated. `points`: see `Estimator`; None for one and two rows
    of `max_length`. See `search` for the others."""
    began = time.perf_counter()
    check_modelled(args, parallel=parallel)
    config, weights = config_and_dtype(model, args, dtype)
    method = method_of(args)
    if points is None:
        method.shape(args)  # which says what is wrong with max_length
        points = (1, args.max_length), (2, args.max_length)
    longest_seen = points[1][1]
    if method.has_documents(args):  # whose mask has the tokens squared
        points = (*points, (2 * points[1][0], longest_seen))
    init = args.model_init_kwargs or {}
    asked = {"peft_config": peft_config, "world_size": world_size, "parallel": parallel, "progress": progress}
    estimator = Estimator(
        config,
        args,
        method,
        weights,
        points,
        attention=init.get("attn_implementation"),
        accelerator=device == "cuda",
        quantization=quantization_of(config, quantization_config or init.get("quantization_config")),
        **asked,
    )

    def make_plan(chosen: Any) -> Plan:
        told = asked | {"progress": estimator.progress}  # of the question that is asked now
        return plan(
            config, chosen, dtype=weights, quantization_config=quantization_config, device=device, **told, **more
        )

    # Of the trained ones: PEFT keeps adapters in fp32 beside a bf16 model, accelerate mixed precision's shards.
    mixed = parallel == "fsdp2" and (args.bf16 or args.fp16)
    stores = weights is torch.bfloat16 and not mixed and any(s.trained and s.itemsize == 2 for s in estimator.shapes)
    rests = stores and parallel is None and estimator.updates.can_rest()
    parted = {"world_size": world_size, "parallel": parallel}
    found = candidates(args, depth=estimator.depth, bf16_weights=stores, can_rest=rests, **parted)
    if args.lowmem == AUTO:
        tiers = [layers_by_tier(c.activations, estimator.depth) for c in found]
        costs = [parts_of(c, each, bf16_weights=stores) for c, each in zip(found, tiers, strict=True)]
        found = [c for c, parts in zip(found, costs, strict=True) if is_accepted(c, parts, args)]
    made = Search(estimator, make_plan, found, began, args, bf16_weights=stores)
    made.weigh()
    return made
