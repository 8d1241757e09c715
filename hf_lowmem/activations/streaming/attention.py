"""Causal attention of a chunk of queries to all keys up to its end, without a mask of tokens x tokens.

A chunk sees the keys before it whole and its own causally: of the rectangle queries x keys, the lower right corner is
cut off. transformers' `sdpa` has no word for that: without a mask it is causal from the upper left corner, and crops
the keys to as many as there are queries. So while a chunk runs, its entry in transformers' table of attention functions
is replaced by `attend`, which

- calls the flash kernel for sequences of several lengths where a mask means documents and windows (`documents`), on a
  CUDA device;
- merges two calls where it means prompts that are shared (`shared`), on a CPU, too;
- hands on what has another mask (padding, and all on a CPU: a block of chunk x keys that it sees);
- hands on a chunk that begins at key 0, for which transformers' way is right;
- else calls the flash kernel on a CUDA device, whose causality is from the lower right; elsewhere torch's sdpa with a
  mask of chunk x keys that is a view of one line. Keys are repeated for groups of heads in neither.

A layer that does not ask the table for its attention is given a mask of chunk x keys in every chunk.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowmem.activations.streaming.documents import Documents, attend
from hf_lowmem.activations.streaming.shared import Shared, attend_shared

__all__ = ["Chunk", "Corner", "halves", "lower_right", "on_accelerator", "streaming", "swapped", "table_of"]

ROWS = 1024  # queries in one call: torch's kernel on a CPU is fastest from 768 on, and computes half of them in vain
FLASH_HEAD = 256  # the largest head dimension that it takes


class Corner:
    """Masks of queries at the end of keys, in one pass over the chunks of a layer. torch's kernels on a CPU add a mask
    to scores, so it is 0 or -inf; of a mask of True and False they would make this one in each call.

    Whether a query sees a key depends on the distance between them. So with the last query first, a mask has the same
    value along each diagonal, and is a view of one line: what would be queries x keys values, read from memory once for
    all scores, is a few thousand that stay in the processor's cache.

    Args:
        keys: of the longest mask.
        queries: of a chunk.
    """

    def __init__(self, keys: int, queries: int = ROWS) -> None:
        self.keys, self.queries = keys, min(queries, keys, ROWS)
        self._line: Tensor | None = None

    def of(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The mask of up to ROWS queries, of which the last comes first."""
        if self._line is None:
            self._line = torch.zeros(self.keys + self.queries - 1, dtype=dtype, device=device)
            self._line[self.keys :].fill_(float("-inf"))
        return self._line.as_strided((queries, keys), (1, 1), self.keys - keys)


class Chunk:
    """State of a chunk while its layer runs.

    causal: its queries see all keys before them. start, first: its first query, and the first key that it sees.
    mask: what the layer is given. made: makes one, for attention that was given none and needs it. documents: what the
    mask means; None where that is not known, or where no kernel would read it. attended: how often the table was asked
    for attention, with the mask that the layer was given.
    """

    def __init__(
        self,
        causal: bool,
        corner: Corner,
        start: int,
        first: int,
        mask: Tensor | None,
        made: Callable[[], Tensor | None],
        documents: Documents | Shared | None,
    ) -> None:
        self.causal, self.corner, self.start, self.first = causal, corner, start, first
        self.mask, self.made, self.documents, self.attended = mask, made, documents, 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention by what the mask means."""
        assert self.documents is not None
        place = (self.start, self.first)
        if isinstance(self.documents, Shared):
            flash = on_accelerator(query)
            return attend_shared(query, key, value, scale, self.documents, *place, flash=flash)
        return attend(query, key, value, scale, self.documents, *place)


class _Current(threading.local):
    chunk: Chunk | None = None


_current = _Current()


def lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of `queries` at the end of `keys`: True where one sees the other."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def on_accelerator(tensor: Tensor) -> bool:
    """Whether a tensor is where a kernel is causal from the lower right."""
    return tensor.is_cuda


def halves(dtype: torch.dtype) -> bool:
    """Whether flash attention has kernels for a dtype."""
    return dtype in (torch.bfloat16, torch.float16)


def flash_takes(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel that is causal from the lower right can be called."""
    short = halves(query.dtype) and key.dtype == query.dtype
    dims = query.shape[-1] == value.shape[-1] <= FLASH_HEAD
    old = query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0)
    return on_accelerator(query) and short and dims and not old and dropout == 0.0


def takes(documents: Documents | Shared, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether there is a kernel for what a mask means."""
    if isinstance(documents, Documents) or on_accelerator(query):
        return flash_takes(query, key, value, dropout)
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and alike and dropout == 0.0


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    head = query.shape[-1]
    scale = head**-0.5 if scale is None else scale
    if missing := -head % 8:
        query, key, value = (F.pad(t, (0, missing)) for t in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]
    return out[..., :head] if missing else out


class _Attention:
    """The table's entry while chunks run, in whichever thread. In others it is the entry that was there."""

    def __init__(self, original: Callable[..., object]) -> None:
        self.original = original

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: object,
    ) -> object:
        chunk = _current.chunk
        if chunk is not None:
            chunk.attended += attention_mask is chunk.mask
            if chunk.documents is not None and attention_mask is chunk.mask:
                if kwargs.get("position_bias") is None and takes(chunk.documents, query, key, value, dropout):
                    return chunk.attend(query, key, value, scaling), None
                attention_mask = chunk.made() if attention_mask is None else attention_mask
            plain = attention_mask is None and chunk.causal
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if plain and not causal:
                raise ValueError(
                    f"{type(module).__name__} attends to later tokens, which a streamed layer has not computed yet. "
                    "Use lowmem_activations='checkpoint_fp8'."
                )
            if plain and kwargs.get("position_bias") is None and query.shape[2] < key.shape[2]:
                return self.cut(query, key, value, dropout, scaling, chunk.corner), None
        return self.original(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    def cut(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, corner: Corner
    ) -> Tensor:
        if flash_takes(query, key, value, dropout):
            out = _flash(query, key, value, scaling)
        else:
            out = _masked(query, key, value, dropout, scaling, corner)
        return out.transpose(1, 2).contiguous()


def _masked(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None, corner: Corner) -> Tensor:
    """Attention by blocks of queries, so that the corner which is computed in vain is small."""
    (rows, heads, queries, head), shared, keys = query.shape, key.shape[1], key.shape[2]
    # Heads that share keys are a dimension of their own, along which keys are seen and not repeated.
    of_group = rows * shared, heads // shared
    last_first = query.flip(2).reshape(*of_group, queries, head)
    key, value = (t.flatten(0, 1)[:, None].expand(*of_group, -1, -1) for t in (key, value))
    parts = []
    for start in reversed(range(0, queries, ROWS)):
        end = min(start + ROWS, queries)
        seen = keys - queries + end
        mask = corner.of(end - start, seen, query.dtype, query.device)
        block = last_first[:, :, queries - end : queries - start]
        parts.append(
            F.scaled_dot_product_attention(
                block, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, dropout_p=dropout, scale=scale
            )
        )
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return out.flip(2).reshape(rows, heads, queries, -1)


def table_of(module: str, name: str) -> MutableMapping[str, Callable[..., object]]:
    """One of transformers' tables of functions. A model of its has loaded it; nothing here needs it before."""
    return getattr(sys.modules[module], name)


class _Swap:
    """An entry that stands in another one's place. users: contexts that are open, in any thread."""

    def __init__(self, before: Callable[..., object], value: Callable[..., object]) -> None:
        self.before, self.value, self.users = before, value, 0


_swaps: dict[tuple[int, str], _Swap] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def swapped(
    table: MutableMapping[str, Callable[..., object]],
    name: str,
    make: Callable[[Callable[..., object]], Callable[..., object]],
) -> Iterator[None]:
    """A context in which a table has another entry, which is `make` of the one that it has. Contexts inside of it, and
    those of other threads, share that entry: the last to be left puts the old one back."""
    key = id(table), name
    with _lock:
        swap = _swaps.get(key)
        if swap is None:
            before = table[name]
            swap = _swaps[key] = _Swap(before, make(before))
            table[name] = swap.value
        swap.users += 1
    try:
        yield
    finally:
        with _lock:
            swap.users -= 1
            if not swap.users:
                del _swaps[key]
                if table.get(name) is swap.value:  # else somebody has put his own there
                    del table[name]
                    if table.get(name) is not swap.before:  # it was in no other layer of the table
                        table[name] = swap.before


@contextlib.contextmanager
def streaming(chunk: Chunk, implementation: str | None) -> Iterator[None]:
    """A context in which a layer runs on one chunk."""
    if implementation != "sdpa":
        yield
        return
    table = table_of("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
    outer, _current.chunk = _current.chunk, chunk
    try:
        with swapped(table, "sdpa", _Attention):
            yield
    finally:
        _current.chunk = outer
