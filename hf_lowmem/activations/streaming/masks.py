"""Which keys a query sees, asked for by blocks of queries and keys, so that no tokens x tokens mask is ever made.

transformers composes a mask from functions of (row, head, query, key) - causal, window, documents of a packed row,
padding - and hands the composition to `ALL_MASK_ATTENTION_FUNCTIONS[implementation]`, which tabulates it. While a model
runs whose layers are all streamed, that maker is replaced by `Lazy`: it keeps the question, and tabulates only the
block that a chunk of queries asks for, by transformers' own maker with its own offsets. So a block is what the whole
mask has there, whatever the model means by it, also for `eager` attention, whose mask is added.

Why not a mask of our own from windows and `position_ids`: it would have to know what each family means by them, and a
family that means something else would get wrong numbers in silence.

A block begins at the first key that its queries see: keys before it are never read. With what transformers composes
that key can only move to the right from query to query (windows move, documents follow each other, padding takes keys
away), so a chunk's first query tells it. The mask of shared prompts tells its runs. A function of somebody else may do
as it likes: then the whole table is looked through, chunk by chunk, once for all layers. Of both others it is seen that
no chunk looks behind its end.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from hf_lowmem.activations.aside import reason_to_step_aside
from hf_lowmem.activations.checkpoint import Kwargs
from hf_lowmem.activations.fusable import is_fake
from hf_lowmem.activations.streaming.attention import swapped, table_of
from hf_lowmem.activations.streaming.documents import Documents, found_in
from hf_lowmem.activations.streaming.shared import Run, Shared
from hf_lowmem.patching import ForwardPatch

__all__ = ["Causal", "Dense", "Lazy", "Mask", "MaskMaker", "mask_of", "whole"]

MAKERS = "transformers.masking_utils"
Span = tuple[int, int]
Maker = Callable[..., object]
LOOKS_AHEAD = (
    "a layer attends to later tokens (its mask is not causal), which a streamed layer has not computed yet. Use "
    "lowmem_activations='checkpoint_fp8'."
)
LEFT_AND_EAGER = (
    "eager attention with left padding: a query that sees no key makes NaN of it, without a tier as well. Pad on the "
    "right, or load the model with attn_implementation='sdpa'."
)


class Causal:
    """Every query sees itself and all keys before it."""

    def starts(self, spans: Sequence[Span]) -> list[int]:
        """The first key that each chunk of queries sees."""
        return [0] * len(spans)

    def block(self, start: int, end: int, first: int) -> Tensor | None:
        """The mask of queries [start, end) and keys [first, end); None where there is none but the causal one."""
        return None


class Dense:
    """A mask that somebody has made whole."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def starts(self, spans: Sequence[Span]) -> list[int]:
        if not is_fake():
            if not _sees(self.mask[..., :1, :1]).all() and self.mask.is_floating_point():
                raise ValueError(LEFT_AND_EAGER)
            if any(_sees(self.mask[..., start:end, end:]).any() for start, end in spans):
                raise ValueError(LOOKS_AHEAD)
        return [0] * len(spans)

    def block(self, start: int, end: int, first: int) -> Tensor | None:
        return self.mask[..., start:end, first:end]


class Lazy:
    """A mask that nobody has made: the arguments with which transformers asks for it, and whom it asks."""

    def __init__(self, maker: Maker, asked: Kwargs) -> None:
        self.maker, self.asked = maker, asked
        self.shape = (asked["batch_size"], 1, asked["q_length"], asked["kv_length"])  # of the whole
        self.ndim = 4
        self._starts: dict[tuple[Span, ...], list[int]] = {}
        self._documents: list[Documents | None] = []  # one, once it is asked for
        self._shared: list[Shared | None] = []

    def starts(self, spans: Sequence[Span]) -> list[int]:
        key = tuple(spans)
        if key not in self._starts:
            self._starts[key] = self._find_starts(key)
        return self._starts[key]

    def _find_starts(self, spans: Sequence[Span]) -> list[int]:
        device, tokens = torch.device(self.asked["device"]), self.asked["kv_length"]
        if (shared := self.shared()) is not None:
            return shared.starts(spans)
        if is_fake():  # a planned batch is one document a row, without padding
            window = self.asked.get("local_size") or tokens
            return [max(0, start - window + 1) for start, _ in spans]
        if not self.is_transformers():
            return [self._first_seen(start, end) for start, end in spans]
        keys = torch.arange(tokens, device=device)
        firsts, lasts = torch.tensor(spans, device=device).unbind(1)
        ahead = self._sees(lasts - 1, keys) & (keys[None] >= lasts[:, None])
        seen = self._sees(firsts, keys).flatten(0, -3).any(0)  # (chunks, tokens), of any row
        found = torch.where(seen.any(-1), seen.int().argmax(-1), firsts).tolist()
        if ahead.any():
            raise ValueError(LOOKS_AHEAD)
        return [min(first, start) for first, (start, _) in zip(found, spans, strict=True)]

    def shared(self) -> Shared | None:
        """The runs of rows whose prompts are shared; None where it is another mask. Such a mask tells them by itself:
        it is `hf_lowmem.preference.sharing`'s."""
        if not self._shared:
            function = self.asked["mask_function"]
            runs = getattr(function, "longest_runs" if is_fake() else "runs", None)
            rows = None if runs is None else [[Run(*run) for run in row] for row in runs()]
            self._shared.append(None if rows is None else Shared(rows, function.window))
        return self._shared[0]

    def documents(self) -> Documents | None:
        """The documents and the window that it means; None where it is another mask, as with padding."""
        if not self._documents:
            self._documents.append(self._find_documents())
        return self._documents[0]

    def _find_documents(self) -> Documents | None:
        rows, tokens, device = self.asked["batch_size"], self.asked["kv_length"], torch.device(self.asked["device"])
        if is_fake():
            return Documents([[0]] * rows, self.asked.get("local_size"), device)
        padding = self.asked.get("attention_mask")
        if not self.is_transformers() or (padding is not None and not bool(padding.all())):
            return None
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        return found_in(lambda row, q, k: self.asked["mask_function"](row, head, q, k), rows, tokens, device)

    def is_transformers(self) -> bool:
        """Whether the function is one that transformers has composed, of its own parts."""
        at = self.asked["mask_function"]
        return not self.asked.get("use_vmap") and getattr(at, "__module__", None) == MAKERS

    def _first_seen(self, start: int, end: int) -> int:
        """The first key that a query in [start, end) sees, by looking at all of them."""
        seen = _sees(self._table(start, end, 0, self.asked["kv_length"])).flatten(0, -2).any(0)
        if seen[end:].any():
            raise ValueError(LOOKS_AHEAD)
        return min(int(seen.int().argmax()), start) if seen.any() else start

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each query sees each key: (rows, 1, queries, keys)."""
        at, padding = self.asked["mask_function"], self.asked.get("attention_mask")
        rows, head = torch.arange(self.asked["batch_size"], device=keys.device), torch.arange(1, device=keys.device)
        b, h, q, k = rows[:, None, None, None], head[None, :, None, None], queries[:, None], keys
        seen = at(b, h, q, k).expand(len(rows), 1, len(queries), len(keys))
        return seen if padding is None else seen & padding.to(torch.bool)[:, None, None, :]

    def _table(self, start: int, end: int, first: int, last: int) -> Tensor:
        place = {"q_offset": start, "q_length": end - start, "kv_offset": first, "kv_length": last - first}
        table = self.maker(**{**self.asked, **place, "allow_is_causal_skip": False})
        assert isinstance(table, Tensor)
        return table

    def block(self, start: int, end: int, first: int) -> Tensor | None:
        return self._table(start, end, first, end)

    def whole(self) -> Tensor:
        """The whole mask, for a layer that is not streamed after all."""
        return self._table(0, self.asked["q_length"], 0, self.asked["kv_length"])

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a streamed model's attention mask has no {name!r}: it is made by chunks of tokens, and this model looks "
            "at the whole. Use lowmem_activations='checkpoint_fp8'."
        )


Mask = Causal | Dense | Lazy


def _sees(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def mask_of(given: object, implementation: str | None, what: str) -> Mask:
    """The mask that a layer was given.

    Raises:
        ValueError: for one of another form; `what` names the layer.
    """
    if isinstance(given, Lazy):
        return given
    if given is None and implementation != "eager":
        return Causal()
    if isinstance(given, Tensor) and given.ndim == 4:
        return Dense(given)
    form = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__}"
    raise ValueError(
        f"{what} is streamed and was given an attention mask {form} with attn_implementation={implementation!r}: only "
        "four-dimensional masks, and with 'sdpa' none, can be cut into chunks. Use "
        "lowmem_activations='checkpoint_fp8'."
    )


def whole(given: object) -> object:
    """Argument for a layer that is not streamed after all: a `Lazy` mask is made whole."""
    return given.whole() if isinstance(given, Lazy) else given


class _Asking(threading.local):
    active = False
    shared = False  # only for masks that say which runs of tokens see each other, as those of shared prompts do


_asking = _Asking()


class _Maker:
    """The table's entry while a streamed model runs: in the thread that runs it, a maker of lazy masks."""

    def __init__(self, maker: Maker, implementation: str) -> None:
        self.maker, self.implementation = maker, implementation

    def __call__(self, *args: object, **given: object) -> object:
        asked: Kwargs = given
        tokens = asked.get("kv_length")
        square = asked.get("q_length") == tokens and not (asked.get("q_offset", 0) or asked.get("kv_offset", 0))
        said = isinstance(asked.get("attention_mask"), Lazy) or hasattr(asked.get("mask_function"), "runs")
        other = _asking.shared and not said
        if args or not _asking.active or other or not square or asked.get("allow_is_bidirectional_skip"):
            return self.maker(*args, **asked)
        padding, window = asked.get("attention_mask"), asked.get("local_size")
        if isinstance(padding, Lazy):  # somebody has asked for a mask of his own before
            return padding
        padded = padding is not None and not is_fake() and not bool(padding.all())
        wide = tokens is not None and (window or tokens) >= tokens
        if self.implementation == "eager":
            if padding is not None and padded and not bool(padding[:, 0].all()):
                raise ValueError(LEFT_AND_EAGER)
        elif asked.get("allow_is_causal_skip", True) and not padded and wide:
            return None
        return Lazy(self.maker, {"device": "cpu", **asked})


class MaskMaker(ForwardPatch):
    """The forward of a module that makes the masks of a list of layers, all of which are streamed."""

    def __init__(self, module: nn.Module, implementation: str) -> None:
        super().__init__(module)
        self.implementation = implementation

    @torch.compiler.disable(reason="masks of streamed layers are made by eager code")
    def __call__(self, *args: object, **kwargs: object) -> object:
        passes = not torch.is_grad_enabled()  # of a reference or an evaluation: by chunks where prompts are shared
        if not (self.module.training or passes) or reason_to_step_aside() is not None:
            return self.original(*args, **kwargs)
        with _lazy_masks(self.implementation, shared=passes):
            return self.original(*args, **kwargs)


@contextlib.contextmanager
def _lazy_masks(implementation: str, shared: bool) -> Iterator[None]:
    makers = table_of(MAKERS, "ALL_MASK_ATTENTION_FUNCTIONS")
    outer = _asking.active, _asking.shared
    _asking.active, _asking.shared = True, shared
    try:
        with swapped(makers, implementation, partial(_Maker, implementation=implementation)):
            yield
    finally:
        _asking.active, _asking.shared = outer
