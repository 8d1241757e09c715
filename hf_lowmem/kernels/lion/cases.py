"""Cases of the fused Lion step: codecs × stores × dtypes, five parameters in one call."""

from collections.abc import Iterator
from typing import Any

import torch

from hf_lowmem.kernels.registry import Case
from hf_lowmem.kernels.step.cases import dtypes_and_stores, parameters, state_of, state_seeds


def lion_cases() -> Iterator[Case]:
    def make(device: torch.device, codec: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype, grad_dtype, store = kinds
        params, grads, corrections, seeds = parameters(store, dtype, grad_dtype, device)
        momenta = [part for p in params for part in state_of(p.shape, codec, True, device)]
        return params, grads, corrections, momenta, codec, store, seeds, state_seeds(codec), 1e-2, 0.9, 0.99, 0.1

    for codec in ("fp32", "int8", "int8_softsign", "fp8_expand"):
        for kinds in list(dtypes_and_stores())[: 6 if codec == "int8" else 3]:
            label = f"{codec}-{kinds[0]}-{kinds[1]}-{kinds[2]}".replace("torch.", "")
            yield Case(label, lambda d, a=codec, b=kinds: make(d, a, b))
