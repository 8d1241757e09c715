"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, where its diagonal second moment fits best.

Shampoo keeps L, an average of G Gᵀ, and R, one of Gᵀ G. In the basis of their eigenvectors the gradient's covariance is
nearly diagonal, so Adam, which knows only the diagonal, is nearly a full-matrix method there. Between two refreshes of
the basis the second moment goes on being updated, which is why SOAP may refresh seldom where Shampoo may not.

The first moment is kept in the rotated basis and turned at each refresh. The other way, keeping it as it is and
rotating it in each step, costs two more products of matrices a step; and a rotation spreads a codec's rounding errors
evenly over the directions, those with a small second moment included, whose root then divides them. Measured with
an int8 first moment on a 96 x 128 matrix whose gradients fall by two decades along each side's directions, as the
distance of the weights from those with fp32 moments after 100 steps: 4.8 % of the way they went against 171 %.

Why not an eigendecomposition at each refresh: one power step and a QR decomposition track a slowly turning basis at a
fraction of the time (the paper's section 4, algorithm 4).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.adamw.reference import adam_direction, corrected_lr
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Shape, StateDecl
from hf_lowmem.specs import check_flag, check_number

LARGEST_SIDE = 10_000  # a dimension above it is not preconditioned (the authors' max_precond_dim)
NAMES = {-2: "left", -1: "right"}


class Side(NamedTuple):
    """One preconditioned dimension of a matrix of the shape (..., m, n), of size d = m or n."""

    dim: int  # -2: the rows, L and Q_L; -1: the columns, R and Q_R
    factor: Tensor  # (..., d, d), the average of G Gᵀ or Gᵀ G
    basis: Tensor  # (..., d, d), its eigenvectors as columns, by falling eigenvalue


def rotate(x: Tensor, sides: Sequence[Side], *, back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or with `back` Q_L x Q_Rᵀ; a side that is not preconditioned counts as the identity."""
    for side in sides:
        basis = side.basis.mT if back else side.basis
        x = basis.mT @ x if side.dim == -2 else x @ basis
    return x


def eigenbasis(factor: Tensor, *, syncs: bool = True) -> Tensor:
    """Eigenvectors of (..., d, d), by falling eigenvalue; the identity for a matrix that no solver has solved.

    A factor of low rank, which every first gradient of an embedding has, fails LAPACK's fp32 solver in two ways: it
    raises, or it returns NaN without a word. Then fp64 is asked. A device that is not to be asked whether it returned
    NaN (`syncs` is False) selects the identity instead: SOAP is Adam until the first refresh, which is a QR and needs
    no solver.

    Of a bad gradient's factor the vectors do not matter, for its step is undone, but the solver must not raise.
    """
    factor = factor.nan_to_num(0.0, 0.0, 0.0)
    factor = factor / factor.abs().amax((-2, -1), keepdim=True).clamp_(min=torch.finfo(factor.dtype).tiny)
    vectors = solved(factor)
    if syncs and not bool(vectors.isfinite().all()):
        vectors = solved(factor.double()).to(factor.dtype)
    good = vectors.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.where(good, vectors.flip(-1), identity)


def solved(factor: Tensor) -> Tensor:
    """Eigenvectors by rising eigenvalue, in fp64 where the solver says that it has failed; NaN where that fails."""
    for dtype in (factor.dtype, torch.float64):
        try:
            return linalg.eigh(factor.to(dtype)).eigenvectors.to(factor.dtype)
        except linalg.LinAlgError:
            continue
    return torch.full_like(factor, torch.nan)


def refresh_(sides: Sequence[Side], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """One power step and QR for each basis; the moments follow it. All in place.

    The first moment is rotated. The second cannot be (it is a diagonal): its values stay with their eigenvectors, which
    are sorted anew by the eigenvalues' estimates diag(Qᵀ L Q).
    """
    plain = rotate(exp_avg, sides, back=True)
    for side in sides:
        product = side.factor @ side.basis
        order = (side.basis * product).sum(-2).argsort(descending=True, stable=True)  # (..., d)
        along = order.unsqueeze(-1 if side.dim == -2 else -2)
        exp_avg_sq.copy_(exp_avg_sq.take_along_dim(along, side.dim))
        side.basis.copy_(linalg.qr(product.take_along_dim(order.unsqueeze(-2), -1)).Q)
    exp_avg.copy_(rotate(plain, sides))


def soap_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sides: Sequence[Side],
    *,
    lr: float,
    betas: tuple[float, float],
    shampoo_beta: float,
    eps: float,
    weight_decay: float,
    step: int,
    refresh: bool,
    syncs: bool = True,
) -> None:
    """One SOAP step in place, all tensors fp32 (arXiv 2409.11321, algorithm 3).

    Args:
        p, grad: (..., m, n), or any shape without `sides`.
        exp_avg, exp_avg_sq: of that shape, in the rotated basis.
        sides: what is preconditioned; none: Adam.
        step: how many gradients the moments hold, this one included. 0: none; the weights take Adam's first step, which
            leaves no moments, and the basis comes from this gradient.
        refresh: whether the basis is refreshed after the weights were updated.
        syncs: whether reading a number from the device is free.
    """
    if step == 0:
        direction = adam_direction(grad, torch.zeros_like(grad), torch.zeros_like(grad), betas, eps)
    else:
        direction = rotate(adam_direction(rotate(grad, sides), exp_avg, exp_avg_sq, betas, eps), sides, back=True)
    p.add_(direction, alpha=-corrected_lr(lr, betas, max(step, 1)))
    p.mul_(1 - lr * weight_decay)
    for side in sides:
        g = grad if side.dim == -2 else grad.mT
        side.factor.lerp_(g @ g.mT, 1 - shampoo_beta)
        if step == 0:
            side.basis.copy_(eigenbasis(side.factor, syncs=syncs))
    if refresh and step > 0:
        refresh_(sides, exp_avg, exp_avg_sq)


def check_shampoo_beta(label: str, value: Any) -> None:
    """Raise unless `value` is None or in [0, 1)."""
    if value is not None:
        check_number(label, value, low=0.0, high=1.0)


def preconditioned(shape: Shape, group: Group) -> list[int]:
    """Dimensions of a parameter that are preconditioned: rows (-2) and columns (-1) of a matrix or of experts."""
    matrices = len(shape) == 2 or (len(shape) == 3 and group["experts"])
    return [dim for dim in (-2, -1) if shape[dim] <= LARGEST_SIDE] if matrices else []


def _of_side(dim: int) -> StateDecl:
    """The factor, or the basis, of one dimension: (..., d, d) where it is preconditioned."""

    def shape(shape: Shape, group: Group) -> Shape | None:
        return Shape([*shape[:-2], shape[dim], shape[dim]]) if dim in preconditioned(shape, group) else None

    return StateDecl(signed=True, shape=shape, coded=False)


def _side(dim: int, slot: Slot) -> Side:
    """The stored factor and basis of one dimension; a basis that is zero is none yet and becomes the identity.

    It is zero when it is made, and again where a bad first gradient was undone. No row of a basis is zero, so one row
    tells, and no device has to be asked.
    """
    factor, basis = (slot.load(f"{name}_{NAMES[dim]}") for name in ("factor", "basis"))
    basis.diagonal(dim1=-2, dim2=-1).add_((basis[..., 0, :] == 0).all(-1, keepdim=True))
    return Side(dim, factor, basis)


class Soap(LowMemOptimizer):
    """SOAP (arXiv 2409.11321) whose moments are stored by a codec; L, R and their bases stay fp32.

    ```python
    # p, grad, m, v (m, n); L, Q_L (m, m); R, Q_R (n, n)
    g   = Q_L.T @ grad @ Q_R
    m   = beta1 * m + (1 - beta1) * g                    # stored signed
    v   = beta2 * v + (1 - beta2) * g**2                 # stored unsigned
    u   = Q_L @ (m / (sqrt(v) + eps)) @ Q_R.T
    p  -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * u
    p  -= lr * weight_decay * p
    L   = shampoo_beta * L + (1 - shampoo_beta) * grad @ grad.T
    R   = shampoo_beta * R + (1 - shampoo_beta) * grad.T @ grad
    if t % update_gap == 0:
        Q_L, Q_R = qr(L @ Q_L).Q, qr(R @ Q_R).Q          # columns sorted by eigenvalue; m turns with them, v is sorted
    ```

    The first step. A gradient in its own eigenbasis is diagonal, and Adam would blow the rounding errors beside the
    diagonal up to the size of a step. The authors' code therefore takes the basis from the first gradient and leaves
    the weights alone. Here the weights take plain Adam's first step meanwhile, which leaves no moments; from the second
    step on the two are the same, and t counts from there. Should the first gradient be bad (NaN, Inf), the basis is the
    identity until the first refresh.

    Applies to matrices and to fused experts, each with its own basis. A dimension above 10 000 (a vocabulary) is not
    preconditioned. Vectors, numbers, convolutions of any kind, and matrices with both sides above 10 000 take Adam in
    the same order of eps and decay: a convolution's (out, in, k) as a batch would have `out` pairs of bases.

    Defaults: betas (0.95, 0.95), eps 1e-8, update_gap 10, `shampoo_beta=None`: beta2, `experts=False`. `experts=True`
    says of a group that its parameters of three dimensions are batches of matrices; `make_optimizer` finds them.

    State: 2s * mn + 8 * (m**2 + n**2) bytes a matrix, with s the codec's bytes a value. A square one thus takes 24
    bytes a parameter with fp32 moments and 18.03 with `state="int8"`; an embedding of 32000 x 4096 9.02 and 3.06.
    Parameters of fewer than 4096 values keep fp32 moments.

    No step asks the device for a number but the first, whose eigendecomposition reports whether it converged.

    Recommended: pre-training with lr 3e-3, betas (0.95, 0.95) and update_gap 10, the authors' settings. Fine-tuning:
    AdamW's learning rate to begin with (the step is Adam's, turned), and `state="int8"`. Not for you where memory is
    what you lack, for it is the largest state here: take `adamw` with `state="int8"`, or `apollo`.

    Raises:
        TypeError, ValueError: for a `shampoo_beta` that is neither None nor in [0, 1).
    """

    name = "soap"
    STATES = {
        "exp_avg": StateDecl(signed=True),
        "exp_avg_sq": StateDecl(signed=False),
        **{f"{name}_{NAMES[dim]}": _of_side(dim) for dim in NAMES for name in ("factor", "basis")},
    }
    DEFAULTS: ClassVar[Group] = {
        "betas": (0.95, 0.95),
        "eps": 1e-8,
        "update_gap": 10,
        "shampoo_beta": None,
        "experts": False,
    }
    CHECKS = {"shampoo_beta": check_shampoo_beta, "experts": check_flag}

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        exp_avg, exp_avg_sq = slot.load("exp_avg"), slot.load("exp_avg_sq")
        sides = [_side(dim, slot) for dim in preconditioned(grad.shape, group)]
        step = slot.step - bool(sides)
        soap_(
            p,
            grad,
            exp_avg,
            exp_avg_sq,
            sides,
            lr=group["lr"],
            betas=group["betas"],
            shampoo_beta=group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            refresh=step % group["update_gap"] == 0,
            syncs=slot.syncs,
        )
        slot.save("exp_avg", exp_avg)
        slot.save("exp_avg_sq", exp_avg_sq)

    @classmethod
    def unsharded_only(cls, shape: Shape, group: Group) -> str | None:
        if len(shape) == 2 and preconditioned(shape, group):
            return (
                f"{cls.name!r} under FSDP2: the factor of a weight's rows needs the whole gradient, which no process "
                "has, and keeping both factors on each would cost more than sharding saves. Use DDP, or choose "
                "'adamw', 'fira' or 'galore'."
            )
        return None
