"""Cases of the fused Lion step: codecs × stores × dtypes, five parameters in one call; and large ones."""

from collections.abc import Iterator
from typing import Any

import torch

from hf_lowmem.kernels.registry import Case
from hf_lowmem.kernels.step.cases import LARGE, dtypes_and_stores, parameters, skips_of, state_of, state_seeds


def lion_cases() -> Iterator[Case]:
    def make(device: torch.device, codec: str, kinds: tuple[Any, ...], **shapes: Any) -> tuple[Any, ...]:
        dtype, grad_dtype, store = kinds
        params, grads, corrections, seeds = parameters(store, dtype, grad_dtype, device, **shapes)
        momenta = [part for p in params for part in state_of(p.shape, codec, True, device)]
        seeds = seeds, state_seeds(codec)[: len(params)]
        numbers = 1e-2, 0.9, 0.99, 0.1, 0
        return params, grads, skips_of(device), corrections, momenta, codec, store, *seeds, *numbers

    for codec in ("fp32", "int8", "int8_softsign", "fp8_expand"):
        for kinds in list(dtypes_and_stores())[: 6 if codec == "int8" else 3]:
            label = f"{codec}-{kinds[0]}-{kinds[1]}-{kinds[2]}".replace("torch.", "")
            yield Case(label, lambda d, a=codec, b=kinds: make(d, a, b))
    kinds = torch.bfloat16, torch.bfloat16, "bf16_ecc"
    yield Case("large-int8_softsign-bf16_ecc", lambda d: make(d, "int8_softsign", kinds, shapes=LARGE))
