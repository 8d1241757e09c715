"""The gradient of an output head's weight, a block of vocabulary rows at a time.

TRL's fused head never builds logits, but its backward pass makes the gradient of the whole weight, in fp32, and a copy
in the weight's dtype: 3 GiB for a vocabulary of 128,256 and 4,096 columns, which is the peak of a step that keeps
little else. Both are sums over tokens, so a block of rows is complete when all tokens were seen:

```python
for rows in blocks of the vocabulary:
    block = 0                                             # fp32, at most BLOCK_BYTES
    for tokens in tiles:
        tile = gradient of logits[tokens, rows]           # TRL's kernel
        grad_hidden[tokens] += tile @ weight[rows]
        block += tile.T @ hidden[tokens]
    done(rows, block)                                     # which may change weight[rows]
```

TRL's loops are the other way round, with the same products and, for each value, the same order of sums. So blocks of as
many rows as TRL's tile has columns, or of the whole vocabulary, have its bits.

`grad_hidden` is a sum over the blocks, and so exists in fp32, twice the size of the hidden states in bf16. Of many
tokens it is made in a pass of its own, before the blocks: with tokens outside, the sums of a tile are complete, and
written in the hidden states' dtype, before the next begins. Those are TRL's bits, for one more product of four. Where
one block holds the whole vocabulary, or the weight is frozen, tokens are outside anyway.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from trl.kernels import chunked_logprob

from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT

__all__ = [
    "BLOCK_BYTES",
    "SUM_BYTES",
    "Context",
    "Saved",
    "Sums",
    "by_blocks",
    "of_hidden",
    "rows_of_block",
    "stays_finite",
]

BLOCK_BYTES = 2**29  # of a block in fp32
SUM_BYTES = 2**30  # of the hidden states' gradient in fp32, at most: 65,536 tokens of 4,096 values


class Context(Protocol):
    """Context of TRL's autograd function, as its backward pass finds it."""

    saved_tensors: tuple[Tensor, ...]  # Saved: to be read once, as a tensor that was changed since cannot be
    needs_input_grad: tuple[bool, ...]
    compute_dtype: torch.dtype
    chunk_size: int
    kernel_args: Mapping[str, float]


class Saved(NamedTuple):
    """The tensors among it: N positions of H values, a vocabulary of V."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    log_z: Tensor  # (N,)
    entropy: Tensor  # (N,)


class Sums(NamedTuple):
    """Gradients that are summed over all blocks; None for what needs none."""

    hidden: Tensor | None  # of the hidden states' dtype
    bias: Tensor | None  # fp32


def rows_of_block(weight: Tensor, tile: int, unit: int = 1) -> int:
    """Rows of a block: as many as TRL's tile has columns, halved until fp32 takes no more than BLOCK_BYTES, and a
    multiple of `unit`; all that there are, where that is more."""
    rows = tile
    while rows > 1 and rows * weight.shape[1] * 4 > BLOCK_BYTES:
        rows //= 2
    return min(max(rows // unit, 1) * unit, weight.shape[0])


def of_hidden(ctx: Context, saved: Saved, grads: tuple[Tensor | None, Tensor | None]) -> Sums:
    """The gradients of hidden states and bias alone: what is there for a frozen weight."""
    return _sums(ctx, saved, grads, len(saved.weight), ctx.needs_input_grad[::2], None)


def by_blocks(
    ctx: Context,
    saved: Saved,
    grads: tuple[Tensor | None, Tensor | None],
    rows: int,
    room: Callable[[int, int], Tensor],
    done: Callable[[int, Tensor], object],
) -> Sums:
    """Make the gradient of the weight in blocks of `rows`; see the module.

    Args:
        grads: of the log-probabilities and of the entropies, (N,), where there are any.
        room: from the first and the last row to zeros in fp32, for a block.
        done: takes the first row and a complete block.
    """
    hidden, bias = ctx.needs_input_grad[::2][:2]
    if not hidden or rows >= len(saved.weight) or saved.hidden.numel() * 4 <= SUM_BYTES:
        return _sums(ctx, saved, grads, rows, (hidden, bias), (room, done))
    first = _sums(ctx, saved, grads, len(saved.weight), (True, False), None)  # before a block may be stepped
    return first._replace(bias=_sums(ctx, saved, grads, rows, (False, bias), (room, done)).bias)


def _sums(
    ctx: Context,
    saved: Saved,
    grads: tuple[Tensor | None, Tensor | None],
    rows: int,
    needed: Sequence[bool],
    blocks: tuple[Callable[[int, int], Tensor], Callable[[int, Tensor], object]] | None,
) -> Sums:
    """One pass over the blocks. `needed`: whether gradients of hidden states and bias are; `blocks`: `room` and `done`,
    None where the weight's is not."""
    hidden, weight, bias, targets, log_z, entropy = saved
    columns = targets, log_z, entropy, *(None if g is None else g.float().contiguous() for g in grads)
    most, width = chunked_logprob.TOKEN_CHUNK_SIZE, min(ctx.chunk_size, rows)
    tiles = torch.empty((min(len(hidden), most), width), dtype=ctx.compute_dtype, device=hidden.device)
    of_hidden = _HiddenSums(hidden, whole=rows < len(weight)) if needed[0] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[1] else None
    for first in range(0, len(weight), rows):
        last = min(first + rows, len(weight))
        block = None if blocks is None else blocks[0](first, last)
        for begin in range(0, len(hidden), most):
            tokens = slice(begin, min(begin + most, len(hidden)))
            here = hidden[tokens].to(ctx.compute_dtype)
            of_tokens = [None if c is None else c[tokens] for c in columns]
            sums = None if of_hidden is None else of_hidden.begin(tokens)
            for start in range(first, last, width):
                stop = min(start + width, last)
                old = weight[start:stop].to(ctx.compute_dtype)
                tile = tiles[: len(here), : stop - start]
                torch.mm(here, old.t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start:stop].to(ctx.compute_dtype))
                _logits_gradient(ctx, tile, start, of_tokens)
                if sums is not None:
                    chunked_logprob._addmm_fp32(sums, tile, old)
                if block is not None:
                    chunked_logprob._addmm_fp32(block[start - first : stop - first], tile.t(), here)
                if of_bias is not None:
                    of_bias[start:stop] += tile.sum(dim=0, dtype=torch.float32)
            if of_hidden is not None:
                of_hidden.end(tokens)
        if block is not None and blocks is not None:
            blocks[1](first, block)
    return Sums(None if of_hidden is None else of_hidden.result(), of_bias)


class _HiddenSums:
    """The gradient of the hidden states: fp32 sums of all tokens (`whole`), or of a tile, which is then written."""

    def __init__(self, hidden: Tensor, whole: bool) -> None:
        self.dtype, fp32 = hidden.dtype, torch.float32
        self.whole = whole or hidden.dtype == fp32
        if self.whole:
            self.gradient = torch.zeros_like(hidden, dtype=fp32)
        else:
            self.gradient = torch.empty_like(hidden)
            shape = min(len(hidden), chunked_logprob.TOKEN_CHUNK_SIZE), hidden.shape[1]
            self.tile = torch.empty(shape, dtype=fp32, device=hidden.device)

    def begin(self, tokens: slice) -> Tensor:
        """Where to add up what these tokens get."""
        return self.gradient[tokens] if self.whole else self.tile[: tokens.stop - tokens.start].zero_()

    def end(self, tokens: slice) -> None:
        """Take what was added for these tokens in one block."""
        if not self.whole:
            self.gradient[tokens] = self.tile[: tokens.stop - tokens.start]

    def result(self) -> Tensor:
        return self.gradient.to(self.dtype)


def _logits_gradient(ctx: Context, tile: Tensor, start: int, of_tokens: list[Tensor | None]) -> None:
    """Overwrite a tile of logits, whose first column is the entry `start` of the vocabulary, with the loss's gradient.

    Args:
        of_tokens: targets, log-sums, entropies, and the gradients of log-probabilities and entropies; (tokens,) each.
    """
    targets, log_z, entropy, of_logps, of_entropy = of_tokens
    count = tile.shape[1]
    block = chunked_logprob._BLOCK_SIZE
    run: Callable[..., object] = chunked_logprob._backward_tile
    if chunked_logprob._use_triton(tile.device):
        kernel = cast(Mapping[tuple[int, int], Callable[..., object]], chunked_logprob._backward_kernel)
        run = kernel[len(tile), -(-count // block)]
    run(
        tile,
        tile.stride(0),
        targets,
        log_z,
        entropy,
        log_z if of_logps is None else of_logps,  # never read where there is none
        log_z if of_entropy is None else of_entropy,
        start,
        count,
        HAS_LOGPROB_GRAD=of_logps is not None,
        HAS_ENTROPY_GRAD=of_entropy is not None,
        BLOCK_SIZE=block,
        **ctx.kernel_args,
    )


def stays_finite(ctx: Context, saved: Saved, grads: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Whether the gradient of the weight is sure to be finite and far below 1e15: a bool on the device, before it is
    made.

    Row v of it is the sum over tokens t of c * (g * (1[v is t's target] - p) - e * p * (log p + H)) * hidden, where g
    and e are the gradients of t's log-probability and entropy H, p is v's probability, and c the scale of the logits.
    p is at most 1, up to a rounding that the factor 2 covers, where the log-sum that it is computed from is finite;
    and p * |log p| is below 1.
    """
    if not len(saved.hidden):
        return torch.ones((), dtype=torch.bool, device=saved.hidden.device)
    low, high = torch.aminmax(saved.hidden)
    of_logps, of_entropy = grads
    size = torch.zeros((), dtype=torch.float32, device=low.device)
    if of_logps is not None:
        size = size + of_logps.float().abs().sum()
    if of_entropy is not None:
        size = size + of_entropy.float().abs().sum() * (1 + saved.entropy.abs().amax())
    scale = abs(ctx.kernel_args["logit_scale"] * ctx.kernel_args["inv_t"])
    bound = torch.maximum(-low, high).float() * size * (2 * scale)
    return (bound < LARGEST_GRADIENT / 2) & saved.log_z.isfinite().all()  # False for NaN too
