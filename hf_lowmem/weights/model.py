"""A model whose weights are at rest, as others see it: saved as plain bf16, with the scales in a file beside.

`model.state_dict()` has bf16 tensors on the CPU, decoded one after the other, since on the device there is no room for
them; `save_pretrained` writes those. The scales follow in `lowmem_weights.safetensors`, 3 % of the model's size: with
them the codes come back exactly, so that a resumed run continues bit for bit. Without them the model is what any bf16
model is, and would be rounded to codes anew.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from hf_lowmem.patching import forwards_of
from hf_lowmem.weights.forwards import RestingForward, forward_for
from hf_lowmem.weights.rest import AtRest, at_rest, empty, fill, move
from hf_lowmem.weights.shards import managed, put_shard, sharded_parameters, wake_shard

__all__ = [
    "SIDE_FILE",
    "expect_scales",
    "leave",
    "put_to_rest",
    "resting",
    "save_adapter_alone",
    "wake",
    "write_scales",
]

logger = logging.getLogger(__name__)

SIDE_FILE = "lowmem_weights.safetensors"


def resting(model: nn.Module) -> dict[str, AtRest]:
    """Codes and scales of all trained parameters that are at rest, by name without wrappers."""
    cut = sharded_parameters(model)  # which a module may have whole just now
    found = (at_rest(p) for p in (*model.parameters(), *cut))
    return {kept.name: kept for kept in found if kept is not None and kept.trained}


def put_to_rest(
    model: nn.Module, weights: Iterable[tuple[str, nn.Parameter, Iterable[nn.Module]]], folder: str | Path | None = None
) -> None:
    """Put weights to rest, in place, one after the other.

    Args:
        model: whose `save_pretrained`, if it has one, writes the scales as well from here on.
        weights: (name, parameter, modules whose `weight` it is) of each.
        folder: of a saved model that these may be the weights of, for the scales that are there.
    """
    scales, cut = read_scales(folder), managed(model)
    again = 0
    for name, p, modules in weights:
        if at_rest(p) is not None:
            continue
        known, scale = cut.get(id(p)), scales.get(name)
        kept = AtRest(name, p.detach(), scale) if known is None else put_shard(name, p, known, scale)
        again += scale is not None and not kept.fits
        if known is None:
            leave(p, kept, modules)
            continue
        for module in modules:
            vars(module).update(_save_to_state_dict=Saved(module))
    if again:
        logger.warning(
            "%s of %s does not fit %d weights of the model, which are rounded to int8 anew: the model's files were "
            "written by something else since.",
            SIDE_FILE,
            folder,
            again,
        )
    save = None if cut else getattr(model, "save_pretrained", None)  # which one process may call alone
    if save is not None and not isinstance(save, SaveScales):
        vars(model)["save_pretrained"] = SaveScales(model, save)


def leave(p: nn.Parameter, kept: AtRest, modules: Iterable[nn.Module]) -> None:
    """Leave of a parameter, which is the `weight` of these modules, nothing but what is kept of it."""
    empty(p, kept)
    for module in modules:
        kind = forward_for(module)
        assert kind is not None, f"{kept.name}: {type(module).__name__}"
        kind(module).put()
        vars(module).update(_save_to_state_dict=Saved(module), _apply=Moved(module))


def wake(model: nn.Module) -> nn.Module:
    """Make a model whose weights are at rest a plain one, in place: in bf16, 2 bytes a weight on its device.

    Not while it is trained: an optimizer with weights="int8_sr" steps weights at rest alone. Frozen weights that were
    kept as codes of products (`lowmem_matmul`) become what these decode to, which is not to the bit what they were.
    """
    for known in managed(model).values():
        if at_rest(known.sharded_param) is not None:
            wake_shard(known.sharded_param, known)
    for module in model.modules():
        for name, kind in (("_save_to_state_dict", Saved), ("_apply", Moved)):
            if isinstance(vars(module).get(name), kind):
                del vars(module)[name]
        for patch in list(forwards_of(module)):
            if isinstance(patch, RestingForward):
                patch.take_away()
                weight = module._parameters["weight"]
                if weight is not None and at_rest(weight) is not None:  # it may be another module's as well
                    fill(weight)
    if isinstance(vars(model).get("save_pretrained"), SaveScales | SaveAdapter):
        del vars(model)["save_pretrained"]
    return model


class Saved:
    """A module's part of a state dict, with values on the CPU for the weight that is at rest.

    Where FSDP2 has cut it they are shards on their device: a checkpoint gathers them there.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        module, weight = self.module, self.module._parameters["weight"]
        kept = at_rest(weight)
        if kept is None or keep_vars:
            type(module)._save_to_state_dict(module, destination, prefix, keep_vars)
            return
        if _unread.get():
            values = weight
        elif kept.home is None:
            values = torch.empty(kept.shape, dtype=kept.dtype, device="cpu")
            values.copy_(kept.decode())
        else:
            values = kept.home.wrap(kept.decode(), kept.home.size[0])
        try:
            module._parameters["weight"] = None
            destination[prefix + "weight"] = values  # in its place: the order of a state dict is the model's
            type(module)._save_to_state_dict(module, destination, prefix, keep_vars)
        finally:
            module._parameters["weight"] = weight


class Moved:
    """A module's `_apply`, by which `model.to(device)` moves tensors: codes and scales go along.

    So a model can be put to rest where there is room for it, and go to a device where there is none for its bf16.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module, weight = self.module, self.module._parameters["weight"]
        if weight is None or at_rest(weight) is None:
            return type(module)._apply(module, fn, recurse)
        move(weight, fn)
        try:
            module._parameters["weight"] = None
            return type(module)._apply(module, fn, recurse)
        finally:
            module._parameters["weight"] = weight


_unread = ContextVar("whether values of weights at rest are asked for in vain", default=False)


class SaveAdapter:
    """`save_pretrained` of a model whose adapters alone are saved: nothing is decoded for it, and then thrown away."""

    def __init__(self, save: Callable[..., object]) -> None:
        self.save = save

    def __call__(self, *args: object, **kwargs: object) -> object:
        before = _unread.set(True)
        try:
            return self.save(*args, **kwargs)
        finally:
            _unread.reset(before)


def save_adapter_alone(model: nn.Module) -> None:
    """Let `model.save_pretrained`, which saves adapters, decode nothing. Again is nothing."""
    save = getattr(model, "save_pretrained", None)
    if save is not None and not isinstance(save, SaveAdapter):
        vars(model)["save_pretrained"] = SaveAdapter(save)


class SaveScales:
    """`model.save_pretrained`, and the scales beside what it writes."""

    def __init__(self, model: nn.Module, save: Callable[..., object]) -> None:
        self.model, self.save = model, save

    def __call__(self, save_directory: str | Path, *args: object, **kwargs: object) -> object:
        made = self.save(save_directory, *args, **kwargs)
        main = args[0] if args else kwargs.get("is_main_process", True)
        if main:
            write_scales(self.model, save_directory)
        return made


def write_scales(model: nn.Module, folder: str | Path) -> None:
    """Write the scales of all weights at rest into the folder of a saved model.

    Under FSDP2 all processes call it, and the first one writes.
    """
    kept = resting(model)
    tensors = {name: weight.scales().cpu() for name, weight in kept.items()}
    if any(weight.home is not None for weight in kept.values()) and distributed.get_rank() != 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / SIDE_FILE, metadata={"format": "pt", "hf_lowmem": "scales of int8 weights"})


def read_scales(folder: str | Path | None) -> Mapping[str, Tensor]:
    """The scales in the folder of a saved model, by parameter; none where it has no such file."""
    path = None if folder is None else Path(folder) / SIDE_FILE
    if path is None or not path.is_file():
        return {}
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}


def expect_scales(model: nn.Module, folder: str | Path) -> None:
    """Let the values that are loaded next into weights at rest be those of a saved model, to the bit."""
    scales = read_scales(folder)
    for name, kept in resting(model).items():
        kept.expect(scales.get(name))
