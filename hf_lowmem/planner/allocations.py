"""Bytes that are alive at a time, and what they are: a log of every storage that an operator makes.

A storage is born when the first tensor on it comes out of an operator, and dies when nothing refers to it any more,
which a weak reference tells. Views and aliases share their storage and so count once. Nothing is decided while the step
runs: each storage gets one row (birth, death, bytes, where it was made), and only afterwards, when it is known what
became of it, is it called a gradient, a state or a saved activation. A tensor that is alive when the forward pass ends
is saved for backward, one that is not was a temporary; at its birth nobody can tell.

Why not `torch.distributed._tools.mem_tracker.MemTracker`: it decides at birth (an optimizer's temporaries are states to
it, and whatever a forward pass makes is an activation), counts by snapshots of every module, and cannot be asked for
another moment afterwards.

It works on fake tensors, which have storages of the real size and no memory, and on real ones. What an operator
allocates and frees inside itself does not pass a dispatcher and is not seen, but for those in `SEEN_THROUGH`.
"""

import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from hf_lowmem import activations, optim, training
from hf_lowmem.planner import flash, four_bit
from hf_lowmem.preference import sharing

__all__ = ["INSTEAD", "CannotSimulate", "Live"]

# Operators whose temporaries count, and what shows them.
SEEN_THROUGH = four_bit.SEEN_THROUGH  # itself: accelerator.py adds to it for a while
SEEN_THROUGH[flash.BACKWARD] = flash.backward_in_steps
SEEN_THROUGH[flash.OF_DOCUMENTS] = flash.backward_of_documents
INDEX = torch.ops.aten.index.Tensor
READ_A_NUMBER = torch.ops.aten._local_scalar_dense.default

# Code of the trainer that reads numbers from tensors: to log them, or to look whether a loss is finite. None of it
# steers what is allocated. "transformers.masking_utils" asks whether a batch is padded, which a planned one is not.
READS_TO_REPORT = ("transformers.trainer", "transformers.masking_utils", "trl.trainer.", "accelerate.")
MARKED = "hf_lowmem planner: made by module"
INSTEAD = "The model cannot be planned; measure a short run with LowMemCallback instead."
NO_SHAPE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
ASKS_FOR_DOCUMENTS = "find_packed_sequence_indices"  # of transformers.masking_utils: does each row hold one only?
SELECTS = ("trl.trainer.",)
OURS = (training.__name__, optim.__name__, sharing.__name__)
# Code that draws or scales random values by a number, whatever it is.
SEEDS = ("transformers.integrations.neftune", activations.__name__)


class CannotSimulate(RuntimeError):
    """The step does something that depends on the values of tensors, or that has no shape rule."""


class Live(TorchDispatchMode):
    """Logs storages while it is the innermost dispatch mode.

    births, deaths: the clock's reading; it ticks at each birth and each death. A death of -1: still alive.
    sizes:    bytes
    owners:   index in `places` of where the storage was made: (phase, module)
    widths:   last dimension of the first tensor on it, 0 for integers; what tells logits
    marks:    (clock, phase) where a phase begins
    host:     bytes in host memory at once, at most; its tensors are on the meta device (see accelerator.py), and no row
    """

    def __init__(self, *, invent_numbers: bool, documents: bool = False) -> None:
        """`documents`: whether rows hold several, which attention must keep apart."""
        super().__init__()
        self.invent_numbers, self.documents = invent_numbers, documents
        self.clock = 0
        self.births: list[int] = []
        self.deaths: list[int] = []
        self.sizes: list[int] = []
        self.owners: list[int] = []
        self.widths: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.recomputed: list[tuple[int, int]] = []
        self.host = self._host = 0
        self._of_host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.places: list[tuple[str, str]] = [("", "")]
        self._place_of = {("", ""): 0}
        self._phase, self._module, self._place = "", "", 0
        self._stacks: dict[int, list[str]] = {}  # by thread: passes may run side by side
        self._began, self._before = 0, ""
        self._names: dict[int, str] = {}
        self._rows: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._hooks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.invent_numbers and func is READ_A_NUMBER:
            return self._invent(args[0])
        if func in SEEN_THROUGH:
            super().__enter__()  # again, since a mode is off while it handles an operator
            try:
                return SEEN_THROUGH[func](*args, **(kwargs or {}))
            finally:
                super().__exit__(None, None, None)
        try:
            out = self._select(*args) if self.invent_numbers and func is INDEX else None
            if out is None:
                out = func(*args, **(kwargs or {}))
        except NO_SHAPE as error:  # here, as long as it is known where
            raise CannotSimulate(
                f"{func} {self._here()}: its result has a shape or a value that only a real run has "
                f"({type(error).__name__}). {INSTEAD}"
            ) from error
        except RuntimeError as error:
            if not self.invent_numbers or isinstance(error, CannotSimulate):
                raise
            raise CannotSimulate(f"{func} {self._here()}: {error} {INSTEAD}") from error
        if isinstance(out, Tensor):
            self._see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._see(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta":
            self._see_host(key, storage)
            return
        if key in self._rows:
            return
        row = len(self.births)
        self.clock += 1
        self.births.append(self.clock)
        self.deaths.append(-1)
        self.sizes.append(storage.nbytes())
        self.owners.append(self._place)
        self.widths.append(tensor.shape[-1] if tensor.dim() and tensor.is_floating_point() else 0)

        def gone(_: Any, key: int = key, row: int = row) -> None:
            self.clock += 1
            self.deaths[row] = self.clock
            del self._rows[key]

        self._rows[key] = row, weakref.ref(storage, gone)

    def _see_host(self, key: int, storage: torch.UntypedStorage) -> None:
        if key in self._of_host:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self._host -= size
            del self._of_host[key]

        self._of_host[key] = weakref.ref(storage, gone)
        self._host += size
        self.host = max(self.host, self._host)

    def row_of(self, tensor: Tensor) -> int | None:
        """The row of a tensor's storage, None for one that was made elsewhere."""
        found = self._rows.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def rows_of(self, tensors: Iterable[Tensor]) -> set[int]:
        return {row for t in tensors if (row := self.row_of(t)) is not None}

    def events(self, first: int, began: int) -> list[tuple[int, int, int]] | None:
        """Births and deaths since the clock was `began` and there were `first` rows: (bytes, width, -1) for a
        birth, and (0, 0, row after `first`) for a death. None where a row outlives it, or one of before has died."""
        rows = range(first, len(self.births))
        found = {self.births[row]: (self.sizes[row], self.widths[row], -1) for row in rows}
        found |= {self.deaths[row]: (0, 0, row - first) for row in rows}
        return [found[at] for at in sorted(found)] if found.keys() == set(range(began + 1, self.clock + 1)) else None

    def repeat(self, events: list[tuple[int, int, int]]) -> None:
        """The same again, here and now."""
        first = len(self.births)
        for size, width, row in events:
            self.clock += 1
            if row >= 0:
                self.deaths[first + row] = self.clock
                continue
            for column, value in zip(
                (self.births, self.deaths, self.sizes, self.owners, self.widths),
                (self.clock, -1, size, self._place, width),
                strict=True,
            ):
                column.append(value)

    def phase(self, name: str) -> None:
        """A new part of the step begins."""
        self.marks.append((self.clock, name))
        self._phase = name
        self._at("")

    def _at(self, module: str) -> None:
        self._module = module
        place = self._phase, module
        index = self._place_of.get(place)
        if index is None:
            index = self._place_of[place] = len(self.places)
            self.places.append(place)
        self._place = index

    def watch(self, model: nn.Module, prefix: str = "") -> None:
        """Call the places of `model` by its modules' names, in its forward passes and in backward."""
        self._names |= {id(m): prefix + name for name, m in model.named_modules()}
        if not self._hooks:
            self._hooks = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]

    @property
    def _stack(self) -> list[str]:
        """Names of the modules that are being run, the innermost last."""
        return self._stacks.setdefault(threading.get_ident(), [])

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            if not self._stack:
                self._began, self._before = self.clock, self._module
            self._stack.append(name)
            self._at(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None or not self._stack:
            return
        self._stack.pop()
        again = self._phase == "backward"  # a checkpoint's second forward pass, inside the layer's backward
        self._at(self._stack[-1] if self._stack else self._before if again else "")
        if not self._stack and again:
            self.recomputed.append((self._began, self.clock))
        if self._phase == "forward":
            outputs = tree_leaves(output if isinstance(output, Tensor | tuple | list) else list(vars(output).values()))
            for out in outputs:
                if isinstance(out, Tensor) and out.grad_fn is not None:
                    # In backward nothing calls modules; the node that made a module's output is the first of it to run.
                    _mark(out.grad_fn, self, name)

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().__exit__(*exc)

    def _invent(self, tensor: Tensor) -> bool | int | float:
        """A number for code that only reports it. True is also what makes the trainer's tests pass: the loss is
        finite, the batch is not padded, a gradient is finite."""
        frame = _caller()
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        seeds = module.startswith(SEEDS) and tensor.dtype is not torch.bool
        if not seeds and not module.startswith(READS_TO_REPORT + OURS):
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown code"
            raise CannotSimulate(
                f"aten._local_scalar_dense (.item(), bool() or int() of a tensor) {self._here()}, at {where}: what "
                f"runs next depends on a number that only a real run has. {INSTEAD}"
            )
        if tensor.dtype is torch.bool:
            return not (self.documents and frame is not None and frame.f_code.co_name == ASKS_FOR_DOCUMENTS)
        return 1.0 if tensor.is_floating_point() else 1

    def _select(self, values: Tensor, indices: list[Tensor | None]) -> Tensor | None:
        """`values[mask]` in the trainer's code, every entry of the mask being true: nothing of a full batch is padding
        or prompt. None for any other indexing, and in a model, where the entries would have to be known."""
        mask = indices[0]
        if len(indices) != 1 or mask is None or mask.dtype is not torch.bool:
            return None
        frame = _caller()
        if frame is None or not frame.f_globals.get("__name__", "").startswith(SELECTS):
            return None
        return values.new_empty(mask.numel(), *values.shape[mask.dim() :])

    def _here(self) -> str:
        return f"in module {self._module!r}" if self._module else f"in the {self._phase or 'preparation'}"


def _mark(node: Node, live: Live, name: str) -> None:
    metadata: Any = node.metadata
    if metadata.setdefault(MARKED, name) != name:  # the output of an inner module, passed on
        return

    def enter(_: Any) -> None:
        if not live._stack:
            live._at(name)

    node.register_prehook(enter)


def _caller() -> Any:
    """The innermost frame that is neither torch's nor this module's."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not name.startswith("torch.") and name != "torch":
            return frame
        frame = frame.f_back
    return None
