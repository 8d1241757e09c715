"""A share of the weights, and a block of layers at a time: what moves, when, and that all promises hold of it."""

import io
from typing import Any

import pytest
import torch

from hf_lowmem.optim.zeroth import put_in_host
from tests.optim.zeroth.nets import BATCH, RATES, Net, directions
from tests.optim.zeroth.test_rules import make, run, values

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "share": ("mezo", {"share": 0.25}),
    "blocks": ("zo_sign", {"block_layers": 1}),
    "both": ("fzoo", {"share": 0.5, "block_layers": 2}),
    "both, tried": ("zo_conservative", {"share": 0.5, "block_layers": 1}),
}
each = pytest.mark.parametrize("way", WAYS)
HOMES = {"layers.0": 0, "layers.1": 1, "embed": 2}


def moved(before: dict[str, torch.Tensor], model: Net) -> dict[str, torch.Tensor]:
    return {n: before[n] != p.detach() for n, p in model.named_parameters()}


def test_the_same_share_of_the_weights_moves_in_each_step() -> None:
    """By seed, name and place; in fp64 a step moves whatever it may move, but for zeros of the direction."""
    model = Net(width=64).double()
    optimizer = make("mezo", model, share=0.25)
    chosen = {n: z != 0 for n, z in directions(optimizer)[0].items()}
    for _ in range(3):
        before = values(model)
        run(model, optimizer, 1)
        assert all(torch.equal(found, chosen[n]) for n, found in moved(before, model).items())
    every = torch.cat([c.flatten() for c in chosen.values()]).float()
    assert abs(every.mean() - 0.25) < 5 * (0.25 * 0.75 / len(every)) ** 0.5
    other = directions(make("mezo", Net(width=64), share=0.25, seed=1))[0]
    assert any(not torch.equal(z != 0, chosen[n]) for n, z in other.items())


def test_one_block_after_the_other_moves_and_what_is_outside_of_layers_last() -> None:
    model = Net()
    optimizer = make("mezo", model, block_layers=1)
    for step in range(7):
        before = values(model)
        run(model, optimizer, 1)
        homes = {HOMES[n.rsplit(".", 1)[0].removesuffix(".up").removesuffix(".down")]
                 for n, found in moved(before, model).items() if found.any()}  # fmt: skip
        assert homes == {step % 3}


@pytest.mark.parametrize("way", ["share", "blocks"])
def test_a_slope_is_autograd_s_along_what_moves(way: str) -> None:
    _, settings = WAYS[way]
    model = Net().double()
    optimizer = make("mezo", model, lr=0.0, perturbation=1e-3, **settings)
    grads = torch.autograd.grad(model.loss(BATCH), list(model.parameters()))
    along = directions(optimizer)[0]
    moving = {id(p) for _, p, _ in optimizer._moving()}
    named = list(model.named_parameters())
    true = sum(float((g * along[n].double()).sum()) for g, (n, p) in zip(grads, named, strict=True) if id(p) in moving)
    run(model, optimizer, 1)
    assert optimizer.slopes[0] == pytest.approx(true, rel=1e-4)


@each
def test_it_goes_on_from_a_file_within_a_round_to_the_bit(way: str) -> None:
    name, settings = WAYS[way]
    settings = settings | {"weights": "bf16_ecc", "lr": RATES[name] / 10}
    model = Net(dropout=0.2, width=64).bfloat16()
    optimizer, file = make(name, model, **settings), io.BytesIO()
    run(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    state = torch.get_rng_state()
    run(model, optimizer, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Net(dropout=0.2, width=64).bfloat16()
    resumed.load_state_dict(saved["model"])
    again = make(name, resumed, **settings)
    again.load_state_dict(saved["optimizer"])
    torch.set_rng_state(state)
    run(resumed, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@each
def test_a_rate_of_zero_moves_nothing_and_the_rule_descends(way: str) -> None:
    name, settings = WAYS[way]
    model = Net()
    before, first = values(model), model.loss(BATCH).item()
    run(model, make(name, model, **settings | {"lr": 0.0}), 4)
    assert not any(found.any() for found in moved(before, model).values())
    run(model, make(name, model, **settings), 60)
    assert model.loss(BATCH).item() < 0.9 * first


@pytest.mark.parametrize("way", ["share", "blocks", "both"])
def test_four_micro_batches_are_one_batch(way: str) -> None:
    name, settings = WAYS[way]
    whole, parts = Net().double(), Net().double()
    one, four = make(name, whole, **settings), make(name, parts, **settings)
    for _ in range(3):
        run(whole, one, 1)
        for part in BATCH.chunk(4):
            four.probe(lambda part=part: parts.loss(part).detach() / 4)
        four.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", ["share", "both", "both, tried"])
def test_layers_in_host_memory_train_to_the_same_bits(way: str) -> None:
    name, settings = WAYS[way]
    plain, hosted = Net(dropout=0.2), Net(dropout=0.2)
    put_in_host(hosted, "cpu")
    for model in (plain, hosted):
        torch.manual_seed(1)
        run(model, make(name, model, **settings), 5)
    for (n, p), (_, q) in zip(plain.named_parameters(), hosted.named_parameters(), strict=True):
        assert torch.equal(p, q), n
