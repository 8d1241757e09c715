"""Lion's arithmetic in torch. Which fused operations its operators are: kernels/adamw/reference.py."""

from collections.abc import Sequence

from torch import Tensor

from hf_lowmem.kernels.step.reference import States, each_finite, on_the_cpu


def lion_(
    p: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """One Lion step in place, all tensors fp32 of one shape (arXiv 2302.06675, program 1 and algorithm 2).

    Decay acts on the weight as it was. A value of zero has no sign and does not move.
    """
    beta1, beta2 = betas
    direction = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
    p.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


@on_the_cpu
def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    first: Sequence[Tensor],
    first_codec: str,
    store: str,
    seeds: Sequence[int],
    state_seeds: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    first_value: int,
) -> None:
    """One step for each of `params`, from its encoded momentum and back, in place; see `adamw_step`."""
    momenta = States(first_codec, first, True, state_seeds)
    for i, weights, grad in each_finite(params, grads, skipped, corrections, store, seeds, first_value):
        m = momenta.load(i)
        lion_(weights, grad, m, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        momenta.save(i, m, first_value)
