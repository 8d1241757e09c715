"""The hunt for gradients that are wrong in silence: forty families, four tiers, five circumstances.

A cell is right if its gradients are the plain model's with the same seeds: bit for bit, or to the last roundings, in
`exact`; within the tier's bound in the others. It may be refused, by an error of ours that is a sentence. All else is a
fault.
"""

import copy
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.activations import convert
from hf_lowmem.activations.checkpoint import wrap_layer
from hf_lowmem.activations.detect import find_stack
from tests.activations.hunted import (
    HUNTED,
    lent_weights,
    made,
    one_step,
    share_layers,
    two_adapters,
    with_two_adapters,
)

TIERS = ("exact", "fp8", "fp8_recompute", "checkpoint_fp8")
# sqrt(2 layers x 12 readings) x twice E4M3's 0.0258 each, as tests/activations/test_lossy.py derives it for 8 readings:
# these families have cross-attention, norms of q and k, and layers that compute once more from a rounded input. Another
# dropout mask, another adapter or another weight gives an error near 1.
LOSSY = 0.26
# The order of a sum: fp32's 6e-8 over some thousand terms.
FLOOR = 1e-5


def prepared(family: str, circumstance: str) -> tuple[Any, dict[str, Tensor], Callable[..., dict[str, Tensor]]]:
    model, inputs = made(family, 0.2 if circumstance == "dropout everywhere" else None)
    if circumstance == "converted in eval":
        return model.eval(), inputs, one_step
    if circumstance == "two adapters":
        return with_two_adapters(model, family), inputs, two_adapters
    if circumstance == "functional_call":
        return model, inputs, lent_weights
    if circumstance == "shared layer":
        share_layers(model)
    return model, inputs, one_step


CIRCUMSTANCES = ("converted in eval", "dropout everywhere", "two adapters", "functional_call", "shared layer")


def error_of(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The worst parameter's error as a norm. A gradient that cancels (a key's bias) is measured by the others' size."""
    assert ours.keys() == truth.keys()
    usual = torch.stack([g.double().norm() for g in truth.values()]).square().mean().sqrt()
    return max(((ours[n] - g).double().norm() / (g.double().norm() + 0.05 * usual)).item() for n, g in truth.items())


def verdict(model: nn.Module, inputs: dict[str, Tensor], step: Any, truth: dict[str, Tensor], tier: str) -> str:
    """What came of one cell, for the table. "WRONG" is what the hunt is for.

    Adapters with random weights may amplify a layer's rounded input beyond any bound. That it is the rounding shows in
    a finer format, whose error must be smaller, a quarter or so, and in the exact one, which must have none.
    """
    plain = copy.deepcopy(model)
    try:
        convert(model, tier)
        error = error_of(step(model, inputs), truth)
    except (ValueError, RuntimeError, TypeError) as refusal:
        ours = "hf_lowmem/activations" in traceback.extract_tb(refusal.__traceback__)[-1].filename
        return f"refused: {refusal}" if ours and len(str(refusal).split()) > 5 else f"WRONG: {refusal!r}"
    if tier == "checkpoint_fp8" and error >= LOSSY:
        exact, finer = (error_of(step(checkpointed(plain, fmt), inputs), truth) for fmt in ("none", "int8"))
        fine = exact == 0 and finer < error / 2
        return f"{error:.2f}, int8 {finer:.2f}" if fine else f"WRONG {error:.2f}, int8 {finer:.2f}, none {exact:.2f}"
    if tier == "exact":
        return "equal" if error == 0 else f"{error:.0e}" if error < FLOOR else f"WRONG {error:.2f}"
    return f"{error:.2f}" if error < LOSSY else f"WRONG {error:.2f}"


def checkpointed(model: nn.Module, fmt: str) -> nn.Module:
    """A copy of the model with `checkpoint_fp8`'s layers in another format."""
    copied = copy.deepcopy(model)
    for layer in set(find_stack(copied)[1]):
        wrap_layer(layer, fmt)
    return copied


def hunt(family: str, circumstances: tuple[str, ...], tiers: tuple[str, ...]) -> list[str]:
    wrong = []
    for circumstance in circumstances:
        model, inputs, step = prepared(family, circumstance)
        truth = step(copy.deepcopy(model), inputs)
        assert sum(g.abs().sum() for g in truth.values()) > 0
        cells = [verdict(copy.deepcopy(model), inputs, step, truth, tier) for tier in tiers]
        print(f"{family} | {circumstance} | {' | '.join(cells)}")
        wrong += [f"{circumstance}, {t}: {cell}" for t, cell in zip(tiers, cells, strict=True) if "WRONG" in cell]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", HUNTED)
def test_no_family_is_wrong_in_silence(family: str) -> None:
    assert not hunt(family, CIRCUMSTANCES, TIERS)


@pytest.mark.parametrize(
    ("family", "circumstance"),
    [
        ("dinov2", "converted in eval"),
        ("gpt2", "dropout everywhere"),
        ("qwen2", "two adapters"),  # LoKr with rank_dropout
        ("llama", "functional_call"),
        ("bert", "shared layer"),
    ],
)
def test_one_family_in_each_circumstance(family: str, circumstance: str) -> None:
    assert not hunt(family, (circumstance,), ("exact", "fp8_recompute"))
