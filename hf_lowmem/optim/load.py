"""Checkpoints of an optimizer, without torch's casts.

torch's `load_state_dict` casts every floating state to the parameter's dtype, so that with bf16 weights fp32 scales and
moments would come back as bf16; accelerate calls it once at `prepare`. So torch loads the groups without any state, and
the states are filled in afterwards. Hooks that a user has registered run before and after that, as in torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hf_lowmem.optim.names import same_names
from hf_lowmem.optim.sharded import fit
from hf_lowmem.optim.sound_state import check_counts

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer

__all__ = ["load"]

# What this optimizer's groups say of its parameters stays, whatever the checkpoint calls them.
OURS = ("param_names", "experts")


def load(
    optimizer: "LowMemOptimizer", state_dict: dict[str, Any], load_by_torch: Callable[[dict[str, Any]], None]
) -> None:
    """Load `state_dict` into `optimizer`; `load_by_torch` is `Optimizer.load_state_dict`, bound to it.

    Raises:
        ValueError: see `LowMemOptimizer.load_state_dict`.
    """
    taken: dict[str, Any] = {}

    def take(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:  # after every hook that a user registered
        taken.update(final)
        saved = final["param_groups"]
        check_groups(optimizer, saved)
        # An option that is younger than the checkpoint keeps this optimizer's value.
        new = ("params", "skipped")
        ours = [{k: v for k, v in group.items() if k not in new} for group in optimizer.param_groups]
        ours += [{}] * (len(saved) - len(ours))  # torch complains about their number
        kept = [{k: v for k, v in own.items() if k in OURS} for own in ours]
        groups = [own | theirs | ours for own, theirs, ours in zip(ours, saved, kept, strict=False)]
        return {**final, "param_groups": groups, "state": {}}

    def fill(_: Optimizer) -> None:
        fill_state(optimizer, taken)
        optimizer._skip_count = None  # it begins anew with what the first group says

    hooks = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(fill, prepend=True),
    ]
    try:
        load_by_torch(state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def check_groups(optimizer: "LowMemOptimizer", saved: list[dict[str, Any]]) -> None:
    """Raise where the saved groups are of another method, of settings that shape the state, or of other names."""
    for ours, theirs in zip(optimizer.param_groups, saved, strict=False):  # torch checks the lengths
        for option in optimizer.STRUCTURAL:
            if option in ours and theirs.get(option) != ours[option]:
                raise ValueError(
                    f"the checkpoint was made with {option}={theirs.get(option)!r}, this optimizer has "
                    f"{option}={ours[option]!r}: its state cannot be continued. Use the checkpoint's setting, or "
                    "start with a fresh optimizer."
                )
        names, loaded = ours.get("param_names"), theirs.get("param_names")
        if names and loaded and not same_names(names, loaded):
            pairs = zip(names, loaded, strict=False)
            first = next(((a, b) for a, b in pairs if a != b), (f"{len(names)} names", f"{len(loaded)} names"))
            raise ValueError(
                f"the checkpoint holds the state of {first[1]!r} where this optimizer has {first[0]!r}. "
                "Build the model and the parameter groups as they were when it was saved."
            )


@torch.no_grad()
def fill_state(optimizer: "LowMemOptimizer", state_dict: dict[str, Any]) -> None:
    """Take over the states, each in its own dtype and in the layout of its parameter."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, group) in zip(ids, params, strict=True):
        if i not in state_dict["state"]:
            continue
        names, place = group.get("param_names"), next(j for j, q in enumerate(group["params"]) if q is p)
        label = repr(names[place]) if names else f"parameter {i}"
        raw = state_dict["state"][i]
        check_counts(label, raw, group["method"])
        optimizer.state[p] = fit(optimizer, p, group, raw, label)
