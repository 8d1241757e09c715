"""The Power schedule of learning rates, beside those that transformers has.

Shen et al., Power Scheduler (arXiv 2408.13359), equations 7 and 8. After a linear warm-up the rate is

    min(lr_max, B a n^b)        B: sequences of 4,096 tokens in a step, n: tokens trained on so far

and over the last steps it decays exponentially to zero. The rate of a step does not depend on how long the run is, so
it can be stopped or continued before its decay; that is what transformers' warmup_stable_decay, a constant rate between
the same two ends, does not have: the best constant falls with the number of tokens.

Constants. a = 4, b = -0.51, found by the authors for pre-training with muP on 2e9 to 1.28e11 tokens, and lr_max = 0.02
(section 4). That a step's batch is counted in sequences of 4,096 tokens is their tables' 2 and 3. They say no more of
the decay than that it is exponential and ends at zero; here it is (r^x - r) / (1 - r) with r = 0.01, x from 0 to 1.

When not to use it: a and b belong to pre-training with muP. For another parametrisation `a` has to be tuned; for
fine-tuning, where rates are a hundred times smaller and runs end when planned, use a cosine or linear schedule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_lowmem.specs import check_choice, check_integer, check_number

__all__ = ["PowerSpec", "get_power_schedule"]

SEQUENCE = 4096  # tokens, in which the paper counts a batch
END = 0.01  # r, above


@dataclass(frozen=True)
class PowerSpec:
    """Settings of the Power schedule beside the largest rate and the warm-up.

    Args:
        tokens_per_step: tokens that one optimizer step trains on, in all processes and micro-batches.
        a: rate of one sequence of 4,096 tokens a step after one token, > 0.
        b: exponent of the tokens trained on, in (-inf, 0).
        decay_steps: steps of the decay at the end; below 1 a share of all steps.

    Raises:
        TypeError, ValueError: naming the option, its value and what is expected.
    """

    tokens_per_step: int
    a: float = 4.0
    b: float = -0.51
    decay_steps: float = 0.1
    label: str = ""

    def __post_init__(self) -> None:
        check_integer(f"{self.label}tokens_per_step", self.tokens_per_step, low=1)
        check_number(f"{self.label}a", self.a, low=0.0, low_open=True)
        check_number(f"{self.label}b", self.b, low=-10.0)
        if self.b >= 0:
            raise ValueError(
                f"{self.label}b={self.b!r}: must be negative, or the rate would never fall. Leave it unset."
            )
        check_number(f"{self.label}decay_steps", self.decay_steps, low=0.0)
        if self.decay_steps >= 1:
            check_integer(f"{self.label}decay_steps", self.decay_steps, low=1)

    @classmethod
    def from_options(cls, label: str, options: Mapping[str, object], **more: object) -> "PowerSpec":
        """A spec from options by name; `more` counts where they say nothing.

        Raises:
            TypeError, ValueError: also for an option that there is not.
        """
        cls.check_names(label, options)
        make = cast("Callable[..., PowerSpec]", cls)
        return make(**{**more, **options}, label=label)

    @classmethod
    def check_names(cls, label: str, options: Mapping[str, object]) -> None:
        """Raise for an option that there is not."""
        for name in options:
            check_choice(f"{label}option", name, [f.name for f in fields(cls) if f.name != "label"])

    def law(self, step: int) -> float:
        """The power law's rate after so many steps, at least one."""
        return self.tokens_per_step / SEQUENCE * self.a * float(step * self.tokens_per_step) ** self.b

    def decay_of(self, steps: int) -> int:
        """Steps of the decay in a run of `steps`."""
        return int(self.decay_steps if self.decay_steps >= 1 else self.decay_steps * steps)


def _power(spec: PowerSpec, lr_max: float, step: int) -> float:
    return min(lr_max, spec.law(step)) if step else lr_max


def power_factor(step: int, *, spec: PowerSpec, lr_max: float, warmup: int, steps: int) -> float:
    """The rate of a step, counted from 0, over the largest one.

    Args:
        step: steps made before.
        spec: of the schedule.
        lr_max: the largest rate.
        warmup: steps of the warm-up.
        steps: of the run.
    """
    decay = spec.decay_of(steps)
    begins = steps - decay
    if step < warmup:
        return step / warmup * _power(spec, lr_max, warmup) / lr_max
    if step <= begins:
        return _power(spec, lr_max, step) / lr_max
    x = min(1.0, (step - begins) / decay) if decay else 1.0
    return (END**x - END) / (1 - END) * _power(spec, lr_max, begins) / lr_max


def get_power_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    spec: PowerSpec,
    lr_max: float | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """The Power schedule for an optimizer, called as transformers' schedules are; see the module.

    ```python
    scheduler = get_power_schedule(optimizer, 100, 10_000, PowerSpec(tokens_per_step=65_536))
    ```

    Args:
        optimizer: whose groups' rates are multiplied by one factor.
        num_warmup_steps, num_training_steps: optimizer steps.
        spec: the rest.
        lr_max: the paper's bound of the rate; None: the largest of the groups' rates.
        last_epoch: as in torch's schedulers.

    Raises:
        ValueError: where warm-up and decay take more steps than there are, or the law has no effect on any step.
    """
    if lr_max is None:
        lr_max = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    label = spec.label or "PowerSpec: "
    check_number("learning_rate", lr_max, low=0.0, low_open=True)
    last = num_training_steps - spec.decay_of(num_training_steps)
    if last < max(1, num_warmup_steps):
        raise ValueError(
            f"{label}decay_steps={spec.decay_steps!r} with {num_warmup_steps} steps of warm-up: more than the "
            f"{num_training_steps} steps of this run. Lower one of them."
        )
    if (smallest := spec.law(last)) >= lr_max:
        raise ValueError(
            f"learning_rate={lr_max:g}: the power law is never below it (it is {smallest:.3g} at step {last}), so that "
            "the rate would be constant between warm-up and decay. Set lr_scheduler_type='warmup_stable_decay' "
            f"for that, a larger learning_rate (the paper's is 0.02), or a smaller {label}a."
        )
    factor = partial(power_factor, spec=spec, lr_max=lr_max, warmup=num_warmup_steps, steps=num_training_steps)
    return LambdaLR(optimizer, factor, last_epoch)
