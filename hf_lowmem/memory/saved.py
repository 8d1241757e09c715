"""Tensors that the forward pass saves for the backward pass, counted by module.

Counted from autograd's own saved-tensor hooks rather than from the allocator, because an allocator knows neither which
module asked nor, on a CPU, anything at all. What hooks cannot see is a tensor that reaches the backward pass by another
way: as an attribute of a custom Function's `ctx`, or in a closure, such as the keyword arguments of a checkpointed
layer. Nor do they see temporaries. For the sum of everything there is `measure_peak`.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from hf_lowmem.memory.count import human_bytes, storages, tensors_in
from hf_lowmem.patching import check_version, version_of

__all__ = ["OUTSIDE", "SavedReport", "measure_saved"]

OUTSIDE = "(outside any module)"


class _Kept:
    """The object that autograd holds in a saved tensor's place: it is deleted when the saved tensor would be.

    `__del__` may run inside any allocation, on any thread, hence it takes no lock: it leaves a note, and the
    report reads its notes before it counts.
    """

    __slots__ = ("gone", "keys", "value", "version")

    def __init__(self, value: Any, version: int | None, keys: list[int], gone: deque[list[int]]) -> None:
        self.value, self.version, self.keys, self.gone = value, version, keys, gone

    def __del__(self) -> None:
        self.gone.append(self.keys)


@dataclass(slots=True)
class _Entry:
    nbytes: int
    owner: str
    holders: int = 0


class SavedReport:
    """Bytes saved for the backward pass, as counted by `measure_saved`. Live inside it, frozen after it.

    total:          bytes kept now; after the context, at its end
    peak:           the largest total so far
    by_module:      name → bytes, at the peak; its values add up to `peak`
    by_module_now:  name → bytes, now; its values add up to `total`

    A storage belongs to the module that saved it first. `str(report)` is a table of the largest modules.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._names: dict[int, str] = {}
        self._weights: dict[int, Tensor] = {}
        if model is not None:
            self._names = {id(m): name or type(m).__name__ for name, m in model.named_modules()}
            self._weights = {k: t for t in [*model.parameters(), *model.buffers()] for k, _ in storages(t)}
        self._gone: deque[list[int]] = deque()
        self._entries: dict[int, _Entry] = {}
        self._live: Counter[str] = Counter()
        self._total = self._peak = 0
        self._at_peak: dict[str, int] = {}
        self._running = threading.local()
        self._lock = threading.RLock()  # backward, and with it recomputation, runs on autograd's own threads
        self._closed = False

    @property
    def total(self) -> int:
        """Bytes that are kept now."""
        with self._lock:
            self._settle()
            return self._total

    @property
    def peak(self) -> int:
        """The largest total so far."""
        with self._lock:
            self._settle()
            self._mark_peak()
            return self._peak

    @property
    def by_module(self) -> dict[str, int]:
        """Name → bytes, at the peak."""
        return dict(self._at_peak) if self.peak else {}

    @property
    def by_module_now(self) -> dict[str, int]:
        """Name → bytes, now."""
        with self._lock:
            self._settle()
            return self._shares()

    def table(self, rows: int | None = 20) -> str:
        """The modules that keep most at the peak, `rows` of them (None: all), and the sum."""
        items = sorted(self.by_module.items(), key=lambda item: -item[1])
        shown = items if rows is None else items[:rows]
        lines = [(name, human_bytes(n)) for name, n in shown]
        if rest := items[len(shown) :]:
            lines.append((f"({len(rest)} more)", human_bytes(sum(n for _, n in rest))))
        lines.append(("kept for backward, at the peak", human_bytes(self.peak)))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {size:>11}" for name, size in lines)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"SavedReport(total={self.total}, peak={self.peak})"

    def _mark_peak(self) -> None:
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, self._shares()

    def _shares(self) -> dict[str, int]:
        return {name: n for name, n in self._live.items() if n}

    def _settle(self) -> None:
        """Take away what has been freed. The peak is noted just before the first fall, not at every rise."""
        while self._gone and not self._closed:
            for key in self._gone.popleft():
                entry = self._entries[key]
                entry.holders -= 1
                if not entry.holders:
                    self._mark_peak()
                    self._total -= entry.nbytes
                    self._live[entry.owner] -= entry.nbytes
                    del self._entries[key]

    def _keep(self, tensor: Tensor, value: Any, version: int | None) -> _Kept:
        base = tensor._base
        if isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter):
            skip = {key for key, _ in storages(tensor)}
        else:
            skip = set()
        keys: list[int] = []
        with self._lock:
            # First the dead, then the new: a key is an address, and the allocator hands addresses out again.
            self._settle()
            for key, nbytes in dict(pair for t in tensors_in(_bare(value)) for pair in storages(t)).items():
                if key not in skip and not self._is_weight(key):
                    if key not in self._entries:
                        self._entries[key] = _Entry(nbytes, self._module())
                        self._total += nbytes
                        self._live[self._entries[key].owner] += nbytes
                    self._entries[key].holders += 1
                    keys.append(key)
        return _Kept(value, version, keys, self._gone)

    def _is_weight(self, key: int) -> bool:
        # Asked again because a sharded model may have moved the weight and left the address to somebody else.
        weight = self._weights.get(key)
        return weight is not None and any(key == k for k, _ in storages(weight))

    def _module(self) -> str:
        stack = getattr(self._running, "stack", None)
        return self._names.get(id(stack[-1]), type(stack[-1]).__name__) if stack else OUTSIDE

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not hasattr(self._running, "stack"):
            self._running.stack = []
        self._running.stack.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = getattr(self._running, "stack", [])
        if any(m is module for m in stack):  # not so for a module entered before the measuring began
            while stack.pop() is not module:
                pass

    def _hooks(
        self, pack: Callable[[Tensor], Any] | None = None, unpack: Callable[[Any], Tensor] | None = None
    ) -> tuple[Callable[[Tensor], _Kept], Callable[[_Kept], Tensor]]:
        """The pair of hooks that does what `pack` and `unpack` do (nothing, without them) and counts the
        result."""

        def counted_pack(tensor: Tensor) -> _Kept:
            if pack is None:
                # As autograd does: a leaf is kept itself, anything else without its grad_fn, which would
                # close a reference cycle where a node saves its own output. detach() shares storage and
                # version counter.
                value = tensor if tensor.is_leaf else tensor.detach()
                return self._keep(tensor, value, version_of(value))
            try:
                value = pack(tensor)
            except Exception:
                # Checkpointing ends a recomputation by raising from the pack of its last tensor, which it has
                # stored by then: the moment when most is kept.
                self._keep(tensor, tensor, None)
                raise
            return self._keep(tensor, value, None)

        def counted_unpack(kept: _Kept) -> Tensor:
            if unpack is not None:
                return unpack(kept.value)
            # With hooks on, autograd leaves out its own check for in-place changes.
            if kept.version is not None:
                check_version(kept.value, kept.version)
            return kept.value

        if pack is not None:  # so that `inspect.unwrap` finds whose hook this is
            counted_pack.__wrapped__ = pack
        else:  # for those who ask whether anybody else looks after saved tensors
            counted_pack.only_counts = True
        return counted_pack, counted_unpack

    def _close(self) -> None:
        with self._lock:
            self._settle()
            self._mark_peak()
            self._closed = True
        self._names, self._weights, self._entries = {}, {}, {}


def innermost_pack() -> Any:
    """The hook that autograd would ask now about a tensor to save, or None. A measuring wrapper is seen through."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    hook: Any = None if top is None else top[0]
    while (inner := getattr(hook, "__wrapped__", None)) is not None:
        hook = inner
    return hook


def _bare(value: Any) -> Any:
    while isinstance(value, _Kept):  # one measure_saved inside another
        value = value.value
    return value


@contextlib.contextmanager
def measure_saved(model: nn.Module | None = None) -> Iterator[SavedReport]:
    """Count the bytes that the code inside saves for its backward pass, per module.

        with measure_saved(model) as saved:
            loss = model(**batch).loss
        print(saved)            # saved.total, saved.peak, saved.by_module

    With `model`, its parameters and buffers are left out and modules go by their qualified names. Without,
    any nn.Parameter and any view of one is left out (not a buffer, nor a detached alias of a parameter) and
    modules go by class.

    The context may hold the forward pass alone, or backward as well: `total` then falls, while `peak`
    remembers. What a checkpointed layer recomputes in backward is saved again, so `peak` is then the
    checkpoints and one layer's worth, where `total` at the end of forward was the checkpoints alone.

    Results are bit-equal: nothing is copied, and changing a saved tensor in place is the error that it always
    is. Two differences remain, and both come with any saved-tensor hook: a custom Function gets an equal
    tensor but not the same Python object from `ctx.saved_tensors`, and `torch.func` transforms refuse to run.

    Other hooks stay in force, whether entered outside or inside (checkpointing, offload, compression): what
    *they* keep is counted, on whatever device. Autograd asks only the innermost hooks, so the `__enter__` of
    `saved_tensors_hooks` is wrapped for as long as the context is open. Per saved tensor this costs some
    microseconds; not for use in every step of a training."""
    report = SavedReport(model)
    hooks = torch.autograd.graph.saved_tensors_hooks
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    enter = hooks.__enter__

    def enter_counted(inner: Any) -> None:
        pack, unpack = report._hooks(inner.pack_hook, inner.unpack_hook)
        enter(SimpleNamespace(pack_hook=pack, unpack_hook=unpack))  # type: ignore[arg-type]

    with contextlib.ExitStack() as stack:
        stack.callback(report._close)
        autograd._push_saved_tensors_default_hooks(
            *report._hooks(*(autograd._top_saved_tensors_default_hooks(True) or ()))
        )
        stack.callback(autograd._pop_saved_tensors_default_hooks)
        hooks.__enter__ = enter_counted  # type: ignore[method-assign]
        stack.callback(setattr, hooks, "__enter__", enter)
        stack.callback(register_module_forward_pre_hook(report._enter_module).remove)
        stack.callback(register_module_forward_hook(report._leave_module, always_call=True).remove)
        yield report
