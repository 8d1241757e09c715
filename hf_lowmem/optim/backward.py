"""Step in backward: each weight is updated as soon as its gradient is complete, and the gradient is freed at once.

A step of its own keeps every gradient until the last one is there: 2 bytes a parameter in bf16, as much as the weights.
Updated one by one, only the gradient in hand exists (the idea is LOMO's, arXiv 2306.09782; torch calls its recipe
"optimizer step in backward"). There is still *one* optimizer, so one schedule drives it and one state dict holds it;
transformers' layer-wise variant makes one optimizer a parameter, which are never scheduled nor saved.

The largest gradient of all, the output head's, need not exist even alone: where it is made a block of rows at a time,
each block is applied at once (`step_rows`; hf_lowmem/training/head.py makes it so).

What needs all gradients at once cannot be had: clipping by the global norm, the loss scaling of fp16, DDP's averaging.
FSDP2 averages a layer's gradients before it calls the hooks of its sharded parameters, so under FSDP2 it works.
"""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hf_lowmem.distributed import Shards, is_sharded, local
from hf_lowmem.optim import accumulator
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.chunked import unit_of
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.method import METHODS
from hf_lowmem.optim.row_steps import RowStep, whole_only
from hf_lowmem.optim.state import WINDOW, Group
from hf_lowmem.reasons import SUMS_SHARDED
from hf_lowmem.specs import ACCUMULATIONS, check_choice

MOST_NORMS = 4096  # kept one by one; no model has so many parameters
SECOND_GRADIENT = (
    "the output head of shape {shape} was stepped by the gradient of the loss, row by row, and now a second gradient "
    "of it has come: it is used outside of the head, too, as by a penalty on weights. It has half a step. Leave "
    "lowmem_step_in_backward unset, or take the second use out of the loss."
)
TWO_UPDATES = (
    "step in backward: a parameter of shape {shape} had a second gradient before optimizer.step(), and each made an "
    "update of its own, which is not the update of their sum. Gradients that are to be added up need `ready`, which "
    "says which backward pass is the last (lowmem_step_in_backward sets it); several losses are added before one "
    "backward(); a reentrant checkpoint of a layer that runs twice needs use_reentrant=False; and each step ends with "
    "optimizer.step()."
)


class StepInBackward:
    """Attach `optimizer` to the backward pass of its parameters.

    ```python
    stepping = StepInBackward(optimizer)
    loss.backward()          # for p in parameters, as its gradient completes: optimizer.step_param(p); p.grad = None
    optimizer.step()         # nothing is left to update; schedules and step hooks count here
    scheduler.step()
    stepping.remove()        # when the training ends
    ```

    The hooks on the parameters keep neither this object nor the optimizer alive: without them gradients stay again.

    Args:
        optimizer: ours; every parameter of its groups is attached.
        ready: for gradient accumulation, whether the backward pass now running is the last of its window. Between,
            a method that works on a projection of the gradient (`ACCUMULATES`) adds up the projections, which is
            exact because a projection is linear; its other parameters keep their gradients until then. A new basis is
            taken from the first gradient of a window instead of from their sum, which is not there.
        accumulation: "int8_sr" adds up in int8 what the method cannot add up by itself, which is everything but the
            projections; see hf_lowmem/optim/accumulator.py for the error. Parameters of fewer than 4,096 values keep
            their gradients. `step()` applies whatever was added up, also of parameters that the last pass has not
            reached, and the optimizer's `zero_grad()` drops it; a model's does not.

    Raises:
        TypeError: for an optimizer of somebody else.
        ValueError: for `ready` with a method that needs whole gradients, and no `accumulation`; for `accumulation`
            without `ready`, or of parameters that FSDP2 has cut; for an optimizer that is attached already.
    """

    def __init__(
        self,
        optimizer: LowMemOptimizer,
        *,
        ready: Callable[[], bool] | None = None,
        accumulation: str | None = None,
    ) -> None:
        _check_ours(optimizer)
        if accumulation is not None:
            check_choice("accumulation", accumulation, ACCUMULATIONS)
            if ready is None:
                raise ValueError(
                    f"accumulation={accumulation!r} has no effect without `ready`, which says of a backward pass "
                    "whether it is the last of its window: every pass is. Give both, or neither."
                )
        elif ready is not None and not optimizer.ACCUMULATES:
            raise ValueError(accumulation_refused("gradient accumulation", optimizer.name, "accumulation"))
        self.optimizer, self.accumulation = optimizer, accumulation
        self.ready = ready or (lambda: True)
        # Norms of the step under way, on their devices, and where the rest of each gradient is: None for whole ones,
        # else any sharded parameter's places.
        self._norms: dict[tuple[torch.device, Any], tuple[list[Tensor], Shards | None]] = {}
        self._squares: list[Tensor] = []  # sums of the last finished step, one a device: nobody waits for them
        self._by_rows: set[int] = set()  # of parameters that the backward pass now running has stepped by rows
        self._stepped: set[int] = set()  # of parameters that were stepped since the last `optimizer.step()`
        self._told = False
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove_all, self._hooks).atexit = False
        self._attach()

    def _attach(self) -> None:
        optimizer = self.optimizer
        self._attached = [p for group in optimizer.param_groups for p in group["params"]]
        self._places = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if has_hook(p):
                    gc.collect()  # the optimizer of one may be gone, but not yet collected
                if has_hook(p):
                    self.remove()
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} has a hook on its gradient already. Remove it, or the "
                        "StepInBackward that set it, first: its `remove()`, or LowMemPlugin's."
                    )
                if self.accumulation is not None and is_sharded(p):
                    self.remove()
                    raise ValueError(
                        f"accumulation={self.accumulation!r} cannot be combined with FSDP2: {SUMS_SHARDED}."
                    )
                if p.requires_grad:
                    self._hooks.append(p.register_post_accumulate_grad_hook(self._hook(index)))
        self._hooks.append(optimizer.register_step_pre_hook(self._end_windows))
        self._hooks.append(optimizer.register_step_post_hook(self._close))

    def follow(self) -> None:
        """Attach to the parameters that the optimizer has now: FSDP2 puts sharded ones in their places."""
        now = [p for group in self.optimizer.param_groups for p in group["params"]]
        if len(now) != len(self._attached) or any(p is not q for p, q in zip(now, self._attached, strict=True)):
            self.remove()
            self._attach()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        weak = weakref.ref(self)

        def run(p: Tensor) -> None:
            stepping = weak()
            if stepping is not None:
                stepping._update(p, index)

        return run

    def _update(self, p: Tensor, index: int) -> None:
        if p.grad is None:  # it came by rows
            self._by_rows.discard(id(p))
            return
        if id(p) in self._by_rows:
            self._by_rows.discard(id(p))
            raise RuntimeError(SECOND_GRADIENT.format(shape=tuple(p.shape)))
        group = self.optimizer.param_groups[index]
        if self.ready():
            self._step(p, group)
        elif self.optimizer.accumulate_param(p, group, coded=self.accumulation is not None):
            p.grad = None

    def _step(self, p: Tensor, group: Group) -> None:
        if (raw := self.optimizer.state.get(p)) is not None:
            accumulator.take(p, raw)
        self.optimizer.step_param(p, group, norm=self._count(p))
        p.grad = None
        self._once(p)

    def _once(self, p: Tensor) -> None:
        """Note an update, and say once if it is the second of a step."""
        if id(p) in self._stepped and not self._told:
            self._told = True
            warnings.warn(TWO_UPDATES.format(shape=tuple(p.shape)), stacklevel=2)
        self._stepped.add(id(p))

    @torch.no_grad()
    def _end_windows(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Step what has gradients of a window in its state that the last pass has not reached, as a fused expert."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                raw = optimizer.state.get(p)
                if raw is None or not (WINDOW in raw or accumulator.is_open(raw)):
                    continue
                if p.grad is None and WINDOW in raw:
                    p.grad = torch.zeros_like(p)
                self._step(p, group)

    def _count(self, p: Tensor) -> Tensor:
        """The norm of the gradient that is here, which is kept."""
        assert p.grad is not None
        return self._note(p, linalg.vector_norm(local(p.grad.detach()), dtype=torch.float32))

    def _note(self, p: Tensor, norm: Tensor) -> Tensor:
        shards = Shards(p) if is_sharded(p) else None
        norms, _ = self._norms.setdefault((p.device, shards and shards.group), ([], shards))
        if len(norms) == MOST_NORMS:  # where nobody calls `step()`
            norms[:] = [linalg.vector_norm(torch.stack(norms))]
        norms.append(norm)
        return norm

    def has(self, p: Tensor) -> bool:
        """Whether it steps this parameter."""
        return self._group_of(p) is not None

    def whole_only(self, p: Tensor) -> str | None:
        """Why the gradient of `p` must come whole, as the end of a sentence; None: `step_rows` takes it by rows."""
        group = self._group_of(p)
        if group is None:
            return "it is not a parameter that is stepped in backward"
        return whole_only(p, self.optimizer.slot(p, group))

    def whole_now(self, p: Tensor) -> str | None:
        """The same of the backward pass now running, which may be one of several whose gradients are added up."""
        if p.grad is not None or not self.ready() or accumulator.is_open(self.optimizer.state.get(p)):
            return "its gradients are accumulated over several backward passes"
        return None

    def unit_of(self, p: Tensor) -> int:
        """Rows of which a block for `step_rows` must have a multiple."""
        group = self._group_of(p)
        assert group is not None
        return unit_of(p, self.optimizer.slot(p, group))

    def step_rows(self, p: Tensor, finite: Tensor) -> RowStep:
        """Begin the step of a parameter whose gradient, the only one of this backward pass, comes by rows.

        Args:
            finite: whether it will be finite and below 1e15, a bool on its device.
        """
        group = self._group_of(p)
        assert group is not None
        return self.optimizer.step_rows(p, group, finite)

    @torch.no_grad()
    def close_rows(self, p: Tensor, step: RowStep) -> None:
        """End such a step, after the last rows. Any other gradient of `p` in this backward pass is an error then."""
        self._note(p, step.close())
        self._by_rows.add(id(p))
        self._once(p)

    def _group_of(self, p: Tensor) -> Group | None:
        index = self._places.get(id(p)) if self._hooks else None
        return None if index is None or not p.requires_grad else self.optimizer.param_groups[index]

    @torch.no_grad()
    def _close(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._by_rows.clear()
        self._stepped.clear()
        if self._norms:
            sums = [(torch.stack(norms).square().sum(), shards) for norms, shards in self._norms.values()]
            self._squares = [s if shards is None else shards.sum_(s) for s, shards in sums]
            self._norms.clear()

    def grad_norm(self) -> float | None:
        """Norm over all gradients of the last finished step, `None` before the first. Asks the devices.

        With gradient accumulation: of the last backward pass alone where projections are added up.
        """
        return torch.stack([s.cpu() for s in self._squares]).sum().sqrt().item() if self._squares else None

    def forget(self) -> None:
        """Drop what a step that was cut off has left: gradients, their sums, and which parameters it had stepped."""
        self.optimizer.zero_grad()
        self._by_rows.clear()
        self._stepped.clear()
        self._norms.clear()

    def remove(self) -> None:
        """Detach: gradients stay again until `optimizer.step()`. `follow` attaches again."""
        _remove_all(self._hooks)
        self._attached, self._places = [], {}


def _check_ours(optimizer: object) -> None:
    if not isinstance(optimizer, LowMemOptimizer):
        raise TypeError(
            f"step in backward needs an optimizer of hf_lowmem, got {type(optimizer).__name__}. Make one with "
            "hf_lowmem.make_optimizer(...)."
        )


def has_hook(p: Tensor) -> bool:
    """Whether something waits for this parameter's gradient."""
    return bool(getattr(p, "_post_accumulate_grad_hooks", None))


def _remove_all(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def accumulation_refused(setting: str, name: str, field: str | None = None) -> str:
    """The reason why a method cannot add up gradients that it frees, with the remedy.

    Args:
        field: by which they can be added up in int8, as the user calls it; None where they cannot.
    """
    able = [n for n, cls in METHODS.items() if cls.ACCUMULATES]
    coded = "" if field is None else f"{field}={ACCUMULATIONS[0]!r} to add them up in int8, or "
    return (
        f"{setting} with step in backward: {name!r} needs whole gradients, which are freed in each backward pass. "
        f"Set {coded}gradient_accumulation_steps=1 with a larger batch, or choose a method that adds up projections: "
        f"{', '.join(able)}."
    )
