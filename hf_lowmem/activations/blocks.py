"""The forwards that a converted model runs: HuggingFace's own, with a tape beside them.

A module is converted by objects that stand in for its forward (hf_lowmem/patching.py says how); `undo` takes them away.

    Layer       opens the tape; everything that autograd saves inside goes through it
    Cheap       a norm, an activation, a dropout: replayed in backward
    Block       attention or MLP: says how what is saved inside is stored
    Projection  a linear of the MLP's input: run again in backward, in tier `fp8_recompute`
    Norm        a Cheap in a tier that rounds: by one kernel with the codes of its input, where that runs
    GatedMLP    a Block in such a tier: act(gate) * up by one kernel with the codes of both, where that runs

Without gradients, or in eval mode, the plain forward runs and nothing else. So it does inside a checkpoint or a
transform of torch.func, which a warning says once, and in a part of the layer that has saved-tensor hooks of its own.
Every forward of ours is eager code, whoever compiles the module, the layer or the model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_lowmem.activations.aside import active, reason_to_step_aside, say_once
from hf_lowmem.activations.checkpoint import WrappedForward
from hf_lowmem.activations.fusable import Gated, RMSNorm, has_hooks, settings_of, wanted
from hf_lowmem.activations.streaming.masks import MaskMaker
from hf_lowmem.activations.tape import FORMATS_OF_TIER, Tape, is_plain, unpack
from hf_lowmem.kernels.glu import FLOATS, GLU
from hf_lowmem.kernels.rmsnorm import RMSNORM
from hf_lowmem.patching import ForwardPatch, forwards_of
from hf_lowmem.reasons import INSIDE_CHECKPOINT, NO_CHECKPOINT

__all__ = [
    "Block",
    "Cheap",
    "GatedMLP",
    "Layer",
    "Norm",
    "Patch",
    "Projection",
    "patches",
    "put_back",
    "take_out",
]


class Patch(ForwardPatch):
    """A forward of the tiers that open a tape."""


def patches(model: nn.Module) -> Iterator[Patch | WrappedForward | MaskMaker]:
    """The forwards of the tiers in a model, outer modules first; of one module the outer forward first."""
    for module in model.modules():
        yield from (patch for patch in forwards_of(module) if isinstance(patch, Patch | WrappedForward | MaskMaker))


def take_out(model: nn.Module) -> list[Patch | WrappedForward | MaskMaker]:
    """Make a model plain again; what `put_back` needs to undo that."""
    found = list(patches(model))
    for patch in found:
        patch.take_away()
    return found


def put_back(found: list[Patch | WrappedForward | MaskMaker]) -> None:
    for patch in reversed(found):
        patch.put()


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The activations among a module's arguments: the tensor of floats that comes first, unless one has the name."""
    named = kwargs.get("hidden_states")
    tensors = (named, *args) if isinstance(named, Tensor) else (*args, *kwargs.values())
    floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1 and is_plain(t))
    return next(floats, None)


eager = torch.compiler.disable(reason="hf_lowmem runs converted layers eagerly: a compiled graph decides what it saves")


class Layer(Patch):
    """A decoder layer in tier `exact`, `fp8` or `fp8_recompute`.

    Raises RuntimeError where HuggingFace's activation checkpointing was turned on after conversion: inside a checkpoint
    nothing is saved that could be compressed, so the tier would have no effect.
    """

    def __init__(self, module: nn.Module, name: str, tier: str, seeds: Callable[[], int] | None) -> None:
        super().__init__(module)
        self.name, self.tier, self.seeds = name, tier, seeds

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = stream(args, kwargs)
        if hidden is None or not (self.module.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        if getattr(self.module, "gradient_checkpointing", False):
            raise RuntimeError(
                f"lowmem_activations={self.tier!r} on {self.name}: activation checkpointing was turned on after the "
                f"model was converted, and {INSIDE_CHECKPOINT}. {NO_CHECKPOINT}."
            )
        if (why := reason_to_step_aside()) is not None:
            say_once(f"lowmem_activations={self.tier!r} has no effect on a {type(self.module).__name__}: {why}.")
            return self.aside(*args, **kwargs)
        seed = None if self.seeds is None else self.seeds()
        tape, outer = Tape(FORMATS_OF_TIER[self.tier], hidden, seed), active.tape
        active.tape = tape
        try:
            with saved_tensors_hooks(tape.pack, unpack):
                return self.original(*args, **kwargs)
        finally:
            active.tape = outer
            tape.close()

    def aside(self, *args: Any, **kwargs: Any) -> Any:
        """The layer as it is, also where it stands inside of another converted one."""
        outer, active.tape = active.tape, None
        try:
            return self.original(*args, **kwargs)
        finally:
            active.tape = outer


# What these save for backward is a mask, which does not depend on their input.
DROPOUTS = frozenset(
    kind.forward
    for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
)


def listening() -> Tape | None:
    """The tape of the layer that runs, if autograd asks it and nobody else."""
    tape = active.tape
    return tape if isinstance(tape, Tape) and tape.listens else None


class Cheap(Patch):
    """A module of one tensor that costs little beside a matrix product."""

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = listening()
        if tape is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not is_plain(args[0]):
            return self.original(*args, **kwargs)
        dropout = self.inner is None and type(self.module).forward in DROPOUTS
        return tape.replay(self.module, self.original, args[0], dropout)


class Block(Patch):
    """`kind`: "attention" or "mlp"."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        super().__init__(module)
        self.kind = kind

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, x = listening(), stream(args, kwargs)
        if tape is None or x is None:
            return self.original(*args, **kwargs)
        with tape.scope(self.kind, x):
            return self.original(*args, **kwargs)


class Norm(Cheap):
    """A norm that computes what `formula` says."""

    def __init__(self, module: nn.Module, formula: RMSNorm) -> None:
        super().__init__(module)
        self.formula, self.settings = formula, settings_of(module)

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, f, weight = listening(), self.formula, getattr(self.module, self.formula.weight)
        alone = len(args) == 1 and not kwargs and self.inner is None and not has_hooks(self.module)
        if tape is not None and alone and plain(*args, weight) and self.fits(args[0], weight):
            y = tape.norm(args[0], weight, f.eps, f.plus_one, f.cast_first)
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def fits(self, x: Tensor, weight: Tensor) -> bool:
        wide = x.dim() > 1 and x.shape[-1:] == weight.shape and x.numel() > 0
        if not (wide and (x.requires_grad or weight.requires_grad) and wanted(RMSNORM, x, weight)):
            return False
        return self.settings == settings_of(self.module)


class GatedMLP(Block):
    """An MLP whose forward is what `formula` says."""

    def __init__(self, module: nn.Module, formula: Gated) -> None:
        super().__init__(module, "mlp")
        self.formula, self.act = formula, getattr(module, formula.act)
        self.settings = settings_of(module), settings_of(self.act)

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, act = listening(), getattr(self.module, self.formula.act)
        if tape is None or kwargs or len(args) != 1 or self.inner is not None or has_hooks(act):
            return super().__call__(*args, **kwargs)
        x, as_found = args[0], act is self.act and self.settings == (settings_of(self.module), settings_of(act))
        if type(x) is not Tensor or not wanted(GLU, x) or not as_found:
            return super().__call__(x)
        with tape.scope(self.kind, x):
            return self.fused(tape, x, act)

    def fused(self, tape: Tape, x: Tensor, act: nn.Module) -> Any:
        f, parts = self.formula, self.module.get_submodule
        if f.up:
            gate, up = parts(f.gate)(x), parts(f.up)(x)
        else:
            halves = parts(f.gate)(x).chunk(2, -1)
            gate, up = halves if f.gate_first else halves[::-1]
        product = tape.glu(gate, up, f.kind) if plain(gate, up) and gate.numel() else None
        return parts(f.down)(act(gate) * up if product is None else product)


def plain(*tensors: Any) -> bool:
    """Whether these are tensors that a kernel takes: no subclass, a float dtype that it knows."""
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype in FLOATS for t in tensors)


class Projection(Patch):
    """A linear, plain or with adapters, of the MLP's input."""

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = listening()
        if tape is None or not tape.formats.rerun or kwargs or len(args) != 1 or args[0] is not tape.block_input:
            return self.original(*args, **kwargs)
        return tape.rerun(self.module, self.original, args[0])
