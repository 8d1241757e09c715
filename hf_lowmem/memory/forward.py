"""Bytes that a model's forward passes save for backward, counted by a pair of hooks during one training step.

Counting hooks on autograd's stack must come down whatever happens. A forward hook can see to that: with
`always_call=True` torch runs it when the forward pass raises (out of memory, most of all), too. Code around the whole
training step could not, where nobody is called after an exception.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from hf_lowmem.memory.saved import SavedReport, measure_saved

__all__ = ["ForwardSaved"]


class ForwardSaved:
    """Counter of the bytes saved for backward: those of the largest forward pass between `attach` and `detach`.

        meter, found = ForwardSaved(), {}
        meter.attach(model, found)
        ...                             # a training step
        meter.detach()
        found["saved"], found["saved_by_module"]    # bytes; missing where no pass was measured

    Passes in eval mode or under no_grad do not count, nor do those inside another. Where a compiled model or
    DataParallel's replicas run in the model's place, nothing is measured. If a KeyboardInterrupt ends a forward pass,
    the counting goes on until `detach`.
    """

    def __init__(self) -> None:
        self._after_each: Callable[[nn.Module, object, object], None] | None = None
        # A dict and not a function of its owner, which would keep the owner alive after an exception.
        self._found: dict[str, Any] = {}
        self._most = 0
        self._model: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        # Its forward calls under way, the outermost first, and which of them is measured.
        self._calls: list[tuple[AbstractContextManager, SavedReport] | None] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not measure on: open contexts cannot be pickled.
        return self.__dict__ | {"_found": {}, "_model": None, "_hooks": [], "_calls": [], "_after_each": None}

    def attach(
        self,
        model: nn.Module,
        found: dict[str, Any],
        after_each: Callable[[nn.Module, object, object], None] | None = None,
    ) -> None:
        """Measure `model` from now on; `found` gets what its largest pass saved, as soon as that pass has ended.

        Args:
            after_each: called within a measured pass behind every module, with it, its arguments and its output.
        """
        self.detach()
        self._found, self._most, self._after_each = found, 0, after_each
        # Around all other hooks, and of two meters the first to open is the last to close.
        before = model.register_forward_pre_hook(self._before_forward, prepend=True)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        self._model, self._hooks = model, [before, after]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._hooks:
            handle.remove()
        for call in reversed(self._calls):  # left by a KeyboardInterrupt, which `always_call` does not catch
            if call is not None:
                call[0].__exit__(None, None, None)
        self._model, self._hooks, self._calls, self._after_each = None, [], [], None

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        # Tracing a model traces its hooks, and would keep these. Copies and replicas of a model have its hooks, too.
        if torch.compiler.is_compiling() or model is not self._model:
            return
        call = None
        if model.training and torch.is_grad_enabled() and not any(self._calls):
            context = self._measuring(model)
            call = context, context.__enter__()
            call[1]._enter_module(model, args)  # torch listed this call's hooks before the report added its own
        self._calls.append(call)

    @contextmanager
    def _measuring(self, model: nn.Module) -> Iterator[SavedReport]:
        with measure_saved(model) as saved, ExitStack() as stack:
            if self._after_each is not None:
                stack.callback(register_module_forward_hook(self._after_each).remove)
            yield saved

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or model is not self._model:
            return
        # No call at all: somebody else's pre-hook has raised before ours was run.
        if not self._calls or (call := self._calls.pop()) is None:
            return
        context, now = call
        saved, by_module = now.total, now.by_module_now
        context.__exit__(None, None, None)
        if output is not None and saved >= self._most:  # None: the forward pass has raised
            self._most = saved
            self._found |= {"saved": saved, "saved_by_module": by_module}
