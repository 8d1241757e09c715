"""The forwards that a converted model runs: HuggingFace's own, with a tape beside them.

A module is converted by an instance attribute `forward`: its class, its name, its parameters, its hooks and its state
dict stay what they are; `undo` deletes the attribute. The attribute is an object of a class of this module, no closure,
so a converted model can be copied and pickled.

    Layer       opens the tape; everything that autograd saves inside goes through it
    Cheap       a norm, an activation, a dropout: replayed in backward
    Block       attention or MLP: says how what is saved inside is stored
    Projection  a linear of the MLP's input: run again in backward, in tier `fp8_recompute`
    Norm        a Cheap in a tier that rounds: by one kernel with the codes of its input, where that runs
    GatedMLP    a Block in such a tier: act(gate) * up by one kernel with the codes of both, where that runs

Without gradients, or in eval mode, the plain forward runs and nothing else.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_lowmem.activations.checkpoint import WrappedForward
from hf_lowmem.activations.fusable import Gated, RMSNorm, has_hooks, wanted
from hf_lowmem.activations.tape import FORMATS_OF_TIER, Tape, active, unpack
from hf_lowmem.kernels.glu import FLOATS, GLU
from hf_lowmem.kernels.rmsnorm import RMSNORM
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
    "put",
    "put_back",
    "take_out",
]


class Patch:
    """A callable in the place of `module.forward`. `inner` is an instance attribute that was found there, or None."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] | None = vars(module).get("forward")

    @property
    def original(self) -> Callable[..., Any]:
        return self.inner or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)


def patches(model: nn.Module) -> Iterator[Patch | WrappedForward]:
    """The forwards of ours in a model, outer modules first."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Patch | WrappedForward):
            yield forward


def take_out(model: nn.Module) -> list[Patch | WrappedForward]:
    """Make a model plain again; what `put_back` needs to undo that."""
    found = list(patches(model))
    for patch in found:
        del patch.module.forward
        if patch.inner is not None:
            patch.module.forward = patch.inner
    return found


def put_back(found: list[Patch | WrappedForward]) -> None:
    for patch in found:
        put(patch)


def put(patch: Patch | WrappedForward) -> None:
    vars(patch.module)["forward"] = patch


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def has_dropout(module: nn.Module) -> bool:
    """Whether running the module draws random numbers."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in module.modules())


class Layer(Patch):
    """A decoder layer in tier `exact`, `fp8` or `fp8_recompute`.

    Raises RuntimeError where HuggingFace's activation checkpointing was turned on after conversion: inside a checkpoint
    nothing is saved that could be compressed, so the tier would have no effect.
    """

    def __init__(self, module: nn.Module, name: str, tier: str, seeds: Callable[[], int] | None) -> None:
        super().__init__(module)
        self.name, self.tier, self.seeds = name, tier, seeds

    @torch.compiler.disable(reason="hf_lowmem runs converted layers eagerly: a compiled graph decides what it saves")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor(args, kwargs)
        if hidden is None or not (self.module.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        if getattr(self.module, "gradient_checkpointing", False):
            raise RuntimeError(
                f"lowmem_activations={self.tier!r} on {self.name}: activation checkpointing was turned on after the "
                f"model was converted, and {INSIDE_CHECKPOINT}. {NO_CHECKPOINT}."
            )
        seed = None if self.seeds is None else self.seeds()
        tape, outer = Tape(FORMATS_OF_TIER[self.tier], hidden, seed), active.tape
        active.tape = tape
        try:
            with saved_tensors_hooks(tape.pack, unpack):
                return self.original(*args, **kwargs)
        finally:
            active.tape = outer
            tape.close()


class Cheap(Patch):
    """A module of one tensor that costs little beside a matrix product."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = active.tape
        if tape is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return self.original(*args, **kwargs)
        return tape.replay(self.module, self.original, args[0], has_dropout(self.module))


class Block(Patch):
    """`kind`: "attention" or "mlp"."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        super().__init__(module)
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, x = active.tape, first_tensor(args, kwargs)
        if tape is None or x is None:
            return self.original(*args, **kwargs)
        with tape.scope(self.kind, x):
            return self.original(*args, **kwargs)


class Norm(Cheap):
    """A norm that computes what `formula` says."""

    def __init__(self, module: nn.Module, formula: RMSNorm) -> None:
        super().__init__(module)
        self.formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, f, weight = active.tape, self.formula, getattr(self.module, self.formula.weight)
        alone = len(args) == 1 and not kwargs and self.inner is None and not has_hooks(self.module)
        if tape is not None and alone and plain(*args, weight) and self.fits(args[0], weight):
            y = tape.norm(args[0], weight, f.eps, f.plus_one, f.cast_first)
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    @staticmethod
    def fits(x: Tensor, weight: Tensor) -> bool:
        wide = x.dim() > 1 and x.shape[-1:] == weight.shape and x.numel() > 0
        return wide and (x.requires_grad or weight.requires_grad) and wanted(RMSNORM, x, weight)


class GatedMLP(Block):
    """An MLP whose forward is what `formula` says."""

    def __init__(self, module: nn.Module, formula: Gated) -> None:
        super().__init__(module, "mlp")
        self.formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape, act = active.tape, getattr(self.module, self.formula.act)
        if tape is None or kwargs or len(args) != 1 or self.inner is not None or has_hooks(act):
            return super().__call__(*args, **kwargs)
        x = args[0]
        if type(x) is not Tensor or not wanted(GLU, x):
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = active.tape
        if tape is None or not tape.formats.rerun or kwargs or len(args) != 1 or args[0] is not tape.block_input:
            return self.original(*args, **kwargs)
        return tape.rerun(self.module, self.original, args[0], has_dropout(self.module))
