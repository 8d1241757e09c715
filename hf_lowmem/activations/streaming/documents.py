"""Documents and windows, where a mask means those: which keys a chunk's queries see, without a mask.

A packed row is several documents, of which each sees itself alone, and a sliding window lets a query see the last W
keys. In both, what a query sees are the keys from some place on up to itself. So the queries of a chunk, cut where a
document begins, and behind each piece its keys from the first that it sees on, are what a kernel for sequences of
several lengths takes (`torch.nn.attention.varlen`), whose causality is from the lower right: the last query of a piece
sees its last key. Nothing of chunk x keys is made, and keys of other documents are not read.

A mask is a function of (row, head, query, key), and nobody says what it means. So a meaning is guessed from a few of
its values, and then compared with all of them, by blocks, once a forward pass. Where one value differs, there is none.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from hf_lowmem.activations.checkpoint import Kwargs

__all__ = ["Documents", "Piece", "attend", "found_in"]

BLOCK = 2**25  # values of a mask that are compared at once
# Heads may share keys in every version; later ones want it said.
GROUPED: Kwargs = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
Sees = Callable[[Tensor, Tensor, Tensor], Tensor]


class Piece(NamedTuple):
    """A row's queries in a chunk, by documents.

    first: key that they see. of_queries, of_keys: where documents begin and end, counted from the chunk's first query,
    and from `first`. queries, keys: of the longest.
    """

    first: int
    of_queries: Tensor
    of_keys: Tensor
    queries: int
    keys: int


class Documents:
    """Rows of documents, and how far back a query sees in its own.

    Args:
        begins: of each row, the first tokens of its documents, in order.
        window: keys that a query sees, itself among them; None for all of its document.
        device: of the tensors of a `Piece`.
    """

    def __init__(self, begins: list[list[int]], window: int | None, device: torch.device) -> None:
        self.begins, self.window, self.device = begins, window, device
        self._pieces: dict[tuple[int, int], list[Piece]] = {}

    def pieces(self, start: int, end: int) -> list[Piece]:
        """Pieces of each row for the queries [start, end)."""
        if (start, end) not in self._pieces:
            self._pieces[start, end] = [self._piece(begins, start, end) for begins in self.begins]
        return self._pieces[start, end]

    def _piece(self, begins: list[int], start: int, end: int) -> Piece:
        cuts = [start, *(at for at in begins if start < at < end), end]
        document = max(at for at in begins if at <= start)
        first = document if self.window is None else max(document, start - self.window + 1)
        of_queries, of_keys = [at - start for at in cuts], [0, *(at - first for at in cuts[1:])]
        queries, keys = (torch.tensor(ends, dtype=torch.int32, device=self.device) for ends in (of_queries, of_keys))
        return Piece(first, queries, keys, _longest(of_queries), _longest(of_keys))


def _longest(ends: list[int]) -> int:
    return max(b - a for a, b in pairwise(ends))


def found_in(sees: Sees, rows: int, tokens: int, device: torch.device) -> Documents | None:
    """Meaning of a mask; None where it is something else than documents and a window.

    Args:
        sees: the mask, as a function of tensors (rows, 1, queries, keys) that are broadcast: of rows, queries, keys.
        rows, tokens: of the whole.
        device: on which it is asked.
    """
    row, token = torch.arange(rows, device=device), torch.arange(tokens, device=device)
    begins = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    later = token[1:, None]
    begins[:, 1:] = ~sees(row[:, None, None, None], later, later - 1).expand(rows, 1, tokens - 1, 1)[:, 0, :, 0]
    document = torch.where(begins, token, 0).cummax(1).values  # of each token, where its document begins
    length = (token - document).flatten()
    longest = int(length.argmax())
    of_row, last, most = longest // tokens, longest % tokens, int(length[longest]) + 1
    inside = torch.arange(last - most + 1, last + 1, device=device)
    seen = sees(row[of_row, None, None, None], inside[:, None], inside[:1]).expand(1, 1, most, 1)
    window = int(seen.sum())
    first = document if window == most else torch.maximum(document, token - window + 1)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    for queries in token.split(max(1, BLOCK // (rows * tokens))):
        found = sees(row[:, None, None, None], queries[:, None], token).expand(rows, 1, len(queries), tokens)
        meant = (token <= queries[:, None]) & (token >= first[:, None, queries, None])
        wrong |= (found != meant).any()
    if wrong:
        return None
    return Documents([line.nonzero()[:, 0].tolist() for line in begins], None if window == most else window, device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, documents: Documents, start: int, first: int
) -> Tensor:
    """Attention of the queries from `start` on to the keys from `first` on, as (rows, queries, heads, dimension)."""
    head = query.shape[-1]
    scale = head**-0.5 if scale is None else scale
    if missing := -head % 8:
        query, key, value = (F.pad(t, (0, missing)) for t in (query, key, value))
    window = (-1, 0) if documents.window is None else (documents.window - 1, 0)
    outs = []
    pieces = documents.pieces(start, start + query.shape[2])
    for piece, *tensors in zip(pieces, *map(_rows, (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1) for t in tensors)
        if behind := piece.first - first:
            k, v = k[behind:], v[behind:]
        lengths = (piece.of_queries, piece.of_keys, piece.queries, piece.keys)
        outs.append(varlen_attn(q, k, v, *lengths, scale=scale, window_size=window, **GROUPED))
    out = torch.stack(outs) if len(outs) > 1 else outs[0][None]
    return out[..., :head] if missing else out


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Its rows: of one, without a copy of the gradient either."""
    return (tensor.squeeze(0),) if len(tensor) == 1 else tensor.unbind()
