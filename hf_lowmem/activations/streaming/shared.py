"""Shared prompts: a run of tokens that follows another one than the one before it in its row, without a mask.

A pair of answers behind one prompt is a row `p p p c c r r`, in which `r` sees `p` and itself, and not `c`. So what a
query sees are two runs of keys: those of its own run up to itself, and all of the prompt's. Attention to each is one
call of a kernel that gives, beside its output, the log-sum-exp of its scores; and the attention to both is

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward is exact, too. A kernel makes its probabilities again, as exp(score - lse), and needs of the output its product
with the gradient alone. Given the lse and the output of *both*, each call's gradients are its part of the whole's:
those of queries add up, those of keys are its keys'.

Why not one call on the prompt's keys with the run's behind them: they do not stand beside each other, so each chunk
would copy keys and values of all tokens before it.

On a CUDA device a call is `torch.nn.attention.varlen`. On a CPU it is torch's own flash kernel, with a mask that is a
view of one line (as `attention.Corner` is) where a call needs one. No mask of queries x keys is made on either.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from hf_lowmem.activations.streaming.documents import GROUPED

__all__ = ["Part", "Run", "Shared", "attend_shared"]

ROWS = 1024  # queries in one call on a CPU, which computes half of a corner of so many in vain

varlen_backward = torch.ops.torch_attn._varlen_attn_backward

Grads = tuple[Tensor, Tensor, Tensor]


class Run(NamedTuple):
    """Tokens [begin, end) of a row, each of which sees those before it in the run, and the tokens [prompt, prompted),
    which stand right before `begin` by their positions, wherever they are in the row."""

    begin: int
    end: int
    prompt: int
    prompted: int


class Part(NamedTuple):
    """A call: queries [start, end) and keys [first, last) of a row. apart: how far the first query's position is behind
    the first key's. own: whether the keys are the queries' own run, and not their prompt."""

    row: int
    start: int
    end: int
    first: int
    last: int
    apart: int
    own: bool


class Shared:
    """Rows of runs, and how far back a query sees by positions.

    Args:
        rows: the runs of each row, one after another, from its first token to its last.
        window: keys that a query sees, itself among them; None for all.
    """

    def __init__(self, rows: Sequence[Sequence[Run]], window: int | None) -> None:
        self.rows, self.window = rows, window

    def parts(self, start: int, end: int, most: int) -> Iterator[Part]:
        """Calls for the queries [start, end) of all rows, of at most so many queries: of each query its own run first,
        and its prompt next where it sees any of it."""
        for row, runs in enumerate(self.rows):
            for run in runs:
                for a in range(max(run.begin, start), min(run.end, end), most):
                    yield from self._parts(row, run, a, min(run.end, end, a + most))

    def _parts(self, row: int, run: Run, a: int, b: int) -> Iterator[Part]:
        back = run.end if self.window is None else self.window - 1  # tokens before itself that a query sees
        first = max(run.begin, a - back)
        yield Part(row, a, b, first, b, a - first, own=True)
        into = back - (a - run.begin)  # keys of the prompt that the first query sees, and the next ones fewer
        last = b if self.window is None else min(b, a + into)
        if self.window is None:
            into = run.prompted - run.prompt
        first = max(run.prompt, run.prompted - into)
        if first < run.prompted and a < last:
            yield Part(row, a, last, first, run.prompted, a - run.begin + run.prompted - first, own=False)

    def starts(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The first key that each chunk of queries sees."""
        return [min(part.first for part in self.parts(start, end, end - start)) for start, end in spans]

    def limits(self, part: Part) -> tuple[int, int]:
        """A part's window as `varlen_attn` has it, where the last query stands at the last key: keys that a query sees
        to the left and to the right of its place; -1 for all."""
        behind = part.apart - (part.last - part.first - (part.end - part.start))  # how far it stands behind that place
        left = -1 if self.window is None else self.window - 1 - behind
        return left, 0 if part.own else -1

    def mask(self, part: Part, like: Tensor) -> Tensor | None:
        """The mask of a part with its last query first, a view of one line; None where each query sees each key."""
        queries, keys = part.end - part.start, part.last - part.first
        farthest = part.apart + queries - 1  # of the last query from the first key
        nearest = part.apart - (keys - 1)
        if nearest >= 0 and (self.window is None or farthest < self.window):
            return None
        line = like.new_full((queries + keys - 1,), float("-inf"))
        line[0 if self.window is None else max(0, farthest - self.window + 1) : farthest + 1] = 0
        return line.as_strided((queries, keys), (1, 1))


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, shared: Shared, start: int, first: int, flash: bool
) -> Tensor:
    """Attention of the queries from `start` on to the keys from `first` on, as (rows, queries, heads, dimension).

    Args:
        flash: whether to call the kernel for several lengths, and not a CPU's.
    """
    head = query.shape[-1]
    factor: float = head**-0.5 if scale is None else scale
    missing = -head % 8 if flash else 0
    if missing:
        query, key, value = (F.pad(t, (0, missing)) for t in (query, key, value))
    out = _Merged.apply(_Calls(shared, start, first, factor, flash), query, key, value)
    assert isinstance(out, Tensor)
    return out[..., :head] if missing else out


class _Calls:
    """The calls for a chunk, on tensors of one row as (heads, tokens, dimension)."""

    def __init__(self, shared: Shared, start: int, first: int, scale: float, flash: bool) -> None:
        self.shared, self.start, self.first, self.scale, self.flash = shared, start, first, scale, flash

    def parts(self, queries: int) -> Iterator[Part]:
        return self.shared.parts(self.start, self.start + queries, queries if self.flash else ROWS)

    def of(self, part: Part, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A part's queries of what is (rows, heads, queries, ...)."""
        return [t[part.row, :, part.start - self.start : part.end - self.start] for t in tensors]

    def seen(self, part: Part, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A part's keys of what is (rows, heads, keys, ...)."""
        return [t[part.row, :, part.first - self.first : part.last - self.first] for t in tensors]

    def forward(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp: (heads, queries, dimension) and (heads, queries)."""
        if self.flash:
            q, k, v = (t.transpose(0, 1) for t in (query, key, value))
            lengths, window = _lengths(part, q), self.shared.limits(part)
            out, lse = varlen_attn(
                q, k, v, *lengths, scale=self.scale, window_size=window, return_aux=AuxRequest(lse=True), **GROUPED
            )
            if lse.shape != query.shape[:2]:
                raise RuntimeError(
                    f"varlen_attn has returned log-sum-exps of shape {tuple(lse.shape)} for {tuple(query.shape[:2])} "
                    "heads and queries, so this version of torch cannot merge two calls. Leave "
                    "lowmem_share_prompt unset, or use lowmem_activations='checkpoint_fp8'."
                )
            return out.transpose(0, 1), lse
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_grouped(query, key, value), 0.0, False, attn_mask=self.shared.mask(part, query), scale=self.scale
        )
        return _as_before(out), _as_before(lse)

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Grads:
        """Gradients of queries, keys and values, from the output and the log-sum-exp of all calls."""
        if self.flash:
            of_queries, of_keys, *longest = _lengths(part, q)
            window = self.shared.limits(part)
            grads = varlen_backward(
                *(t.transpose(0, 1) for t in (grad, q, k, v, out)),
                lse.contiguous(),
                of_queries,
                of_keys,
                *longest,
                window == (-1, 0),
                torch.zeros(2, dtype=torch.uint64, device=q.device),  # of a dropout, which there is none of
                self.scale,
                list(window),
            )
            dq, dk, dv = (t.transpose(0, 1) for t in grads)
            return dq, dk, dv
        query, key, value = _grouped(q, k, v)
        grad, out, lse = (t.flip(1).view(*query.shape[:3], *t.shape[2:]) for t in (grad, out, lse))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=self.shared.mask(part, q), scale=self.scale
        )
        return _as_before(grads[0]), grads[1].sum(1), grads[2].sum(1)


def _lengths(part: Part, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    queries, keys = part.end - part.start, part.last - part.first
    ends = [torch.tensor([0, n], dtype=torch.int32, device=like.device) for n in (queries, keys)]
    return ends[0], ends[1], queries, keys


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> Grads:
    """Queries with the last one first. Heads that share keys are a dimension of their own, along which keys are seen
    and not repeated."""
    shared, (heads, queries, head) = len(key), query.shape
    group = heads // shared
    k, v = (t[:, None].expand(-1, group, -1, -1) for t in (key, value))
    return query.flip(1).reshape(shared, group, queries, head), k, v


def _as_before(tensor: Tensor) -> Tensor:
    """All heads in one dimension, and the first query first."""
    return tensor.flatten(0, 1).flip(1)


class Context(Protocol):
    """Place of what a chunk's attention leaves for its backward."""

    calls: _Calls
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Merged(torch.autograd.Function):
    """(calls, queries, keys, values) → attention, as (rows, queries, heads, dimension)."""

    @staticmethod
    def forward(ctx: Context, calls: _Calls, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, queries, head = query.shape
        out = query.new_empty(rows, queries, heads, head)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(rows, queries, heads, dtype=wide).transpose(1, 2)
        for part in calls.parts(queries):
            of_part, sums = calls.forward(part, *calls.of(part, [query]), *calls.seen(part, [key, value]))
            to, before = calls.of(part, [out.transpose(1, 2), lse])
            if part.own:
                to.copy_(of_part)
                before.copy_(sums)
                continue
            both = torch.logaddexp(before, sums)
            to.copy_(to * (before - both).exp()[..., None] + of_part * (sums - both).exp()[..., None])
            before.copy_(both)
        ctx.calls = calls
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        chunk = [grads[0].transpose(1, 2), out.transpose(1, 2), lse, query]
        for part in ctx.calls.parts(query.shape[2]):
            found = ctx.calls.backward(part, *ctx.calls.of(part, chunk), *ctx.calls.seen(part, [key, value]))
            (to,) = ctx.calls.of(part, [of_query])
            if part.own:
                to.copy_(found[0])
            else:
                to += found[0]
            for total, grad in zip(ctx.calls.seen(part, [of_key, of_value]), found[1:], strict=True):
                total += grad
        return None, of_query, of_key, of_value
