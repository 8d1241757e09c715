"""Rules whose numbers belong to a row, a column or a matrix: SCALE's, SinkGD's and Adam-mini's, as fp32 functions.

All of them need means of squares along a dimension. Of a matrix that FSDP2 has cut, each process has some rows whole:
means along a row are its own business, and those along a column are sums over processes (`Shards.norms`).
"""

import math

from torch import Tensor

from hf_lowmem.distributed import WHOLE
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Shape

LEAST_RMS = 1e-8


def is_matrix(shape: Shape, group: Group) -> bool:
    """Whether a parameter is a linear weight, or a batch of such."""
    return group["role"] == "linear" and (len(shape) == 2 or (len(shape) == 3 and group["experts"]))


def inputs_dim(group: Group) -> int:
    """The dimension of a matrix that its outputs do not have."""
    return -1 if group["outputs"] == -2 else -2


def norms(x: Tensor, dim: int, slot: Slot) -> tuple[Tensor, int]:
    """(norms along a dimension of a matrix, or of each of a batch, kept as one; how many values each is over)."""
    crosses = slot.cut and dim == -2
    found = (slot.shards if crosses else WHOLE).norms(x, dim=(dim,), keepdim=True)[0]
    return found, slot.shape[dim] if crosses else x.shape[dim]


def normalized(x: Tensor, dim: int, slot: Slot) -> Tensor:
    """x over its root mean square along a dimension, which counts as 1e-8 at least; a fresh tensor."""
    norm, count = norms(x, dim, slot)
    return x / norm.div_(math.sqrt(count)).clamp_(min=LEAST_RMS)


def scale_(p: Tensor, update: Tensor, group: Group) -> None:
    """A step of the length that `update` has, after decay of the weight as it was."""
    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def averaged(grad: Tensor, slot: Slot, beta: float) -> Tensor:
    """The first moment with this gradient in it, which is stored."""
    exp_avg = slot.load("exp_avg")
    exp_avg.lerp_(grad, 1 - beta)
    slot.save("exp_avg", exp_avg)
    return exp_avg


def scale_lookup_(p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
    """SCALE's step of an output head, by rows of its momentum, or of an embedding, by columns of its gradient."""
    if group["role"] == "head":
        scale_(p, normalized(averaged(grad, slot, group["betas"][0]), -1, slot), group)
    else:
        scale_(p, normalized(grad, -2, slot), group)


def square_shape(shape: Shape, group: Group) -> Shape:
    """Shape of Adam-mini's second moment: one value a row (of Conv1D: a column), a bias's own, one for a norm."""
    if len(shape) < 2:
        return shape if group.get("bias") else Shape([])
    if len(shape) == 2 or (len(shape) == 3 and group.get("experts")):
        outputs: int = group.get("outputs", -2)
        return Shape([*shape[:-2], shape[outputs]])
    return shape[:1]


def square_rows(shape: Shape, group: Group) -> int | None:
    """Where a matrix's rows are in it: nowhere if it has a value a column, which every process keeps."""
    return None if len(shape) == 2 and group.get("outputs", -2) == -1 else 0


def mean_squares(grad: Tensor, slot: Slot, group: Group) -> Tensor:
    """Mean of the gradient's squares over each of Adam-mini's blocks, in the shape that its second moment has here.

    Rows of one head have one number, which each of them keeps: so shards of rows need no others, but for this mean.
    """
    shape, whole = slot.states["row_sq"].shape, slot.shape
    if grad.ndim < 2:
        if shape == grad.shape and len(whole):
            return grad.square()
        return slot.shards.norms(grad, dim=None)[0].square_().div_(max(whole.numel(), 1))
    batch = grad.ndim == 3 and bool(group.get("experts"))
    if grad.ndim > 2 and not batch:
        return grad.flatten(1).square().mean(1)
    dim = inputs_dim(group) if "outputs" in group else -1
    norm, count = norms(grad, dim, slot)
    means = norm.squeeze(dim).square_().div_(count)
    head = group.get("head")
    if head is None or means.ndim != 1 or whole[group["outputs"]] % head:
        return means
    here = slot.cut and group["outputs"] == -2
    every = slot.shards.gather(means, whole[0]) if here else means
    every = every.view(-1, head).mean(1).repeat_interleave(head)
    return slot.shards.rows(every) if here else every


def mini_(p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
    """Adam-mini's step (arXiv 2406.16793, algorithm 1): AdamW's, with one second moment for each block."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    square = slot.load("row_sq")
    square.mul_(beta2).add_(mean_squares(grad, slot, group), alpha=1 - beta2)
    exp_avg = averaged(grad, slot, beta1)
    root = square.sqrt().div_(math.sqrt(1 - beta2**slot.step)).add_(group["eps"])
    if p.ndim >= 2:
        matrices = p.ndim == 2 or bool(group.get("experts"))
        across = matrices and group.get("outputs", -2) == -1
        root = root.unsqueeze(-2) if across else root[(..., *[None] * (p.ndim - root.ndim))]
    p.mul_(1 - lr * group["weight_decay"]).addcdiv_(exp_avg, root, value=-lr / (1 - beta1**slot.step))
    slot.save("row_sq", square)
