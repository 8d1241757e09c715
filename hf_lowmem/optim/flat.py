"""Parameter groups that an engine turns into one vector each: DeepSpeed's ZeRO-1 and ZeRO-2.

The engine does so after the optimizer was made, in place and without a word to it. So what has to be known of single
weights is decided before (`small_apart`), and what cannot work is found at the first vector (`check_flattened`). What
is refused before that: hf_lowmem/rules/deepspeed.py.
"""

from typing import TYPE_CHECKING, Any

import torch

from hf_lowmem.reasons import needs_matrices, nothing_to_round

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer


def small_apart(groups: list[dict[str, Any]], below: int) -> list[dict[str, Any]]:
    """The same groups of (name, parameter), with parameters of fewer than `below` values in groups with fp32 states.

    Inside the vector nobody can tell a norm's few weights, whose states are not compressed, from a matrix's.
    """
    apart = []
    for group in groups:
        small = [(name, p) for name, p in group["params"] if p.numel() < below]
        large = [(name, p) for name, p in group["params"] if p.numel() >= below]
        apart += [group | {"params": large}] if large else []
        apart += [group | {"params": small, "state": "fp32"}] if small else []
    return apart


def check_flattened(optimizer: "LowMemOptimizer", shapes: set[torch.Size] | None, group: dict[str, Any]) -> None:
    """Raise where a vector stands in the place of weights, and the method or the store cannot work on it.

    Args:
        shapes: of all parameters that the optimizer was made for; without them nothing can be told.

    Raises:
        ValueError: with the remedy.
    """
    store = group["weights"] != "keep" and all(p.dtype != torch.bfloat16 for p in group["params"])
    if shapes is None or (optimizer.ELEMENTWISE and not store):
        return
    p = next((p for p in group["params"] if p.ndim == 1 and p.shape not in shapes), None)
    if p is None:
        return
    from hf_lowmem.optim import elementwise  # the table is built from classes that need this file

    got = f"a vector of {p.numel():,} values in the place of its weights (DeepSpeed's ZeRO has flattened them)"
    if not optimizer.ELEMENTWISE:
        raise ValueError(f"{optimizer.name} got {got}: {needs_matrices(optimizer.name, elementwise())}.")
    raise ValueError(
        f"weights={group['weights']!r} has no effect: {optimizer.name} got {got}: {nothing_to_round('weights')}."
    )
