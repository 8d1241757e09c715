"""Seeds of stochastic rounding: no draw from torch's generator, and the same ones in a resumed run."""

import copy
from typing import Any

import pytest
import torch

from hf_lowmem.activations import at_step, convert, undo
from hf_lowmem.activations.blocks import patches
from hf_lowmem.activations.seeds import Seeds
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import batch, build, loss_and_gradients

LOSSY = ("fp8_recompute", "checkpoint_fp8", "hooks_fp8", "fp8:0,checkpoint_fp8:1")


def random(tiers: str) -> ActivationSpec:
    return ActivationSpec(tiers=tiers, stochastic=True)


@pytest.mark.parametrize("tiers", LOSSY)
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.2}),
    ],
)
def test_dropout_masks_are_those_of_the_plain_model(tiers: str, family: str, dropout: dict[str, Any]) -> None:
    model = build(family, **dropout)
    loss, _ = loss_and_gradients(model, batch())
    state = torch.get_rng_state()
    convert(model, random(tiers))
    ours, _ = loss_and_gradients(model, batch())
    assert torch.equal(loss, ours)
    assert torch.equal(torch.get_rng_state(), state), "and so the next step's masks are"


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in loss_and_gradients(model, batch())[1].values()])


@pytest.mark.parametrize("tiers", LOSSY)
def test_each_pass_rounds_otherwise_and_a_step_can_be_had_again(tiers: str) -> None:
    model = build("llama")
    torch.manual_seed(5)
    convert(model, random(tiers))
    other = copy.deepcopy(model)
    first, second = gradients(model), gradients(model)
    assert not torch.equal(first, second), "two micro-batches of a step"
    at_step(model, 7)
    seventh = gradients(model)
    assert not torch.equal(seventh, second)
    for _ in range(3):
        gradients(other)
    at_step(other, 7)  # resumed there, after as many passes as it likes
    assert torch.equal(gradients(other), seventh)
    assert not torch.equal(gradients(other), seventh)


@pytest.mark.parametrize("said", [False, True])
def test_the_seed_of_the_run_is_said_or_torch_s(said: bool) -> None:
    found = []
    for seed in (5, 5, 6):
        model = build("llama")
        torch.manual_seed(0 if said else seed)
        convert(model, ActivationSpec(tiers="fp8", stochastic=True, seed=seed if said else None))
        found.append(gradients(model))
        undo(model)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_two_seeds_are_alike() -> None:
    """Of three runs, four layers, five steps, six passes: 360 numbers that a kernel takes."""
    found = set()
    for base in range(3):
        for layer in range(4):
            seeds = Seeds(base, layer)
            for step in range(5):
                seeds.at(step)
                found |= {seeds() for _ in range(6)}
    assert len(found) == 360
    assert all(0 <= seed < 2**62 for seed in found)


def test_nothing_is_counted_where_nothing_is_random() -> None:
    model = build("llama")
    convert(model, "fp8:0,hooks_fp8:1")
    assert all(getattr(patch, "seeds", None) is None for patch in patches(model))
    at_step(model, 3)


@pytest.mark.parametrize("tiers", ["fp8", "exact"])
def test_converting_draws_nothing(tiers: str) -> None:
    """Modules are tried with dropout on, to see whether they can be run again."""
    model = build("gpt2", attn_pdrop=0.1, resid_pdrop=0.1)
    state = torch.get_rng_state()
    convert(model, tiers)
    assert torch.equal(torch.get_rng_state(), state)
