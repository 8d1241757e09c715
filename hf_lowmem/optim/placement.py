"""Place of a parameter, and whether a method can work there: FSDP1 and DeepSpeed flatten, FSDP2 cuts by rows.

FSDP1 and ZeRO-3 are refused. ZeRO-1 and ZeRO-2 turn each parameter group into one vector, after the optimizer was made,
in place and without a word to it. So what has to be known of single weights is decided before (`small_apart`), and what
cannot work is found at the first vector (`check_flattened`). What is refused before that: rules/deepspeed.py.
"""

import torch
from torch import Tensor

from hf_lowmem.distributed import is_sharded
from hf_lowmem.optim.method import Method, elementwise
from hf_lowmem.optim.state import Group
from hf_lowmem.reasons import CAUTIOUS_FLAT, flattened, needs_matrices, nothing_to_round

__all__ = ["check_flattened", "check_placement", "small_apart"]


def small_apart(groups: list[Group], below: int) -> list[Group]:
    """The same groups of (name, parameter), with parameters of fewer than `below` values in groups with fp32 states.

    Inside the vector nobody can tell a norm's few weights, whose states are not compressed, from a matrix's.
    """
    apart: list[Group] = []
    for group in groups:
        small = [(name, p) for name, p in group["params"] if p.numel() < below]
        large = [(name, p) for name, p in group["params"] if p.numel() >= below]
        apart += [group | {"params": large}] if large else []
        apart += [group | {"params": small, "state": "fp32"}] if small else []
    return apart


def check_placement(method: Method, p: Tensor, group: Group) -> None:
    """Raise for a parameter of FSDP1 or DeepSpeed, and for a sharded one that the method cannot treat."""
    if getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id"):
        engine = "DeepSpeed ZeRO" if hasattr(p, "ds_id") else "FSDP1"
        raise ValueError(f"{method.name} got a flattened parameter: {flattened(engine)}.")
    reason = method.unsharded_only(p.shape, group) if is_sharded(p) else None
    if reason is not None:
        raise ValueError(reason)


def check_flattened(method: Method, p: Tensor, group: Group, shapes: set[torch.Size] | None) -> None:
    """Raise where a vector stands in the place of weights, and the method or the store cannot work on it.

    Args:
        shapes: of all parameters that the optimizer was made for; without them nothing can be told.

    Raises:
        ValueError: with the remedy.
    """
    if shapes is None or p.ndim != 1 or p.shape in shapes:
        return
    got = f"a vector of {p.numel():,} values in the place of its weights (DeepSpeed's ZeRO has flattened them)"
    if group.get("cautious"):
        raise ValueError(f"{method.name} with cautious=True got {got}: {CAUTIOUS_FLAT}.")
    if not method.ELEMENTWISE:
        raise ValueError(f"{method.name} got {got}: {needs_matrices(method.name, elementwise())}.")
    if group["weights"] != "keep" and all(q.dtype != torch.bfloat16 for q in group["params"]):
        raise ValueError(
            f"weights={group['weights']!r} has no effect: {method.name} got {got}: {nothing_to_round('weights')}."
        )
