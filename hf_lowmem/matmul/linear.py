"""A linear layer's forward whose products are made from 8-bit codes, and which linears can have one.

It is an instance attribute like every forward of ours (hf_lowmem/patching.py), and stands below all others: it is the
module's own. Names, parameters, state dict, adapters and whatever else is around the linear do not notice. In eval mode
the plain product runs: what is evaluated is the model that will be saved.
"""

import functools
import math
import warnings

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.kernels.operands import ALIGNED, FLOATS, INT8_ROWS
from hf_lowmem.matmul.products import RECIPES, linear_in_8_bits
from hf_lowmem.memory.saved import innermost_pack
from hf_lowmem.patching import ForwardPatch, forwards_of, in_transform
from hf_lowmem.weights import AtRest, FrozenCodes, at_rest
from hf_lowmem.weights.forwards import RestingForward, eager

__all__ = ["Linear8", "frozen_codes", "why_not"]


class Linear8(ForwardPatch):
    """`nn.Linear.forward` with the products of a recipe, for calls with enough tokens.

    Args:
        module: a linear that `why_not` has nothing against.
        recipe: a name of RECIPES.
        least: tokens below which the plain product runs.
    """

    def __init__(self, module: nn.Linear, recipe: str, least: int) -> None:
        super().__init__(module)
        self.recipe = RECIPES[recipe]
        self.least = max(least, INT8_ROWS if self.recipe.fmt == "int8" else 1)
        self.frozen = frozen_codes(module)

    def put(self) -> None:
        """Stand below all others but the forward of a weight at rest, which is the module's own as long as it rests."""
        patches = [patch for patch in forwards_of(self.module) if not isinstance(patch, RestingForward)]
        if patches:
            self.inner, patches[-1].inner = patches[-1].inner, self
        else:
            super().put()

    def __call__(self, input: Tensor) -> Tensor:
        x, module, resting = input, self.module, isinstance(self.inner, RestingForward)
        assert isinstance(module, nn.Linear)
        if resting and self.frozen is None and torch.compiler.is_compiling():
            return self.eagerly(input)
        kept = None if not resting else self.frozen if torch.compiler.is_compiling() else at_rest(module.weight)
        frozen = kept if isinstance(kept, FrozenCodes) else None
        weight = module.weight if kept is None else kept.codes
        if not module.training or self.left_out(x, weight, kept):
            return self.original(x)
        inputs, dtype = x, (weight if kept is None else kept).dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            inputs = x.to(dtype)  # as autocast does it, in the graph: so a tier knows what it is made of
        if inputs.dtype != dtype:
            return self.original(x)  # whose error is torch's
        keeps = torch.compiler.is_compiling() or not is_looked_after()
        weight, scale = (module.weight, None) if frozen is None else (weight, frozen.scale)
        decoded = None if frozen is not None else kept
        return linear_in_8_bits(
            inputs, weight, module.bias, self.recipe, of=x, keeps_codes=keeps, of_codes=scale, kept=decoded
        )

    @eager
    def eagerly(self, input: Tensor) -> Tensor:
        """The same, of a weight at rest, which a compiler cannot decode."""
        return self(input)

    def left_out(self, x: Tensor, weight: Tensor, kept: AtRest | None) -> bool:
        """Whether this call is not one for codes: of few tokens, or with tensors that are not plain matrices."""
        if x.dim() < 2 or x.dtype not in FLOATS or not x.shape[-1]:
            return True
        if isinstance(kept, FrozenCodes):
            if kept.recipe != self.recipe.name:
                return True
        elif (weight if kept is None else kept).dtype not in FLOATS:
            return True
        if torch.compiler.is_compiling():
            return x.numel() // x.shape[-1] < self.least
        if x.numel() // x.shape[-1] < self.least:
            _say_few(self.recipe.name, self.least)
            return True
        # Shards of a tensor-parallel model wrap others; the planner's tensors without values do not.
        if is_traceable_wrapper_subclass(x) or is_traceable_wrapper_subclass(weight) or in_transform():
            _say_other(self.recipe.name, type(x).__name__, type(weight).__name__)
            return True
        return False


def why_not(module: nn.Module, recipe: str, least: int) -> str | None:
    """Why a linear's products stay as they are; None where they can be made from codes."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is no plain linear with a matrix of floats"
    patches = list(forwards_of(module))
    if (patches[-1].inner if patches else vars(module).get("forward")) is not None:
        return "somebody has replaced its forward"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}"
    sizes = module.in_features, module.out_features
    if any(size % ALIGNED for size in sizes):
        return f"its sizes {sizes} are no multiples of {ALIGNED}"
    if RECIPES[recipe].fmt == "int8" and min(sizes) < INT8_ROWS:
        return f"its sizes {sizes} are below {INT8_ROWS}"
    if math.sqrt(math.prod(sizes)) < least:
        return f"its width, the root of its {math.prod(sizes):,} weights, is below {least}"
    return None


def frozen_codes(module: nn.Module) -> FrozenCodes | None:
    """The codes that are all that is kept of a linear's weight; None where it has a weight."""
    kept = at_rest(module._parameters.get("weight"))
    return kept if isinstance(kept, FrozenCodes) else None


def is_looked_after() -> bool:
    """Whether somebody (a tier, a checkpoint, an offloader) is asked what to keep of a tensor saved for backward."""
    hook = innermost_pack()
    return hook is not None and not getattr(hook, "only_counts", False)


@functools.cache
def _say_few(recipe: str, least: int) -> None:
    warnings.warn(
        f"lowmem_matmul={recipe!r} leaves out calls with fewer than {least} tokens, in which codes cost more than they "
        "save (by a model of the cost). Make batches larger, or set lowmem_matmul_least lower.",
        stacklevel=2,
    )


@functools.cache
def _say_other(recipe: str, x: str, weight: str) -> None:
    warnings.warn(
        f"lowmem_matmul={recipe!r} leaves out a linear that is called with {x} on a weight that is {weight}: its "
        "products are made from plain tensors only, and not inside of torch.func. Leave lowmem_matmul unset.",
        stacklevel=2,
    )
