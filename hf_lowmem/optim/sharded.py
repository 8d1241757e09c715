"""The state of a parameter that FSDP2 has cut: DTensors beside it, in rows that can be cut anew.

A plain tensor in an optimizer's state counts as replicated: a distributed checkpoint keeps one process's copy and gives
it to all, so shards kept as plain tensors come back as rank 0's, without an error. Here every state that belongs to
rows is a DTensor with the parameter's mesh and placement, and plain tensors are only what is equal on all processes.

| state                            | stored as                                | placed                            |
|----------------------------------|------------------------------------------|-----------------------------------|
| moments of the parameter's shape | codes (m, ...), scalars (m, blocks)      | as the parameter                  |
| low-rank moments                 | codes (channels, r), ...: see below      | as the parameter                  |
| natural_galore's history         | codes (channels, s, r), ...              | as the parameter                  |
| `basis` of a matrix              | as in one process                        | plain, equal on all processes     |
| `correction`                     | int8 of the parameter's shape            | as the parameter                  |
| `prev_norm` of a matrix          | one number                               | plain, equal on all processes     |
| all of a batch of matrices       | (experts, ...)                           | as the parameter: whole matrices  |

The channels of a matrix m < n are its columns, and low-rank moments are (r, n) in one process. Here they are (n, r),
cut by n: kept whole they would take the same bytes on any number of processes.

Each row is encoded for itself (hf_lowmem/codecs/rows.py), so a checkpoint continues on any number of processes, from
the same bits. One that a single process made has other blocks where a row is no multiple of the codec's, and (r, n)
moments. optim/checkpoint.py reads either in either place: decoded and encoded anew, which is exact where the blocks are
the same and one rounding of the codec otherwise. `by_rows` in a state says which of the two layouts it has. Weights
rounded at random (bf16_sr, bf16_ecc) draw the same numbers in every cut, as do `random` bases; states that are laid out
in another order draw others.

What a step sends for it: tests/dist/test_wire.py. soap, and `projection="svd"`, need the whole gradient and are refused
for matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowmem.codecs import StateCodec
from hf_lowmem.codecs.rows import RowCodec, by_rows
from hf_lowmem.distributed import Shards, agree, local
from hf_lowmem.kernels.step.reference import is_finite_gradient
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import BY_ROWS, CORRECTION, WINDOW, Group, State, count

__all__ = ["ShardedSlot", "agreed", "row_dim", "row_layout"]


def row_dim(state: State, shape: torch.Size, group: Group) -> int | None:
    """The dimension of a state that goes in front and is cut; None: each process keeps the whole.

    A matrix's declaration says it. Of a batch of matrices, each of which lies whole on one process, it is the batch.
    """
    if len(shape) != 2 or not state.shape:
        return 0 if state.shape else None
    return None if state.decl.rows is None else state.decl.rows(shape, group)


def row_layout(whole: Mapping[str, State], shape: torch.Size, group: Group) -> dict[str, State]:
    """The states of a parameter of `shape` over all processes, with what is cut in front and each row for itself."""
    found: dict[str, State] = {}
    for name, state in whole.items():
        dim = row_dim(state, shape, group)
        if dim is None:
            found[name] = state
            continue
        rest = list(state.shape)
        rows = torch.Size([rest.pop(dim), *rest])
        found[name] = state._replace(codec=by_rows(state.codec, rows), shape=rows, cut=True)
    return found


class ShardedSlot(Slot):
    """The slot of a parameter of which this process has some rows; its states are the shards that are here.

    Where blocks are those of the flattened shard, a state's codec is the plain one: its kernels know nothing of rows.
    """

    sharded = True

    def _states(self, p: Tensor, group: Group) -> dict[str, State]:
        self.home = Shards(cast(DTensor, p))
        batch = p.ndim == 3 and bool(group.get("experts") or group.get("rank"))
        if not batch:
            self.shards, self.cut = self.home, True
        self.rows = row_layout(self.whole, p.shape, group)
        return {name: self._here(state) for name, state in self.rows.items()}

    def _here(self, state: State) -> State:
        codec, shape = state.codec, state.shape
        if state.cut:
            shape = torch.Size([self.home.span(shape[0])[1], *shape[1:]])
        inner = codec.inner if isinstance(codec, RowCodec) and codec.aligned else codec
        return state._replace(codec=cast(StateCodec, inner), shape=shape)

    def count_step(self) -> None:
        if BY_ROWS not in self.raw:
            self.raw[BY_ROWS] = count(1)
        super().count_step()
        if self.draws:
            _ = self.key

    def first(self, name: str | None = None) -> int:
        """Place in the whole of the first value that is here: rows above times the values of a row."""
        shape = self.shape if name is None else self.rows[name].shape
        return self.home.span(shape[0])[0] * shape[1:].numel() + self.start

    def correction(self, here: Tensor) -> Tensor:
        if CORRECTION not in self.raw:
            self.raw[CORRECTION] = self.home.wrap(torch.zeros_like(here, dtype=torch.int8), self.shape[0])
        return local(self.raw[CORRECTION])

    def _encoded(self, name: str) -> dict[str, Tensor] | None:
        found = super()._encoded(name)
        if found is None:
            return None
        here, codec = {k: local(v) for k, v in found.items()}, self.rows[name].codec
        return codec.flat(here) if isinstance(codec, RowCodec) and codec.aligned else here

    def tensors(self, name: str) -> list[Tensor]:
        return list(self._ensure(name).values())

    def _allocate(self, name: str) -> None:
        state = self.rows[name]
        self.raw.setdefault(BY_ROWS, count(1))
        tensors = state._replace(shape=self.states[name].shape).empty(name, self.device)
        if state.cut:
            tensors = {k: self.home.wrap(v, state.shape[0]) for k, v in tensors.items()}
        self.raw.update(tensors)


def agreed(entries: Sequence[tuple[Tensor, ShardedSlot]]) -> list[Tensor]:
    """Flags, one a sharded parameter: whether its gradient is good on all processes. One all-reduce for all."""
    return agree([_finite_here(p, slot.raw) for p, slot in entries], [slot.home for _, slot in entries])


def _finite_here(p: Tensor, raw: dict[str, Any]) -> Tensor:
    assert p.grad is not None
    finite = torch.ones((), dtype=torch.bool, device=p.device)
    for part in (p.grad, raw.get(WINDOW)):
        if part is not None and local(part).numel():
            finite = finite & is_finite_gradient(local(part))
    return finite
