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
moments. `fit` reads either in either place: decoded and encoded anew, which is exact where the blocks are the same and
one rounding of the codec otherwise. `by_rows` in a state says which of the two layouts it has. Weights
rounded at random (bf16_sr, bf16_ecc) draw the same numbers in every cut, as do `random` bases; states that are laid out
in another order draw others.

What a step sends for each matrix (m, n) of rank r, beside the 3 m n values of FSDP2's own, in values of fp32; the sum
of x values on all processes counts as 2 x. Vectors send nothing (lamb: norms), nor do batches of matrices, and every
step sends one byte a parameter, to agree on bad gradients.

| method           | m >= n                | m < n                                              |
|------------------|-----------------------|----------------------------------------------------|
| adamw, lion      | -                     | -                                                  |
| lamb             | 2 norms               | 2 norms                                            |
| apollo           | 1 norm                | r n to project, n for channels' factors, 1 norm    |
| apollo_mini      | 3 norms               | n to project (r = 1), 3 norms                      |
| galore           | -                     | r n to project, r n to lift                        |
| fira             | 1 norm                | r n to project, 2 r n to lift, n, 1 norm           |
| natural_galore   | s x s products        | as galore, and s x s products                      |
| a new "subspace" | a sum of r n, 2 peaks | a sum of r n, r m, 2 peaks                         |

A basis is new once in `update_gap` steps; the first one takes four rounds. soap, and `projection="svd"`, need the whole
gradient and are refused for matrices.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowmem.codecs import BlockCodec, StateCodec
from hf_lowmem.codecs.rows import RowCodec, by_rows
from hf_lowmem.distributed import Shards, agree, full, is_sharded, local
from hf_lowmem.kernels.step.reference import is_sound
from hf_lowmem.optim.sound_state import check_keys, check_values
from hf_lowmem.optim.state import BY_ROWS, COUNTS, WINDOW, ParamState, StateDecl, count, named, number

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer


class ShardedState(ParamState):
    """A `ParamState` whose tensors are the shards of this process."""

    def __init__(
        self,
        raw: dict[str, Any],
        codecs: tuple[StateCodec, StateCodec],
        decls: dict[str, StateDecl],
        make_key: Callable[[], int],
        waits: bool,
        p: DTensor,
        batch: bool,
    ) -> None:
        super().__init__(raw, codecs, decls, make_key, waits)
        if BY_ROWS not in raw:
            raw[BY_ROWS] = count(1)
        self.home = Shards(p)
        self.size = p.shape
        if not batch:  # of a batch of matrices (fused experts) each lies whole on one process
            self.shards, self.rows = self.home, p.shape[0]
        self._shapes: dict[str, torch.Size] = {}

    def _row_codec(self, name: str) -> StateCodec:
        codec = super()._codec(name)
        return codec if is_replicated(self.decls, name, self.size) else by_rows(codec, self._shapes[name])

    def _codec(self, name: str) -> StateCodec:
        """Where blocks are those of the flattened shard, the codec itself: its kernels know nothing of rows."""
        codec = self._row_codec(name)
        return codec.inner if isinstance(codec, RowCodec) and codec.aligned else codec

    def _encoded(self, name: str) -> dict[str, Tensor] | None:
        found = super()._encoded(name)
        if found is None:
            return None
        here = {k: local(v) for k, v in found.items()}
        codec = self._row_codec(name)
        return codec.flat(here) if isinstance(codec, RowCodec) and codec.aligned else here

    def _allocate(self, name: str, like: Tensor) -> None:
        encoded = self._row_codec(name).init(like, signed=self.decls[name].signed)
        if not is_replicated(self.decls, name, self.size):
            encoded = {k: self._wrap(v) for k, v in encoded.items()}
        self.raw.update(named(name, encoded))

    def _wrap(self, here: Tensor) -> Tensor:
        return self.home.wrap(here, self.size[0] if self.rows is None else self.rows)

    def first(self, value: Tensor) -> int:
        first, _ = self.home.span(self.size[0] if self.rows is None else self.rows)
        return first * value.shape[1:].numel()

    def load(self, name: str, like: Tensor) -> Tensor:
        self._shapes[name] = like.shape
        return super().load(name, like)

    def tensor(self, name: str, init: Callable[[], Tensor]) -> Tensor:
        """As in one process; what has rows is cut like the parameter, a number is the same on all processes."""
        if name not in self.raw:
            value = init()
            self.raw[name] = self._wrap(value) if value.ndim else value
        return local(self.raw[name])


def is_replicated(decls: dict[str, StateDecl], name: str, size: torch.Size) -> bool:
    """Whether each process keeps the whole of a state: a basis of a matrix. Those of a batch go with their matrices."""
    return len(size) == 2 and name in decls and decls[name].replicated


def agreed(optimizer: "LowMemOptimizer") -> dict[Tensor, Tensor]:
    """For each sharded parameter with a gradient, whether it is sound on all processes: one all-reduce a step."""
    params = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and is_sharded(p) and p.grad.layout == torch.strided
    ]
    if not params:
        return {}
    flags = [sound_here(p, optimizer.state.get(p, {})) for p in params]
    return dict(zip(params, agree(flags, [Shards(p) for p in params]), strict=True))


def agreed_for(p: Tensor, raw: dict[str, Any]) -> Tensor:
    """`agreed`, of one parameter: for a backward hook, which sees no other."""
    return agree([sound_here(p, raw)], [Shards(cast(DTensor, p))])[0]


def sound_here(p: Tensor, raw: dict[str, Any]) -> Tensor:
    assert p.grad is not None
    sound = torch.ones((), dtype=torch.bool, device=p.device)
    for part in (p.grad, raw.get(WINDOW)):
        if part is not None and local(part).numel():
            sound = sound & is_sound(local(part))
    return sound


def coded_bytes(optimizer: "LowMemOptimizer", p: Tensor, group: dict[str, Any]) -> int:
    """Bytes on this process of the coded states of a sharded parameter."""
    codecs, total, home = optimizer.codecs(p, group), 0, Shards(cast(DTensor, p))
    for name, shape in row_shapes(optimizer, p.shape, group).items():
        codec = codecs[0 if optimizer.STATES[name].signed else 1]
        if is_replicated(optimizer.STATES, name, p.shape):
            total += codec.nbytes(shape.numel(), signed=optimizer.STATES[name].signed)
        else:
            values = home.span(shape[0])[1] * shape[1:].numel()
            total += by_rows(codec, shape).nbytes(values, signed=optimizer.STATES[name].signed)
    return total


def row_shapes(optimizer: "LowMemOptimizer", shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the coded states of a sharded parameter, over all processes."""
    shapes = optimizer.state_shapes(shape, group)
    meta = {name: torch.empty(size, dtype=torch.float32, device="meta") for name, size in shapes.items()}
    return {name: optimizer.to_rows(name, value, shape, group).shape for name, value in meta.items()}


def fit(
    optimizer: "LowMemOptimizer", p: Tensor, group: dict[str, Any], raw: dict[str, Any], label: str
) -> dict[str, Any]:
    """A loaded state as this parameter keeps it: whole or cut, whichever the checkpoint has. A fresh copy.

    A collective call where the loaded tensors are DTensors and `p` is not.

    Args:
        label: what an error calls the parameter.

    Raises:
        ValueError: where a tensor is missing, unknown, not finite, or has not the shape or the dtype that the layout
            gives it.
    """
    cut, was_cut = is_sharded(p), BY_ROWS in raw
    raw = checked(optimizer, p, group, raw, label)
    counts = {k: count(number(v)) for k, v in raw.items() if k in COUNTS and k != BY_ROWS}
    raw = {k: v for k, v in raw.items() if k not in COUNTS}
    if not (cut and was_cut):
        raw = {k: full(v).to(p.device, copy=True) for k, v in raw.items()}
    if cut != was_cut:
        raw = relaid(optimizer, p, group, raw, to_rows=cut)
    if not cut:
        return raw | counts
    home = Shards(cast(DTensor, p))
    return {k: place(home, optimizer.STATES, k, v, p) for k, v in raw.items()} | counts | {BY_ROWS: count(1)}


def checked(
    optimizer: "LowMemOptimizer", p: Tensor, group: dict[str, Any], raw: dict[str, Any], label: str
) -> dict[str, Any]:
    """A loaded state in this version's dtypes: hf_lowmem 0.1.0 kept scales as bf16 that are fp32 now.

    Raises where it is not whole and sound, or not of the layout that it claims.
    """
    was_cut, codecs = BY_ROWS in raw, optimizer.codecs(p, group)
    shapes = row_shapes(optimizer, p.shape, group) if was_cut else optimizer.state_shapes(p.shape, group)
    moments: dict[str, tuple[StateCodec, bool]] = {}
    coded: dict[str, Tensor] = {}
    for name, signed in of_states(optimizer.STATES, shapes):
        tensors = {k: v for k, v in raw.items() if k.split(".")[0] == name and isinstance(v, Tensor)}
        found = {k: v.shape for k, v in tensors.items()}
        codec = codecs[0 if signed else 1]
        if was_cut and not is_replicated(optimizer.STATES, name, p.shape):
            codec = by_rows(codec, shapes[name])
        encoded = named(name, codec.init(torch.empty(shapes[name], dtype=torch.float32, device="meta"), signed=signed))
        expected = {k: v.shape for k, v in encoded.items()}
        moments[name] = codec, signed
        coded |= encoded
        if found.keys() == expected.keys() and found != expected:
            raise ValueError(
                f"the checkpoint's state {name!r} of a parameter of shape {tuple(p.shape)} is {plain_shapes(found)}, "
                f"expected {plain_shapes(expected)}: it was made by one process and put into shards as it is, or by "
                "another layout. Load such a checkpoint with optimizer.load_state_dict(torch.load(file)) on every "
                "process, which cuts it, or continue as it was made."
            )
        if isinstance(codec, BlockCodec | RowCodec):
            wider = {k: v for k, v in tensors.items() if k in encoded and encoded[k].dtype == torch.float32}
            raw = raw | {k: v.to(torch.float32) for k, v in wider.items() if v.dtype == torch.bfloat16}
    check_keys(optimizer, p, group, label, raw, coded)
    check_values(label, raw, moments)
    return raw


def plain_shapes(shapes: dict[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v) for k, v in shapes.items()}


def place(home: Shards, decls: dict[str, StateDecl], key: str, value: Tensor, p: Tensor) -> Tensor:
    """A copy of one loaded tensor, cut like `p` if it has rows."""
    if value.ndim == 0 or is_replicated(decls, key.split(".")[0], p.shape):
        return local(value).to(p.device, copy=True)
    rows = value.shape[0]
    here = local(value) if isinstance(value, DTensor) else home.rows(value)
    return home.wrap(here.to(p.device, copy=True).contiguous(), rows)


def relaid(
    optimizer: "LowMemOptimizer", p: Tensor, group: dict[str, Any], raw: dict[str, Any], *, to_rows: bool
) -> dict[str, Any]:
    """A state of whole tensors from one process's layout to that of rows, or back."""
    turn = optimizer.to_rows if to_rows else optimizer.from_rows
    flat, rows = optimizer.state_shapes(p.shape, group), row_shapes(optimizer, p.shape, group)
    codecs = optimizer.codecs(p, group)
    found = {k: v for k, v in raw.items() if k.split(".")[0] not in flat}
    if WINDOW in found:
        found[WINDOW] = turn(WINDOW, found[WINDOW], p.shape, group).contiguous()
    for name, signed in of_states(optimizer.STATES, flat):
        encoded = {
            k.removeprefix(name).removeprefix(".") or "data": v for k, v in raw.items() if name == k.split(".")[0]
        }
        if not encoded:
            continue
        codec = codecs[0 if signed else 1]
        whole = is_replicated(optimizer.STATES, name, p.shape)
        in_rows = codec if whole else by_rows(codec, rows[name])
        old, new = (codec, in_rows) if to_rows else (in_rows, codec)
        value = turn(name, old.decode(encoded, (flat if to_rows else rows)[name]), p.shape, group).contiguous()
        fresh = new.init(value, signed=signed)
        new.encode_(fresh, value)
        found |= named(name, fresh)
    return found


def of_states(decls: dict[str, StateDecl], names: Iterable[str]) -> list[tuple[str, bool]]:
    return [(name, decls[name].signed) for name in names]
