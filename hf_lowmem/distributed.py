"""The only module that knows DTensor: which rows of a parameter are here, and the few sums that a method needs.

FSDP2 cuts every parameter along dimension 0, as torch.chunk does: the first processes have ceil(rows / processes) rows
each, the last ones fewer or none. A method works on the rows that are here, as plain tensors. Where it needs more, a
norm or a projection of the dimension that is cut, it asks the parameter's `Shards`:

| call              | what goes over the wire                          | for                                          |
|-------------------|--------------------------------------------------|----------------------------------------------|
| `sum_`, `norms`   | an all-reduce of what it is given                | norms; the products of a subspace iteration  |
| `scatter_sum`     | a reduce-scatter                                 | a projection of the dimension that is cut    |
| `gather`          | an all-gather                                    | projecting back from such a projection       |
| `largest`         | an all-reduce of one number                      | scaling a subspace iteration                 |

`WHOLE` answers the same calls for a parameter that lies here entirely, and then nothing is sent: a method has one code
path, and a single process takes it with the arithmetic it always had.

Every process gets the same bits from a sum (a ring adds each number up at one place and hands it out), and what is
computed from equal bits by equal code is equal. So a basis is never sent: each process makes the same one.

Why not let DTensor's own operators do it: they would gather a weight's gradient for the QR of a basis, and they know
no rule for a codec's operations on bits.
"""

# torch's stubs do not say what torch.linalg and torch.distributed return, and call two names deprecated that torch 2.11
# needs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportDeprecated=false, reportPrivateUsage=false

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(p: Any) -> TypeGuard[DTensor]:
    """Whether a parameter is a DTensor, as FSDP2 makes it."""
    return isinstance(p, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this process: its own storage, to be written in place. Call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> Tensor:
    """The part of a tensor on this process, as the object that it is; nothing is dispatched."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def hold(tensor: Tensor, here: Tensor) -> None:
    """Give a DTensor another part for this process, of the same shape."""
    assert isinstance(tensor, DTensor)
    tensor._local_tensor = here


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process: a collective call for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Whole:
    """A parameter that lies here entirely, or a batch of matrices each of which does."""

    parts = 1  # processes that share it
    place: tuple[int, ...] = ()  # what tells this shard's random numbers from another's

    def shape(self, here: Tensor) -> torch.Size:
        """The whole shape of a parameter of which `here` is the part on this process."""
        return here.shape

    def rows(self, replicated: Tensor) -> Tensor:
        """The part, along dimension 0, of what every process has."""
        return replicated

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all parts, on each process; in place."""
        return x

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The sum over all parts, of which each process gets its rows: (n, ...) -> (n of here, ...)."""
        return x

    def gather(self, x: Tensor, rows: int) -> Tensor:
        """All parts below each other: (rows of here, ...) -> (rows, ...)."""
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest magnitude of each matrix, (..., m, n) -> (..., 1, 1); NaN or Inf where there is one."""
        return torch.linalg.vector_norm(x, ord=math.inf, dim=(-2, -1), keepdim=True)

    def norms(self, *xs: Tensor, dim: tuple[int, ...] | None, keepdim: bool = False) -> list[Tensor]:
        """Norms of whole tensors (`dim=None`) or of each matrix (`dim=(-2, -1)`)."""
        return [torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim) for x in xs]


WHOLE = Whole()


class Shards(Whole):
    """Layout of the rows of a DTensor parameter.

    Args:
        p: cut along dimension 0 by at most one dimension of its mesh, and replicated along the others (HSDP).

    Raises:
        RuntimeError: for any other placement.
    """

    def __init__(self, p: DTensor) -> None:
        self.mesh, self.placements, self.size = p.device_mesh, p.placements, p.shape
        cut = [i for i, placement in enumerate(p.placements) if type(placement) is Shard and placement.dim == 0]
        if len(cut) > 1 or any(type(q) is not Replicate for i, q in enumerate(p.placements) if i not in cut):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is placed as {tuple(p.placements)}: hf_lowmem knows parameters "
                "cut along dimension 0 once, as FSDP2 makes them (also with replicas). Leave out tensor parallelism "
                "and `shard_placement_fn`."
            )
        self.group = p.device_mesh.get_group(cut[0]) if cut else None
        self.parts = p.device_mesh.size(cut[0]) if cut else 1
        self.rank = p.device_mesh.get_local_rank(cut[0]) if cut else 0

    def shape(self, here: Tensor) -> torch.Size:
        return self.size

    def span(self, rows: int) -> tuple[int, int]:
        """First row and number of rows that are here, of `rows` in all."""
        chunk = -(-rows // self.parts)
        first = min(self.rank * chunk, rows)
        return first, min(chunk, rows - first)

    def wrap(self, here: Tensor, rows: int) -> Tensor:
        """`here`, the part of this process of a tensor with `rows` rows in all, as a DTensor beside the parameter."""
        shape = torch.Size([rows, *here.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(here, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def rows(self, replicated: Tensor) -> Tensor:
        return replicated.narrow(0, *self.span(replicated.shape[0]))

    def sum_(self, x: Tensor) -> Tensor:
        if self.parts > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def scatter_sum(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            return x
        chunk = -(-x.shape[0] // self.parts)
        missing = self.parts * chunk - x.shape[0]
        padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()
        mine = x.new_empty(chunk, *x.shape[1:])
        # Both were renamed in torch 2.13.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(mine, padded, group=self.group)
        return mine[: self.span(x.shape[0])[1]]

    def gather(self, x: Tensor, rows: int) -> Tensor:
        if self.parts == 1:
            return x
        chunk = -(-rows // self.parts)
        missing = chunk - x.shape[0]
        padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()
        every = x.new_empty(self.parts * chunk, *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(every, padded, group=self.group)
        return every[:rows]

    def largest(self, x: Tensor) -> Tensor:
        peak = super().largest(x) if x.numel() else x.new_zeros(*x.shape[:-2], 1, 1)
        if self.parts > 1:
            peak = torch.where(peak.isnan(), math.inf, peak)  # a maximum may drop a NaN on its way
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        return peak

    def norms(self, *xs: Tensor, dim: tuple[int, ...] | None, keepdim: bool = False) -> list[Tensor]:
        """Squares are added up in float64, so the order of the sum shows in the last place at most."""
        if self.parts == 1:
            return super().norms(*xs, dim=dim, keepdim=keepdim)
        found = [torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim, dtype=torch.float64).square() for x in xs]
        total = self.sum_(torch.stack(found)).sqrt().to(torch.float32)
        return list(total.unbind())


def mean_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each number over all processes, in fp64; of one process the numbers themselves.

    Args:
        device: where the processes' tensors are.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def agree(flags: Sequence[Tensor], shards: Sequence[Shards]) -> list[Tensor]:
    """Each flag (a boolean number) as all processes see it: true only where it is on each. One all-reduce a group."""
    agreed = list(flags)
    groups: dict[int, list[int]] = {}
    for i, at in enumerate(shards):
        if at.parts > 1:
            groups.setdefault(id(at.group), []).append(i)
    for members in groups.values():
        packed = torch.stack([flags[i] for i in members]).to(torch.uint8)
        dist.all_reduce(packed, op=dist.ReduceOp.MIN, group=shards[members[0]].group)
        for i, flag in zip(members, packed.bool().unbind(), strict=True):
            agreed[i] = flag
    return agreed
