"""The input of a preference loss: four numbers a pair, and nothing of size (B, T, V).

TRL's fused head already gives the log-probability of every completion token without building the logits. All
the preference losses of this package are functions of two sums and two lengths of those numbers, so this
module reduces them once, in fp32, to a `PairLogps`, and a loss is then a few lines on (B,) tensors. A second
path from logits to log-probs is refused on purpose: it would cost the (B, T, V) tensor that the fused head
avoids, and the two would drift apart.

Why sums *and* lengths, rather than means: DPO reads the sums, ASFT, ORPO and SimPO read the means, and TRL
logs the sums. The means can be had from the sums; the other way round loses bits.

Nothing here reads a value on the host. All checks are on shapes, dtypes and devices, so a GPU is never made
to wait.
"""

# A user's value may be of any type, whatever the annotation says: it is looked at.
# pyright: reportUnnecessaryIsInstance=false

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

MAX_MEAN_LOGP = -1e-6
"""Largest ℓ (nats a token) that enters `log_odds`. Above it p = e^ℓ is 1 as far as fp32 can tell: a
log-probability is a difference of two numbers of the size of a logit, about 20, whose fp32 spacing is
2e-6."""


@dataclass(frozen=True, eq=False, slots=True)
class PairLogps:
    """Log-probabilities of B pairs of completions under one model.

    Fields, each of shape (B,), on one device:
        chosen, rejected: log-probability of the whole completion, in nats (S, the sum over its tokens).
            One floating dtype for both. The losses compute in fp32, or in fp64 if these are fp64.
        chosen_len, rejected_len: tokens in the completion, integers (of an integer or a floating dtype).

    Raises, at construction: TypeError for a field that is no tensor or of the wrong dtype; ValueError for
    shapes or devices that do not agree. Values are not looked at: that would make the host wait for the
    device.

    Equality is identity (`eq=False`): comparing tensors has no single truth value.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    def __post_init__(self) -> None:
        sums = {"chosen": self.chosen, "rejected": self.rejected}
        lens = {"chosen_len": self.chosen_len, "rejected_len": self.rejected_len}
        for name, value in (sums | lens).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"PairLogps.{name} is a {type(value).__name__}; it must be a tensor of shape (B,).")
            if value.dim() != 1 or value.shape != self.chosen.shape:
                shapes = {n: tuple(v.shape) for n, v in (sums | lens).items() if isinstance(v, Tensor)}
                raise ValueError(
                    f"PairLogps.{name} has a shape that does not fit: all four must be (B,), got {shapes}."
                )
            if value.device != self.chosen.device:
                raise ValueError(
                    f"PairLogps.{name} is on {value.device}, chosen on {self.chosen.device}: move it there."
                )
        for name, value in sums.items():
            if not value.is_floating_point() or value.dtype != self.chosen.dtype:
                raise TypeError(
                    f"PairLogps.{name} is {value.dtype}: sums of log-probabilities must share one floating "
                    f"dtype (chosen is {self.chosen.dtype})."
                )
        for name, value in lens.items():
            if value.is_complex() or value.dtype == torch.bool:
                raise TypeError(
                    f"PairLogps.{name} is {value.dtype}: a length counts tokens, so pass numbers, such as "
                    "mask.sum(dim=1)."
                )

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """S_w and S_l, (B,) each, nats, fp32 or fp64."""
        dtype = _compute_dtype(self.chosen)
        return self.chosen.to(dtype), self.rejected.to(dtype)

    @property
    def chosen_mean(self) -> Tensor:
        """ℓ_w = S_w / tokens, (B,), nats a token, fp32 or fp64. 0 for an empty one (see `pair_logps`)."""
        return _mean(self.chosen, self.chosen_len)

    @property
    def rejected_mean(self) -> Tensor:
        """ℓ_l = S_l / tokens, (B,), nats a token, fp32 or fp64. 0 for an empty one (see `pair_logps`)."""
        return _mean(self.rejected, self.rejected_len)


class PreferenceLoss(Protocol):
    """A plain function of log-probabilities: no state, no module, no class hierarchy.

    ```python
    loss, metrics = preference_loss(policy, reference, beta=0.1)    # (B,); name → (B,), detached
    ```

    `needs_reference` says whether `reference` must be given. Where it is False no reference model is ever
    loaded, and a `reference` that is not None is a ValueError: it would have been computed for nothing.
    `options` are the keywords of its signature with their defaults; there is no other list of them.
    """

    needs_reference: bool
    options: dict[str, Any]

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def preference_loss(
    *, needs_reference: bool
) -> Callable[[Callable[..., tuple[Tensor, dict[str, Tensor]]]], PreferenceLoss]:
    """Mark a function as a `PreferenceLoss`. It stays the same function, so its signature lists its
    options."""

    def mark(function: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> PreferenceLoss:
        loss = cast(PreferenceLoss, function)
        loss.needs_reference = needs_reference
        parameters = inspect.signature(function).parameters.values()
        loss.options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return loss

    return mark


def refuse_reference(name: str, reference: PairLogps | None) -> None:
    """Raise ValueError where the loss `name`, which needs no reference, was given one."""
    if reference is not None:
        raise ValueError(
            f"reference was given, but {name} needs none and would ignore it. Pass reference=None, and do "
            "not load or query a reference model for it."
        )


def check_option(name: str, value: Any, role: str, *, positive: bool = False) -> None:
    """Raise unless the option `name` is a finite number >= 0, or > 0 with `positive`; `role` is said in the error."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: {role}, so it must be a number, got {type(value).__name__}.")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name}={value!r}: {role}, so it must be finite and {'> 0' if positive else '>= 0'}.")


def pair_metrics(
    policy: PairLogps, chosen_rewards: Tensor, rejected_rewards: Tensor, **terms: Tensor
) -> dict[str, Tensor]:
    """Metrics that every loss reports: detached (B,) tensors of the loss's dtype.

    Under TRL's names: "rewards/chosen", "rewards/rejected", "rewards/accuracies" (0 or 1), "rewards/margins",
    "logps/chosen" and "logps/rejected" (sums, nats). And "logps_mean/chosen", "logps_mean/rejected" (nats a token):
    they show when both answers become unlikely together, which margins and accuracies hide. And a "loss/…" for each
    of `terms`, which add up to the loss.
    """
    chosen, rejected = policy.sums
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps_mean/chosen": policy.chosen_mean,
        "logps_mean/rejected": policy.rejected_mean,
    } | {f"loss/{name}": term for name, term in terms.items()}
    return {name: value.detach() for name, value in metrics.items()}


def pair_logps(per_token_logps: Tensor, mask: Tensor) -> PairLogps:
    """Reduce a stacked batch to sums and lengths.

    ```python
    chosen, rejected = (per_token_logps * mask).float().sum(1).chunk(2)
    chosen_len, rejected_len = mask.sum(1).chunk(2)
    ```

    Args:
        per_token_logps: (2B, T), nats, the B chosen rows above the B rejected rows, as TRL's collators stack
            them. Row i and row B + i are one pair. Position t holds the log-probability of token t + 1.
        mask: (2B, T), bool or integer, non-zero on completion tokens. It must be shifted like the log-probs:
            TRL's `completion_mask[:, 1:]`. It alone decides what counts, for the sum and for the length, so
            the two cannot disagree; positions outside it are ignored whatever they hold.

    Sums are taken in fp32 (fp64 stays fp64) whatever the dtype of `per_token_logps`.

    An empty completion (a row of `mask` that is all zero: an empty answer, or a prompt that fills
    `max_length`) gives S = 0, length 0 and mean 0, the log-probability of having said nothing. No NaN, and no
    gradient, since no token is behind it; but the pair's other completion would still be trained, alone. That
    is never meant, and here it can only be seen by waiting for the device, so it is for the collator to
    refuse such a row while the mask is still on the CPU.

    Raises: ValueError for shapes that do not agree or an odd number of rows; TypeError for a dtype.
    """
    if per_token_logps.dim() != 2 or per_token_logps.shape != mask.shape or per_token_logps.shape[0] % 2:
        raise ValueError(
            f"per_token_logps {tuple(per_token_logps.shape)} and mask {tuple(mask.shape)} must both be "
            "(2B, T), chosen rows above rejected ones. Shift the mask as the log-probs are shifted: "
            "completion_mask[:, 1:]."
        )
    if not per_token_logps.is_floating_point():
        raise TypeError(f"per_token_logps is {per_token_logps.dtype}; log-probabilities must have a floating dtype.")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask is {mask.dtype}; it says which positions count, so pass a bool or integer dtype.")
    counted = mask != 0
    sums = per_token_logps.masked_fill(~counted, 0).sum(dim=1, dtype=_compute_dtype(per_token_logps))
    chosen, rejected = sums.chunk(2)
    chosen_len, rejected_len = counted.sum(dim=1).chunk(2)
    return PairLogps(chosen, rejected, chosen_len, rejected_len)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability a token, ℓ = log p.

    ```python
    logp - log(1 - exp(logp))
    ```

    `logp` is (B,), fp32 or fp64, nats a token, and is held at or below `MAX_MEAN_LOGP`: the result stays
    below 13.82, its slope 1 / (1 - p) below 1.000001e6, and above the limit the gradient is zero.
    """
    logp = logp.clamp(max=MAX_MEAN_LOGP)
    return logp - log1mexp(logp)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, to a few ulp, with gradients that are finite wherever the true ones are.

    ```python
    log(1 - exp(x))
    ```

    Near 0 the difference 1 - e^x cancels, and expm1 gives it exactly; far below 0 it rounds to 1, and log1p
    keeps what is lost. At the switch, -ln 2, both are as good (Mächler 2012, "Accurately computing log(1 -
    exp(-|a|))", eq. 7). `torch.where` alone would not do: it multiplies the gradient of the branch not taken
    by zero, and in fp32 log1p(-exp(-1e-8)) has an infinite one, so the product is NaN. Hence the log1p branch
    reads the switch wherever it is not used. The other is harmless far below 0: its gradient there is 0.
    """
    switch = -math.log(2)
    near = x > switch
    by_expm1 = torch.log(-torch.expm1(x))
    by_log1p = torch.log1p(-torch.exp(x.masked_fill(near, switch)))
    return torch.where(near, by_expm1, by_log1p)


def _mean(total: Tensor, length: Tensor) -> Tensor:
    dtype = _compute_dtype(total)
    return total.to(dtype) / length.clamp(min=1).to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 for everything narrower; fp64 stays."""
    return torch.promote_types(x.dtype, torch.float32)
