"""APOLLO's channel factors with the limit on their growth, and its step of the weights, without temporaries."""

from torch import Tensor

from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.apollo.cases import factor_cases, step_cases
from hf_lowmem.kernels.registry import Kernel

__all__ = ["APOLLO_FACTORS", "APOLLO_STEP"]

UNIT = 2.0**-24  # of fp32: half a unit in the last place of 1


def _bound(
    grads: list[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    prev_norms: list[Tensor],
    per_channel: bool,
    reach: float,
) -> list[Tensor | float]:
    """Largest difference between two orders of summation, for s, the factors and the new norms; none for the flags.

    A sum of w values that are not negative, in any order, is off by at most w units in proportion, one of them for
    the rounding of each square. Its root halves that, and is itself off by two (torch's on a CPU) at most; so is a norm
    by w / 2 + 2. Two norms, the addition of 1e-8 and the division: s by w + 6. The norm of grad * s has w = m * n, and
    each term has the error of s and of a product; the factor has two divisions and an addition on top, the new norm is
    the quotient of both. Each implementation errs by so much, so twice that lies between them, and one part in 256
    covers the products of errors.
    """
    s, factors, norms = reference.apollo_factors(
        grads, projected, direction, finite.clone(), prev_norms, per_channel, reach
    )
    width = projected.shape[-2:].numel() // (max(grads[0].shape[-2:]) if per_channel else 1)
    of_s = width + 6
    of_norm = grads[0].shape[-2:].numel() / 2 + 2 + of_s + 1
    units = 2 * UNIT * (1 + 1 / 256)
    return [s.abs() * (of_s * units), factors * ((of_norm + 4) * units), norms * ((2 * of_norm + 5) * units), 0.0]


APOLLO_FACTORS = Kernel(
    name="apollo_factors",
    reference=reference.apollo_factors,
    triton="hf_lowmem.kernels.apollo.triton:apollo_factors",
    cpu="hf_lowmem.kernels.apollo.cpu:apollo_factors",
    fake=reference.apollo_factors_fake,
    mutates=("finite",),
    cases=factor_cases,
    bound=_bound,
)
APOLLO_STEP = Kernel(
    name="apollo_step",
    reference=reference.apollo_step,
    triton="hf_lowmem.kernels.apollo.triton:apollo_step",
    cpu="hf_lowmem.kernels.apollo.cpu:apollo_step",
    mutates=("params", "corrections", "skipped", "prev_norms"),
    cases=step_cases,
)
