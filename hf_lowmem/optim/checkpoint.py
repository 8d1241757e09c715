"""Checkpoints of an optimizer, without torch's casts.

torch's `load_state_dict` casts every floating state to the parameter's dtype, so that with bf16 weights fp32 scales and
moments would come back as bf16; accelerate calls it once at `prepare`. So torch loads the groups without any state, and
the states are filled in afterwards. Hooks that a user has registered run before and after that, as in torch.
"""

import warnings
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_lowmem.codecs import BlockCodec, codec_pair
from hf_lowmem.codecs.rows import RowCodec
from hf_lowmem.distributed import full, local
from hf_lowmem.optim import roles
from hf_lowmem.optim.loaded_state import REMEDY, check_counts, check_keys, check_values
from hf_lowmem.optim.names import same_names
from hf_lowmem.optim.sharded import ShardedSlot, row_dim, row_layout
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import BY_ROWS, COUNTS, Group, State, count, encoded_in, named, number

__all__ = ["load"]

# What this optimizer's groups say of its parameters stays, whatever the checkpoint calls them.
OURS = ("param_names", *roles.DEFAULTS)

# What a checkpoint means that is older than an option which shapes the state.
BEFORE = {"embeddings": "adam"}


def load(
    optimizer: Optimizer,
    slot_of: Callable[[Tensor, Group], Slot],
    resolved: Callable[[Group], Group],
    structural: Iterable[str],
    state_dict: dict[str, Any],
    load_by_torch: Callable[[dict[str, Any]], None],
) -> None:
    """Load `state_dict` into `optimizer`.

    Args:
        slot_of: for a parameter and its group.
        resolved: checks a group's options as a constructor does.
        structural: options with which the checkpoint must have been made.
        load_by_torch: `Optimizer.load_state_dict`, bound to the optimizer.

    Raises:
        ValueError: see `LowMemOptimizer.load_state_dict`.
    """
    taken: dict[str, Any] = {}

    def take(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:  # after every hook that a user registered
        check_form(final)
        taken.update(final)
        saved = final["param_groups"]
        check_groups(optimizer.param_groups, saved, structural)
        tell_changed(optimizer.param_groups, saved, optimizer.defaults)
        # An option that is younger than the checkpoint keeps this optimizer's value.
        new = ("params", "skipped")
        ours = [{k: v for k, v in group.items() if k not in new} for group in optimizer.param_groups]
        ours += [{}] * (len(saved) - len(ours))  # torch complains about their number
        kept = [{k: v for k, v in own.items() if k in OURS} for own in ours]
        groups = [own | theirs | ours for own, theirs, ours in zip(ours, saved, kept, strict=False)]
        check_options(groups, resolved)
        return {**final, "param_groups": groups, "state": {}}

    def fill(_: Optimizer) -> None:
        fill_state(optimizer, slot_of, taken)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(fill, prepend=True),
    ]
    try:
        load_by_torch(state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def check_form(state_dict: Group) -> None:
    """Raise unless it has the form of an optimizer's state: groups of parameters by number, and a dict for each."""
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    wrong = "'param_groups' that are no list of groups" if not _is_list(groups, dict) else None
    for group in (groups or ()) if wrong is None else ():
        names, skipped = group.get("param_names"), group.get("skipped", [0, 0, 0])
        if not _is_list(group.get("params"), int | str):  # names, as torch's distributed checkpoints have them
            wrong = "a group whose 'params' are neither numbers nor names"
        elif names is not None and not (_is_list(names, str) and len(names) == len(group["params"])):
            wrong = f"a group whose 'param_names' are not the names of its {len(group['params'])} parameters"
        elif not (_is_list(skipped, int) and len(skipped) == 3 and all(0 <= n < 2**63 for n in skipped)):
            wrong = f"skipped={skipped!r}, expected three counts,"
    values = [*cast("dict[object, object]", states).values()] if isinstance(states, dict) else [None]
    if not all(isinstance(s, dict) and _is_list([*cast("dict[object, object]", s)], str) for s in values):
        wrong = "a 'state' that is no dict of dicts"
    if wrong is not None:
        raise ValueError(f"the checkpoint has {wrong} and was not saved by an optimizer. {REMEDY}")


def _is_list(value: object, kind: type | UnionType) -> bool:
    if not isinstance(value, list | tuple):
        return False
    return all(isinstance(v, kind) and not isinstance(v, bool) for v in cast("list[object]", value))


def check_options(groups: list[Group], resolved: Callable[[Group], Group]) -> None:
    """Raise where a loaded group has a setting that no constructor takes, such as a negative rate."""
    for index, group in enumerate(groups):
        try:
            checked = resolved(
                group | {"betas": tuple(group["betas"])} if isinstance(group.get("betas"), list) else group
            )
            for option in [k for k, v in checked.items() if v is not None and k != "rank" and group.get(k, v) is None]:
                raise ValueError(f"{option}=None.")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint's parameter group {index} has a setting that no optimizer has: {error} {REMEDY}"
            ) from error


def check_groups(groups: list[Group], saved: list[Group], structural: Iterable[str]) -> None:
    """Raise where the saved groups are of another method, of settings that shape the state, or of other names."""
    for ours, theirs in zip(groups, saved, strict=False):  # torch checks the lengths
        if "method" in ours and "method" not in theirs:
            raise ValueError(
                "the checkpoint was made without hf_lowmem's optimizers, as plain Trainer and TRL make it, and "
                f"{ours['method']!r} cannot continue another's state. Train on with that run's own optim; or take the "
                "checkpoint's folder as the model, and leave resume_from_checkpoint unset."
            )
        for option in structural:
            saved_as = theirs.get(option, BEFORE.get(option))
            if option in ours and saved_as != ours[option] and meaning(option, theirs) != meaning(option, ours):
                raise ValueError(
                    f"the checkpoint was made with {option}={saved_as!r}, this optimizer has "
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


def tell_changed(groups: list[Group], saved: list[Group], options: Iterable[str]) -> None:
    """Warn of settings that are not the checkpoint's, which count here as in torch's optimizers.

    The rate is what a schedule has made of it, so that the one from which the schedule starts is compared. Betas are
    left out where a schedule moves them, as OneCycleLR does.
    """
    told: dict[str, str] = {}
    for ours, theirs in zip(groups, saved, strict=False):
        moved = {"betas"} if "max_momentum" in theirs else set[str]()
        compared = {*options, "initial_lr"} - {"params", "lr", *OURS, *moved}
        for option in sorted(compared & ours.keys() & theirs.keys()):
            if _comparable(ours[option]) != _comparable(theirs[option]):
                name = "lr" if option == "initial_lr" else option
                told.setdefault(name, f"{name}={theirs[option]!r}, this optimizer has {name}={ours[option]!r}")
    if told:
        warnings.warn(
            f"the checkpoint was made with {'; with '.join(told.values())}. As with torch's optimizers, the "
            "checkpoint's count from here on. To change them, write them into optimizer.param_groups after loading, or "
            "start with a fresh optimizer.",
            stacklevel=2,
        )


def _comparable(value: object) -> object:
    return list(cast("list[object]", value)) if isinstance(value, list | tuple) else value


def meaning(option: str, group: Group) -> object:
    """Value of an option as it shapes the state: a `basis` that is not named is stored as other signed states are."""
    value = group.get(option, BEFORE.get(option))
    return codec_pair(group["state"])[0].name if option == "basis" and value is None else value


@torch.no_grad()
def fill_state(optimizer: Optimizer, slot_of: Callable[[Tensor, Group], Slot], state_dict: dict[str, Any]) -> None:
    """Take over the states, each in its own dtype and in the layout of its parameter."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [(p, place, group) for group in optimizer.param_groups for place, p in enumerate(group["params"])]
    for i, (p, place, group) in zip(ids, params, strict=True):
        if i not in state_dict["state"]:
            continue
        names = group.get("param_names")
        label = repr(names[place]) if names else f"parameter {i}"
        raw = state_dict["state"][i]
        check_counts(label, raw, group["method"])
        optimizer.state[p] = fit(slot_of(p, group), group, raw, label)


def fit(slot: Slot, group: Group, raw: dict[str, Any], label: str) -> dict[str, Any]:
    """A loaded state as the slot's parameter keeps it: whole or cut, whichever the checkpoint has. A fresh copy.

    A collective call where the loaded tensors are DTensors and the parameter is not.

    Args:
        label: what an error calls the parameter.

    Raises:
        ValueError: where a tensor is missing, unknown, not finite, or has not the shape or the dtype that the layout
            gives it.
    """
    was_cut = BY_ROWS in raw
    rows = row_layout(slot.whole, slot.shape, group)
    raw = checked(slot, group, raw, rows if was_cut else slot.whole, label)
    counts = {k: count(number(v)) for k, v in raw.items() if k in COUNTS and k != BY_ROWS}
    raw = {k: v for k, v in raw.items() if k not in COUNTS}
    if not (slot.sharded and was_cut):
        raw = {k: full(v).to(slot.device, copy=True) for k, v in raw.items()}
    if slot.sharded != was_cut:
        raw = relaid(slot, group, raw, rows)
    if not isinstance(slot, ShardedSlot):
        return raw | counts
    replicated = {name for name, state in rows.items() if not state.cut}
    placed: dict[str, Tensor] = {}
    for key, value in raw.items():
        whole = value.ndim == 0 or key.split(".")[0] in replicated
        here = local(value) if whole or isinstance(value, DTensor) else slot.home.rows(value)
        here = here.to(slot.device, copy=True)
        placed[key] = here if whole else slot.home.wrap(here.contiguous(), value.shape[0])
    return placed | counts | {BY_ROWS: count(1)}


def checked(slot: Slot, group: Group, raw: dict[str, Any], states: dict[str, State], label: str) -> dict[str, Any]:
    """A loaded state in this version's dtypes: hf_lowmem 0.1.0 kept scales as bf16 that are fp32 now.

    Raises where it is not whole and finite, or not of the layout that it claims, `states`.
    """
    for name, state in states.items():
        tensors, encoded = named(name, encoded_in(raw, name)), state.empty(name, "meta")
        found, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (tensors, encoded))
        if state.decl.coded and found.keys() == expected.keys() and found != expected:
            raise ValueError(
                f"the checkpoint's state {name!r} of a parameter of shape {tuple(slot.shape)} is {found}, expected "
                f"{expected}: it was made by one process and put into shards as it is, or by another layout. Load such "
                "a checkpoint with optimizer.load_state_dict(torch.load(file)) on every process, which cuts it, or "
                "continue as it was made."
            )
        if isinstance(state.codec, BlockCodec | RowCodec):
            wider = {k for k, v in encoded.items() if v.dtype == torch.float32} & tensors.keys()
            raw = raw | {k: tensors[k].to(torch.float32) for k in wider if tensors[k].dtype == torch.bfloat16}
    check_keys(slot, group, label, raw, states)
    check_values(label, raw, states)
    return raw


def relaid(slot: Slot, group: Group, raw: dict[str, Any], rows: dict[str, State]) -> dict[str, Any]:
    """A state of whole tensors from one process's layout to that of rows where the parameter is cut, else back."""
    found = {k: v for k, v in raw.items() if k.split(".")[0] not in rows}
    for name, state in slot.whole.items():
        encoded = encoded_in(raw, name)
        if not encoded:
            continue
        old, new = (state, rows[name]) if slot.sharded else (rows[name], state)
        value, dim = old.codec.decode(encoded, old.shape), row_dim(state, slot.shape, group)
        if dim is not None:
            value = value.movedim(*((dim, 0) if slot.sharded else (0, dim))).contiguous()
        fresh = new.codec.init(value, signed=state.decl.signed)
        new.codec.encode_(fresh, value)
        found |= named(name, fresh)
    return found
