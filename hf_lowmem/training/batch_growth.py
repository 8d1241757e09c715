"""A batch that grows while a run goes on, by the norm test (AdAdaGrad, arXiv 2402.11215).

Early in a training gradients of different rows agree, and a small batch points the right way; later noise is larger
than what they agree on. The test compares the two: with g_j the gradient of each of a step's M micro-batches, as an
estimate of the whole one, and g their mean,

    sum_j |g_j - g|^2 / (M - 1) / M  >  eta^2 |g|^2

says that the mean's own noise is more than `eta` of it, and the batch is then doubled: by gradient accumulation, so
that nothing else changes. The paper raises the batch to exactly what passes the test; here it doubles, because a
Trainer counts the micro-batches of an epoch by multiples of the accumulation.

The sums are taken by hooks as gradients arrive: of a gradient's square, and in the last micro-batch of the square of
its sum, one parameter at a time; no gradient is kept a second time. Micro-batches of different numbers of tokens count
with their share, which makes the noise look somewhat larger than it is.

When not to use it: where the number of updates matters. A Trainer counts its epochs at the start, so a batch that grows
takes as much data in fewer updates; schedules that count on a number of steps are refused. In the paper's experiments
losses end near those of the smallest constant batch, in the time of larger ones.
"""

import logging
from typing import TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem.optim import ZEROTH
from hf_lowmem.specs import check_integer, check_number

__all__ = ["NormTestCallback"]

logger = logging.getLogger(__name__)

CONSTANT = ("constant", "constant_with_warmup")


class _Event(TypedDict, total=False):
    """Keywords of an event."""

    model: nn.Module


class NormTestCallback(TrainerCallback):
    """Doubles `gradient_accumulation_steps` when a step's gradient is mostly noise; see the module.

    ```python
    trainer.add_callback(NormTestCallback(eta=0.5, max_accumulation=32))
    ```

    Args:
        eta: bound of the noise over the gradient's norm, > 0; the batch grows where it is exceeded.
        max_accumulation: micro-batches of a step beyond which it does not grow.

    Attributes:
        tests: (step, accumulation, noise over norm) of every full step.

    Raises:
        TypeError, ValueError: for the arguments; and as a training starts, for settings under which the gradients of
            micro-batches are not there to be seen, or for which a number of steps is fixed.
    """

    def __init__(self, eta: float, max_accumulation: int = 64) -> None:
        check_number("eta", eta, low=0.0, low_open=True)
        check_integer("max_accumulation", max_accumulation, low=2)
        self.eta, self.max_accumulation = eta, max_accumulation
        self.tests: list[tuple[int, int, float]] = []
        self._hooks: list[RemovableHandle] = []
        self._first: int | None = None  # accumulation before it grew
        self._wanted = self._window = 1  # accumulation that a test has asked for, and the present one
        self._passes = self._all = 0  # micro-batches of this step, and of this epoch
        self._squares: list[Tensor] = []
        self._sums: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[_Event]
    ) -> None:
        """Check the settings, and begin to look at gradients."""
        self._take_off(args)  # of a training that an exception has ended
        self._check(args, state)
        self._first = self._window = self._wanted = args.gradient_accumulation_steps
        self.tests.clear()
        self._forget()
        for parameter in kwargs.get("model", nn.Module()).parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(lambda grad, p=parameter: self._see(p, cast(Tensor, grad))))

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        def refuse(what: str, why: str, remedy: str) -> None:
            raise ValueError(f"NormTestCallback cannot be combined with {what}: {why}. {remedy}.")

        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        steps = args.gradient_accumulation_steps
        if steps < 2:
            refuse(f"gradient_accumulation_steps={steps}", "noise is seen between micro-batches", "Set it to 2 or more")
        if kind not in CONSTANT or getattr(args, "lowmem_schedule", None) is not None:
            refuse(
                f"lr_scheduler_type={kind!r}" if kind not in CONSTANT else "lowmem_schedule",
                "it counts steps of one size, and there will be fewer, larger ones",
                f"Set lr_scheduler_type to {' or '.join(map(repr, CONSTANT))}",
            )
        if args.world_size > 1 or args.n_gpu > 1:
            refuse("several processes or GPUs", "each sees the gradients of its own rows", "Train on one device")
        if getattr(args, "deepspeed", None):
            refuse("DeepSpeed", "it takes gradients away as they arrive", "Train without it")
        if getattr(args, "lowmem_step_in_backward", False):
            refuse("lowmem_step_in_backward=True", "it frees each gradient as it arrives", "Leave one of them out")
        if args.optim in ZEROTH:
            refuse(f"optim={args.optim!r}", "it has no gradients", "Take a method of first order")
        if state.global_step > 0 and not args.ignore_data_skip:
            refuse(
                "a resumed run",
                "a Trainer finds its place in the data by the number of steps, as if all had been of one size",
                "Set ignore_data_skip=True, which begins the data anew, or start a new run",
            )

    def _see(self, parameter: nn.Parameter, grad: Tensor) -> None:
        found = grad.detach().float()
        self._squares.append(found.square().sum())
        if self._passes == self._window - 1:
            summed = found if parameter.grad is None else found + parameter.grad
            self._sums.append(summed.square().sum())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count a micro-batch."""
        self._passes += 1
        self._squares = [torch.stack(self._squares).sum()] if self._squares else []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Test the step's gradients, and let the accumulation grow where its windows allow it."""
        micro, full = self._passes + 1, self._passes + 1 == self._window
        self._all += micro
        if full and self._sums:
            squares, norm = (float(torch.stack(values).sum()) for values in (self._squares, self._sums))
            # Each is 1/M of an estimate, as losses are divided by M: M g_j is one, and g their sum.
            noise = max(0.0, micro * squares - norm) / (micro - 1)
            ratio = (noise / norm) ** 0.5 if norm > 0 else float("inf") if noise > 0 else 0.0
            self.tests.append((state.global_step, micro, ratio))
            if ratio > self.eta and 2 * micro <= self.max_accumulation:
                self._wanted = 2 * micro
        self._forget()
        if self._wanted != self._window and self._all % self._wanted == 0:
            logger.info(
                "norm test: noise is over %g of the gradient; gradient_accumulation_steps=%d from step %d on",
                self.eta,
                self._wanted,
                state.global_step + 1,
            )
            args.gradient_accumulation_steps = self._window = self._wanted

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count micro-batches from none: a Trainer's windows begin anew."""
        self._all = 0
        self._forget()
        args.gradient_accumulation_steps = self._window = self._wanted

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the hooks off, and give back the accumulation that the arguments had."""
        self._take_off(args)

    def _take_off(self, args: TrainingArguments) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._first is not None:
            args.gradient_accumulation_steps, self._first = self._first, None

    def _forget(self) -> None:
        self._passes = 0
        self._squares, self._sums = [], []
