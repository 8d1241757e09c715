"""Projections of a gradient to a small rank, behind one interface: `refresh_`, `project`, `project_back`.

A projector lives for one update of one parameter. What has to last is a state: the coded tensor `basis`, or for
`random` nothing but a number. The authors' packages keep a Python object in the state, which
`torch.load(weights_only=True)` refuses, and an fp32 basis: beside the 8-bit moments of a square weight it takes twice
the bytes of both.

| name       | basis                                          | stored  | cost of a refresh                  |
|------------|------------------------------------------------|---------|------------------------------------|
| `svd`      | the leading singular vectors of this gradient  | r·d     | an SVD; syncs                      |
| `subspace` | the last basis after one power step and a QR   | r·d     | two products with the gradient, QR |
| `random`   | a seeded Gaussian, drawn again at every step   | nothing | none; every step draws r·d numbers |

Shapes: a gradient is (..., m, n), a basis P (..., d, r) with d = min(m, n), a projection (..., m, r) where m >= n and
(..., r, n) otherwise.

A basis is made where step % update_gap == 0. Two things keep it from being made of nothing: a matrix whose gradient is
all zero (an expert that saw no token, a LoRA's A while B is zero) or not finite keeps the basis it has, and one that
has none yet gets it at step 1, 2, 4, 8, ... (also after the first gap, if need be). Both are selections on the device,
so no step waits for it.

**Lazy refresh** (the idea of Q-GaLore, arXiv 2407.08296). With `lazy_overlap` a weight has an interval of its own:

```python
overlap = norm(P_old.T @ P_new)**2 / r                   # 1: the subspace has not moved; 0: nothing of it is left
interval = min(2 * interval, 8 * update_gap) if overlap >= lazy_overlap else update_gap
```
It is the overlap of a refresh that decides at the *next* one, when it has long been computed: no step waits for it.
The paper's code compares the leading singular vectors alone, whose sign is arbitrary and not taken out, and once above
its threshold doubles at every later refresh. An overlap of subspaces has neither fault, and costs nothing here. What to
compare it with depends on the projection: of a gradient that is mere noise, (m, n) with m >= n, `svd` keeps r / n, and
`subspace`, which starts from the last basis, m / (m + n).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.distributed import WHOLE, Whole
from hf_lowmem.kernels.apollo.reference import channel_dim, channel_scale
from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import (
    DUE,
    OVERLAP,
    STRETCH,
    Group,
    Shape,
    count,
    in_dispatch_mode,
    number,
    stream_key,
)

LONGEST = 8  # update_gaps between two lazy refreshes
COLD_STEPS = 4  # power steps from a Gaussian start; later refreshes start from the last basis and take one


def svd_basis(grad: Tensor, rank: int) -> Tensor:
    """The `rank` leading singular vectors of the smaller side, (..., m, n) -> (..., d, rank). GaLore, 2403.03507."""
    u, _, vh = linalg.svd(grad, full_matrices=False)
    return (vh.mT if channel_dim(grad.shape) == -1 else u)[..., :rank]


def power_basis(grad: Tensor, start: Tensor, steps: int, shards: Whole = WHOLE) -> Tensor:
    """Orthogonal iteration towards the leading singular vectors of the smaller side, from `start` (..., d, r).

    ```python
    for _ in range(steps):
        P, R = qr(grad.T @ (grad @ P))        # m >= n;  qr(grad @ (grad.T @ P)) otherwise
        P *= sign(diag(R))
    ```

    A QR leaves the sign of each column open, and LAPACK's choice mostly flips it. With R's diagonal made positive a
    column stays near the one that it came from, which matters because the moments live in these coordinates.

    Products are divided by the largest value of the gradient: the square of a small one would vanish.

    Of a matrix that is cut by rows, `grad` holds those that are here; `start` and the result are whole everywhere. A
    step adds up the (n, r) products of all parts, and for m < n also puts the rows of the (m, r) one together.
    """
    rows, columns = shards.shape(grad)[-2:]
    peak = shards.largest(grad)
    basis = start
    for _ in range(steps):
        if rows >= columns:
            product = shards.sum_((grad.mT @ (grad @ basis).div_(peak)).div_(peak))
        else:
            projected = shards.sum_((grad.mT @ shards.rows(basis)).div_(peak))
            product = shards.gather((grad @ projected).div_(peak), rows)
        basis, triangle = linalg.qr(product)
        signs = torch.diagonal(triangle, dim1=-2, dim2=-1).sign()
        basis = basis * torch.where(signs == 0, 1.0, signs)[..., None, :]
    return basis


def gaussian(key: int, small: int, rank: int, device: torch.device) -> Tensor:
    """A (small, rank) Gaussian with variance 1/rank, the same for the same key."""
    root = math.sqrt(rank)
    generator = torch.Generator(device).manual_seed(key)
    drawn = torch.empty(small, rank, device=device, dtype=torch.float32)
    if math.frexp(root)[0] == 0.5:  # a power of two, by which it makes no difference when the numbers are divided
        return drawn.normal_(std=1 / root, generator=generator)
    return drawn.normal_(generator=generator).div_(root)


class Projector:
    """The projection of one parameter at one step.

    ```python
    projector = PROJECTORS[group["projection"]](grad, slot, group, step, projects_back=True)
    rotation = projector.refresh_(grad)
    projected = projector.project(grad)             # grad @ P       (..., m, r)    or  P.T @ grad    (..., r, n)
    update = projector.project_back(projected)             # projected @ P.T      (..., m, n)    or  P @ projected
    ```

    A matrix that is cut into shards by rows has its channels, not its rank, cut: `projected` then is
    (channels of here, r) whichever side is larger. For m >= n nothing is sent, since a row is a channel. For m < n
    `project` reduce-scatters the (n, r) sum over the rows, and `project_back` gathers it.

    Args:
        grad: for its shape and device.
        slot, group: of the parameter.
        step: number of the update, from 0.
        projects_back: whether the method calls `project_back`; see `RandomProjector`.
    """

    def __init__(self, grad: Tensor, slot: Slot, group: Group, step: int, *, projects_back: bool) -> None:
        self.slot = slot
        self.rank: int = group["rank"]
        self.update_gap: int = group["update_gap"]
        self.lazy_overlap: float = group.get("lazy_overlap") or 1.0
        self.step = step
        self.projects_back = projects_back
        self.shards = slot.shards
        self.shape = slot.shards.shape(grad)
        self.right = channel_dim(self.shape) == -1
        self.cut = slot.cut and not self.right
        self.basis = self.load_basis(grad)

    def load_basis(self, grad: Tensor) -> Tensor:
        """The basis as it is before this step."""
        raise NotImplementedError

    def refresh_(self, grad: Tensor) -> Tensor | None:
        """Make a new basis if one is due.

        Returns P_old.T @ P_new, (..., r, r), which turns moments into the new coordinates: the identity for a matrix of
        a batch that keeps its basis. `None` where none was due, or where old and new have nothing in common.
        """
        raise NotImplementedError

    def project(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient in the coordinates of the basis; `out`: where it is to be, of a matrix that is not cut."""
        if self.cut:
            return self.shards.scatter_sum(grad.mT @ self.shards.rows(self.basis))
        return torch.matmul(*((grad, self.basis) if self.right else (self.basis.mT, grad)), out=out)

    def project_back(self, projected: Tensor) -> Tensor:
        """The matrix that has these coordinates."""
        if self.cut:
            return self.shards.rows(self.basis) @ self.shards.gather(projected, self.shape[1]).mT
        return projected @ self.basis.mT if self.right else self.basis @ projected

    @property
    def tall(self) -> bool:
        """Whether `projected` is (..., channels, r), else (..., r, channels)."""
        return self.right or self.cut

    def channel_scale(self, direction: Tensor, projected: Tensor) -> Tensor:
        """`channel_scale` of a projection and Adam's direction for it, to be multiplied with the gradient."""
        s = channel_scale(direction, projected, -1 if self.tall else -2)
        return self.shards.gather(s, self.shape[1]).mT if self.cut else s


class StoredProjector(Projector):
    """A basis that is made from gradients and kept in the state "basis", by the codec of signed states."""

    # Whether making a basis syncs, by itself.
    SYNCS: ClassVar[bool]

    def find(self, grad: Tensor, old: Tensor, usable: Tensor) -> Tensor:
        """A basis for `grad`, (..., d, r). What it is where not `usable`, (..., 1, 1), does not matter."""
        raise NotImplementedError

    def load_basis(self, grad: Tensor) -> Tensor:
        return self.slot.load("basis")

    def _is_due(self) -> bool:
        """Whether a basis is due at this step; where its intervals are its own, that is noted in the state."""
        if OVERLAP not in self.slot.states:
            return self.step % self.update_gap == 0
        raw = self.slot.raw
        due, stretch = (number(raw[name]) if name in raw else first for name, first in ((DUE, 0), (STRETCH, 1)))
        if self.step < due:
            return False
        is_due = (self.step - due) % (self.update_gap * stretch) == 0  # not where an update was left out at `due`
        if is_due:
            overlap = self.slot.load(OVERLAP)
            kept = not in_dispatch_mode() and overlap.item() >= self.lazy_overlap  # a simulated one is no number
            stretch = min(2 * stretch, LONGEST) if kept else 1
            raw[DUE], raw[STRETCH] = count(self.step + self.update_gap * stretch), count(stretch)
        return is_due

    def refresh_(self, grad: Tensor) -> Tensor | None:
        due = self._is_due()
        if not due and self.step & (self.step - 1):
            return None
        old = self.basis
        missing = (old == 0).all(-1, keepdim=True).all(-2, keepdim=True)
        # Here the answer costs nothing; elsewhere a basis is made in vain in a handful of the first steps.
        if not due and (self.slot.syncs or self.SYNCS) and not missing.any():
            return None
        peak = self.shards.largest(grad)
        usable = (peak > 0) & (peak < LARGEST_GRADIENT)  # False for NaN too
        renewed = usable if due else usable & missing
        new = torch.where(renewed, self.find(grad, old, usable), old)
        rotation = None
        if due:
            same = torch.eye(self.rank, dtype=torch.float32, device=grad.device)
            turned = renewed & ~missing
            rotation = torch.where(turned, old.mT @ new, same)
            if OVERLAP in self.slot.states:
                overlap = torch.where(turned, rotation, 0.0).square().sum() / self.rank
                self.slot.save(OVERLAP, overlap)
        self.slot.save("basis", new)
        self.basis = self.load_basis(grad)  # what the codec made of it, as every later step will see it
        return rotation


class SvdProjector(StoredProjector):
    """Exact: the leading singular vectors. For comparison with the authors' packages, whose bits it gives."""

    SYNCS = True

    def find(self, grad: Tensor, old: Tensor, usable: Tensor) -> Tensor:
        return svd_basis(torch.where(usable, grad, 0.0), self.rank)  # torch's SVD raises on NaN


class SubspaceProjector(StoredProjector):
    """The default: one power step from the last basis and a QR; from a seeded Gaussian, four of them.

    The leading directions of a gradient move slowly, so each refresh goes on where the last one stopped (the idea of
    PowerSGD, arXiv 1905.09727). At 1024×2816 and rank 256 on one CPU core an SVD took 13 to 23 times as long as a
    refresh, in three runs of the slow test in tests/optim/test_projector.py.
    """

    SYNCS = False

    def find(self, grad: Tensor, old: Tensor, usable: Tensor) -> Tensor:
        key = stream_key(self.slot.key, "start")
        missing = (old == 0).all(-1, keepdim=True).all(-2, keepdim=True)
        start = torch.where(missing, gaussian(key, old.shape[-2], self.rank, grad.device), old)
        return power_basis(grad, start, 1 if self.step >= self.update_gap else COLD_STEPS, self.shards)


class RandomProjector(Projector):
    """Gaussian projection, regenerated from its seed.

    ```python
    P = randn(d, rank) / sqrt(rank)        # d = min(m, n); new after each `update_gap` steps
    P *= sqrt(rank / d)                    # for a method that projects back
    ```

    With variance 1/rank a projection keeps the norm of each channel (APOLLO, arXiv 2412.05270, section 4.2, needs just
    that), but P @ P.T then stretches by up to (1 + sqrt(d / rank))**2. With variance 1/d the columns have length 1 and
    are almost orthogonal: what is projected and projected back is nearly the projection of G to a random subspace, its
    singular values between (1 - sqrt(rank / d))**2 and (1 + sqrt(rank / d))**2, and a direction that is projected back
    has the size that GaLore's has.

    A seed that were taken from a parameter's position in a list would change with every layer that is added; this one
    is a hash of its name and of the number of the refresh.
    """

    def load_basis(self, grad: Tensor) -> Tensor:
        small = min(self.shape[-2:])
        matrix = self.matrix(small, self.step, grad.device)
        return matrix * math.sqrt(self.rank / small) if self.projects_back else matrix

    def refresh_(self, grad: Tensor) -> Tensor | None:
        return None

    def matrix(self, small: int, step: int, device: torch.device) -> Tensor:
        """P with variance 1/rank, (small, rank), for the update with this number, counted from 0."""
        return gaussian(stream_key(self.slot.key, step // self.update_gap), small, self.rank, device)


def basis_shape(shape: Shape, rank: int) -> Shape:
    """Shape of the basis of a gradient of `shape`."""
    return Shape([*shape[:-2], min(shape[-2:]), rank])


def projected_shape(shape: Shape, rank: int) -> Shape:
    """Shape of the projection of a gradient of `shape`."""
    projected = list(shape)
    projected[channel_dim(shape)] = rank
    return Shape(projected)


PROJECTORS: dict[str, type[Projector]] = {
    "svd": SvdProjector,
    "subspace": SubspaceProjector,
    "random": RandomProjector,
}
