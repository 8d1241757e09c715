"""torch.linalg with types, which torch itself does not give them: `linalg` is that module and nothing beside it."""

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

__all__ = ["linalg"]


class Eigen(NamedTuple):
    """Result of `eigh`."""

    eigenvalues: Tensor  # (..., d), rising
    eigenvectors: Tensor  # (..., d, d), as columns


class QR(NamedTuple):
    """Result of `qr`, for k = min(m, n)."""

    Q: Tensor  # (..., m, k)
    R: Tensor  # (..., k, n)


class Linalg(Protocol):
    """The functions of torch.linalg that are used here, with the arguments that are used."""

    LinAlgError: type[RuntimeError]

    def eigh(self, A: Tensor, /) -> Eigen: ...

    def qr(self, A: Tensor, /) -> QR: ...

    def solve_ex(self, A: Tensor, B: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def svd(self, A: Tensor, /, *, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]: ...

    def matrix_norm(self, A: Tensor, /, *, keepdim: bool = False) -> Tensor: ...

    def vector_norm(self, x: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor: ...


linalg = cast(Linalg, torch.linalg)
