"""A frozen weight that is kept as the codes of an 8-bit product, and nothing else: a byte a value and a scale a row.

Nothing updates it, so it is coded once. `AtRest` has the rest: a parameter without values, which tells whoever reads it
where they are; a forward that decodes; a state dict with what the codes decode to.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from hf_lowmem.kernels.quantize import DEQUANTIZE
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.weights.rest import AtRest, simulated

__all__ = ["FrozenCodes"]


class FrozenCodes(AtRest):
    """Codes (N, K) of a weight, and scales as a product takes them: one for each row, or one for all.

    Args:
        name: of the parameter, without wrappers.
        values: of the weight.
        recipe: of `lowmem_matmul`, whose codes they are.
        fmt: a name of GROUPS.
        encode: values -> codes and scales.
    """

    trained = False

    def __init__(
        self, name: str, values: Tensor, *, recipe: str, fmt: str, encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.name, self.shape, self.dtype = name, values.shape, values.dtype
        self.recipe, self.fmt, self.encode = recipe, fmt, encode
        self.said = f"kept as 8-bit codes alone (lowmem_matmul={recipe!r}, of a frozen model)"
        self.group, self.writes, self.expected = values.shape[-1], [0], None
        codes, scale = self.encode(values)
        self.codes, self.scale = codes, scale.clone()  # of one for all rows, a view would hold as many
        self._check(self.scale)

    def _check(self, scale: Tensor) -> None:
        if not simulated(scale) and not bool(scale.isfinite().all()):
            raise ValueError(
                f"{self.name}: a NaN or an Inf in a frozen weight has no 8-bit code. Leave lowmem_matmul unset."
            )

    def decode(self) -> Tensor:
        """Values that the codes stand for, in the weight's own dtype."""
        rows, columns = self.shape
        # Of a scale for each row all groups of that row have it; it has the bits of a bf16.
        scales = self.scale.to(torch.bfloat16).view(-1, 1).expand(rows, -(-columns // GROUPS[self.fmt].group))
        return DEQUANTIZE(self.codes, scales.contiguous(), self.fmt, self.dtype)

    @torch.no_grad()
    def replace(self, values: Tensor) -> bool:
        """Take other values. Returns whether they have the codes that are there: they are their own, or decoded."""
        values = values.detach().to(self.codes.device, self.dtype)
        if torch.equal(values, self.decode()):
            return True
        codes, scale = self.encode(values)
        self._check(scale)
        same = torch.equal(codes, self.codes) and torch.equal(scale, self.scale)
        self.writes[0] += 1
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        return same

    def load(self) -> NoReturn:
        """Refuse: nothing updates a frozen weight."""
        raise RuntimeError(
            f"{self.name} is {self.said}, which no optimizer can update. Leave it frozen, or call "
            "hf_lowmem.weights.wake(model) before the optimizer is made."
        )

    def save(self, values: Tensor, seed: int | None, first: int = 0) -> NoReturn:
        """Refuse, as `load`."""
        self.load()

    def rows(self, rows: Tensor) -> NoReturn:
        """Refuse, as `load`: a linear is no table."""
        self.load()

    def part(self, start: int, stop: int, rows: int | None = None) -> NoReturn:
        """Refuse, as `load`."""
        self.load()
