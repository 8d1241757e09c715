"""An output head whose gradient never exists whole, for as long as a trainer trains.

With step in backward each block of rows of the head's gradient is applied as soon as it is complete (head_blocks.py;
the step is hf_lowmem/optim/row_steps.py), so that neither the gradient nor its fp32 sums exist whole. Where that cannot
be, blocks are written into the gradient, and what is saved is the fp32 copy. Which of the two, and why, is in the run's
report.

**A bad gradient** leaves out the whole head, as it does without blocks: what the gradient is made of bounds it before
the first row changes (`stays_finite`). A head for which the bound does not hold, a diverged one, is skipped.

`HeadFunction` stands in for TRL's autograd function, whose name TRL's code looks up at each call. It uses private names
of TRL's. So it is tried against TRL's own on a few numbers when this module is imported, and where it fails or differs
TRL's is left where it is, and the report says that.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from hf_lowmem.optim import StepInBackward
from hf_lowmem.training.head_blocks import Context, Saved, Sums, by_blocks, of_hidden, rows_of_block, stays_finite

__all__ = ["GATHERED", "BlockedHead"]

logger = logging.getLogger(__name__)

NAME = "_ChunkedLogProbFunction"  # by which TRL's code calls its function
TheirFunction = chunked_logprob.ChunkedLogProbFunction
Gradients = tuple[Tensor | None, ...]
_forward = cast(Callable[..., Gradients], TheirFunction.forward)
_backward = cast(Callable[..., Gradients], TheirFunction.backward)

OFF = "lowmem_step_in_backward is off"
FROZEN = "it is not trained"
GATHERED = "FSDP2 has cut it, and gathers it for each pass"
TIED = "the embedding has the same weight, and its gradient comes later"
HOOKED = "somebody's hook waits for its gradient"
COMPILED = "torch_compile traces through it"
SEVERAL = "one backward pass goes through several forward passes of it"


class _Call:
    """A forward pass through a head, of which a backward pass may come."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shares = False  # another one's gradient is added to its own in this backward pass


class _Kept(Context, Protocol):
    call: _Call


class Trainer(Protocol):
    """A trainer, as far as its head asks it."""

    model: nn.Module
    stepping: StepInBackward | None


_standing: list["BlockedHead"] = []
_calls: list[weakref.ref[_Call]] = []  # that wait for their backward pass


class HeadFunction(TheirFunction):
    """TRL's function, whose backward pass is made by the head that stands now."""

    @staticmethod
    def forward(ctx: _Kept, hidden: Tensor, weight: Tensor, *others: object) -> Gradients:
        ctx.call = _Call(weight)
        _calls[:] = [ref for ref in _calls if ref() is not None]
        _calls.append(weakref.ref(ctx.call))
        return _forward(ctx, hidden, weight, *others)

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor | None) -> Gradients:
        weight = ctx.call.weight
        heads = [head for head in _standing if head.steps(weight)] or _standing
        # With `create_graph` this pass is differentiated itself; under ZeRO-3 TRL's code gathers the weight.
        if not heads or torch.is_grad_enabled() or hasattr(weight, "ds_id"):
            return _backward(ctx, *grads)
        if not ctx.needs_input_grad[1]:
            return heads[-1].backward_frozen(ctx, grads[0], grads[1])
        return heads[-1].backward(ctx, grads[0], grads[1])


class BlockedHead:
    """The output head of a trainer's model.

    ```python
    head = BlockedHead(trainer)
    head.put()          # from now on each backward pass through TRL's fused head goes by blocks
    head.take_off()     # TRL's function is where it was
    ```

    Attributes:
        rows: of a block; 0 before the first backward pass.
        by_rows, whole: numbers of backward passes in which blocks were applied, and in which they were written into the
            whole gradient.
        why: the last reason for the latter, or why TRL's function was left alone; None without either.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.rows = self.by_rows = self.whole = 0
        self.why: str | None = None
        self._known: tuple[Tensor, StepInBackward | None, str | None] | None = None

    def put(self, *, compiled: bool = False) -> None:
        """Stand in for TRL's function, unless it cannot be. Again is nothing. `compiled`: whether torch.compile will
        trace through it."""
        if self in _standing:
            return
        stands = getattr(trl_utils, NAME)
        self.why = UNFIT or (COMPILED if compiled else None)
        if self.why is None and stands not in (TheirFunction, HeadFunction):
            self.why = f"{stands.__module__}.{stands.__qualname__} stands in for trl's function"
        if self.why is not None:
            logger.info("the output head's gradient is trl's, whole and in fp32: %s", self.why)
            return
        _standing.append(self)
        setattr(trl_utils, NAME, HeadFunction)

    def take_off(self) -> None:
        """Leave TRL's function where it was, if no other trainer needs ours."""
        self._known = None
        if self in _standing:
            _standing.remove(self)
        if not _standing and getattr(trl_utils, NAME) is HeadFunction:
            setattr(trl_utils, NAME, TheirFunction)

    def facts(self) -> dict[str, object]:
        """Plain values: what was done, for the run's report."""
        return {"block_rows": self.rows, "passes_by_rows": self.by_rows, "passes_whole": self.whole, "why": self.why}

    @property
    def _stepping(self) -> StepInBackward | None:
        trainer = self._trainer()
        return None if trainer is None else trainer.stepping

    def steps(self, weight: Tensor) -> bool:
        """Whether it is this trainer's optimizer that has the weight."""
        return self._stepping is not None and self._stepping.has(weight)

    def backward(self, ctx: _Kept, of_logps: Tensor | None, of_entropy: Tensor | None) -> Gradients:
        """Gradients of TRL's function's arguments; None for that of a weight that was stepped."""
        weight, stepping, grads = ctx.call.weight, self._stepping, (of_logps, of_entropy)
        saved = Saved(*ctx.saved_tensors)
        why = self._why(ctx.call)
        unit = stepping.unit_of(weight) if why is None and stepping is not None else 1
        self.rows = rows_of_block(weight, ctx.chunk_size, unit)
        whole: Tensor | None = None
        if why is None and stepping is not None:
            step = stepping.step_rows(weight, stays_finite(ctx, saved, grads))
            sums = by_blocks(ctx, saved, grads, self.rows, _one_room(weight, self.rows), step.take)
            stepping.close_rows(weight, step)
            self.by_rows += 1
        else:
            whole = torch.empty_like(weight)
            if weight.dtype == torch.float32:
                sums = by_blocks(ctx, saved, grads, self.rows, _within(whole), lambda first, block: None)
            else:
                sums = by_blocks(ctx, saved, grads, self.rows, _one_room(weight, self.rows), _into(whole))
            self.whole, self.why = self.whole + 1, why
        return _gradients(ctx, saved, sums, whole)

    def backward_frozen(self, ctx: _Kept, of_logps: Tensor | None, of_entropy: Tensor | None) -> Gradients:
        """`backward` of a weight that needs no gradient."""
        self.why, saved = FROZEN, Saved(*ctx.saved_tensors)
        return _gradients(ctx, saved, of_hidden(ctx, saved, (of_logps, of_entropy)), None)

    def _why(self, call: _Call) -> str | None:
        """Why this backward pass makes the whole gradient of the weight; None: it need not."""
        weight, stepping = call.weight, self._stepping
        others = [c for ref in _calls if (c := ref()) is not None and c is not call and c.weight is weight]
        _calls[:] = [ref for ref in _calls if ref() is not call]
        for other in others:  # whose pass is to come, and adds to this one's gradient
            other.shares = True
        if self._known is None or self._known[0] is not weight or self._known[1] is not stepping:
            self._known = weight, stepping, self._why_ever(weight, stepping)
            if (why := self._known[2]) is not None:
                logger.info("the output head's gradient is made by blocks, and kept whole: %s", why)
        if self._known[2] is not None or stepping is None:
            return self._known[2]
        if weight._backward_hooks and not all(getattr(h, "only_looks", False) for h in weight._backward_hooks.values()):
            return HOOKED
        return SEVERAL if others or call.shares else stepping.whole_now(weight)

    def _why_ever(self, weight: Tensor, stepping: StepInBackward | None) -> str | None:
        trainer = self._trainer()
        if stepping is None or trainer is None:
            return OFF
        if not weight.is_leaf:
            return GATHERED
        if sum(q is weight for m in trainer.model.modules() for q in m.parameters(recurse=False)) > 1:
            return TIED
        return stepping.whole_only(weight)


def _gradients(ctx: Context, saved: Saved, sums: Sums, whole: Tensor | None) -> Gradients:
    """Gradients of the arguments of TRL's function, of whose weight it is `whole`."""
    bias = None if sums.bias is None or saved.bias is None else sums.bias.to(saved.bias.dtype)
    return sums.hidden, whole, bias, *[None] * (len(ctx.needs_input_grad) - 3)


def _one_room(weight: Tensor, rows: int) -> Callable[[int, int], Tensor]:
    """The same memory for each block."""
    room = torch.empty((rows, weight.shape[1]), dtype=torch.float32, device=weight.device)
    return lambda first, last: room[: last - first].zero_()


def _within(whole: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: whole[first:last].zero_()


def _into(whole: Tensor) -> Callable[[int, Tensor], object]:
    return lambda first, block: whole[first : first + len(block)].copy_(block)


def _unfit() -> str | None:
    """Why our backward pass cannot take the place of TRL's, or None: it gives the same bits on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    hidden, weight, bias = (torch.randn(shape, **kinds) for shape in ((5, 4), (7, 4), (7,)))
    targets = torch.arange(5, device="cpu")
    settings = targets, 0.9, 3, 2.0, 1.1, ("entropy",)

    class Written(TheirFunction):
        @staticmethod
        def backward(ctx: Context, *grads: Tensor | None) -> Gradients:
            saved, both = Saved(*ctx.saved_tensors), (grads[0], grads[1])
            whole = torch.empty_like(saved.weight)
            sums = by_blocks(ctx, saved, both, 3, _within(whole), lambda first, block: None)
            if not bool(stays_finite(ctx, saved, both)):
                raise ValueError("finite numbers are taken for others")
            return (sums.hidden, whole, sums.bias, *[None] * 6)

    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = []
            for function in (TheirFunction, Written):
                inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
                logps, entropy, *_ = function.apply(*inputs, *settings)
                found.append(torch.autograd.grad((logps * targets).sum() + entropy.sum(), inputs))
        if all(map(torch.equal, *found)):
            return None
        reason = "another result"
    except Exception as error:  # whatever a later version has made of it
        reason = f"{type(error).__name__}: {error}"
    return f"trl's function is not the one that is known here ({reason})"


UNFIT = _unfit()
