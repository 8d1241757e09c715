"""Cases of the fused Adam step: pairs of codecs × stores × dtypes, five parameters in one call; and large ones."""

from collections.abc import Iterator
from typing import Any

import torch

from hf_lowmem.kernels.registry import Case
from hf_lowmem.kernels.step.cases import (
    LARGE,
    PAIRS,
    dtypes_and_stores,
    parameters,
    skips_of,
    state_of,
    state_seeds,
)


def adamw_cases() -> Iterator[Case]:
    def make(
        device: torch.device, pair: tuple[str, str], kinds: tuple[Any, ...], rule: str, **shapes: Any
    ) -> tuple[Any, ...]:
        dtype, grad_dtype, store = kinds
        params, grads, corrections, seeds = parameters(store, dtype, grad_dtype, device, **shapes)
        moments = [
            [part for p in params for part in state_of(p.shape, codec, signed, device)]
            for codec, signed in zip(pair, (True, False), strict=True)
        ]
        steps = [1, 2, 3, 16, 1000][: len(params)]
        return (
            params, grads, skips_of(device), corrections, *moments, *pair, store,
            seeds, state_seeds(*pair)[: len(params)], steps, rule, 1e-2, 0.9, 0.999, 1e-8, 0.1, 0,
        )  # fmt: skip

    for pair in PAIRS:
        for i, kinds in enumerate(dtypes_and_stores()):
            for rule in ("adamw", "family") if i < 2 else ("adamw",):
                label = f"{rule}-{','.join(pair)}-{kinds[0]}-{kinds[1]}-{kinds[2]}".replace("torch.", "")
                yield Case(label, lambda d, a=pair, b=kinds, c=rule: make(d, a, b, c))
    large = (
        (("int8_softsign", "fp8_expand"), "bf16_sr", "adamw"),
        (PAIRS[0], "keep", "adamw"),
        (PAIRS[1], "bf16_ecc", "family"),
    )
    for pair, store, rule in large:
        kinds = torch.bfloat16, torch.bfloat16, store
        label = f"large-{rule}-{','.join(pair)}-{store}"
        yield Case(label, lambda d, a=pair, b=kinds, c=rule: make(d, a, b, c, shapes=LARGE))
