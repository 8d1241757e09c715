"""Adam's direction for several projected gradients of one shape, and the moments behind it, in torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.adamw import reference as adamw
from hf_lowmem.kernels.step.reference import States


def adam_direction(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """The direction m / (sqrt(v) + eps) of each gradient, of moments that are moved by it but not written.

    Args:
        projected: fp32 (k, ...), contiguous: the gradients of k parameters.
        finite: int32 (k,); set to 0 where a moment would not be finite.
        first, second: the tensors of each parameter's encoded moments, one parameter after another: its values with
            codec "fp32", else codes and scalars. Only read.
        first_codec, second_codec: "fp32" or a name of kernels/codecs.
    """
    coded = {first_codec, second_codec} != {"fp32"}
    moments = States(first_codec, first, True, ()), States(second_codec, second, False, ())
    directions = torch.empty_like(projected)
    for i, grad in enumerate(projected.unbind()):
        m, v = (states.load(i).clone().view(grad.shape) for states in moments)
        directions[i] = adamw.adam_direction(grad, m, v, (beta1, beta2), eps, coded)
        finite[i].mul_(m.isfinite().all() & v.isfinite().all())
    return directions


def adam_moments(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    state_seeds: Sequence[int],
    beta1: float,
    beta2: float,
) -> None:
    """Move the moments of each parameter by its projected gradient, in place; leave them where not `finite`.

    Args: as those of `adam_direction`; state_seeds: those that states are rounded by, one a parameter; none where both
        codecs are "fp32".
    """
    moments = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    for i, grad in enumerate(projected.unbind()):
        if finite[i]:
            m, v = (states.load(i) for states in moments)
            adamw.adam_moments_(grad.view(m.shape), m, v, (beta1, beta2))
            for states, value in zip(moments, (m, v), strict=True):
                states.save(i, value)
