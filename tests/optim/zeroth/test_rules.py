"""What every method of zeroth order promises: its estimate, its rule, and that a run can be made again to the bit."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem.optim import ALL_METHODS, OPTIMIZERS, ZEROTH, ZerothOrder, make_optimizer
from tests.optim.zeroth.nets import BATCH, RATES, Net, directions

each = pytest.mark.parametrize("name", ZEROTH)


def make(name: str, model: Net, **settings: Any) -> ZerothOrder:
    chosen: dict[str, Any] = {"lr": RATES[name]} | settings
    made = make_optimizer(name, model, **chosen)
    assert isinstance(made, ZerothOrder)
    return made


def values(model: Net) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(model: Net, optimizer: ZerothOrder, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(lambda: model.loss(BATCH).detach())


def test_the_table_is_one() -> None:
    assert {**OPTIMIZERS, **ZEROTH} == ALL_METHODS
    assert not OPTIMIZERS.keys() & ZEROTH.keys()


def estimated(model: Net, perturbation: float, **settings: Any) -> tuple[list[float], list[float]]:
    """Slopes of the loss along the next directions: estimated, and autograd's."""
    optimizer = make("mezo", model, lr=0.0, perturbation=perturbation, **settings)
    along = directions(optimizer)
    grads = torch.autograd.grad(model.loss(BATCH), list(model.parameters()))
    named = dict(zip([n for n, _ in model.named_parameters()], grads, strict=True))
    true = [sum(float((named[n] * z.double()).sum()) for n, z in zs.items()) for zs in along]
    run(model, optimizer, 1)
    return [slope * optimizer.probes for slope in optimizer.slopes], true


def test_a_slope_is_autograd_s_up_to_the_square_of_the_perturbation() -> None:
    """In fp64: with a tenth of the perturbation a hundredth of the error."""
    model = Net().double()
    (wide,), (true,) = estimated(model, 1e-2)
    (near,), _ = estimated(model, 1e-3)
    assert abs(near - true) < 1e-4 * abs(true)
    assert abs(wide - true) / abs(near - true) == pytest.approx(100, rel=0.05)


def test_several_probes_are_several_directions() -> None:
    found, true = estimated(Net().double(), 1e-4, probes=3)
    assert found == pytest.approx(true, rel=1e-5)
    assert len({round(slope, 6) for slope in found}) == 3


def test_the_estimate_is_the_gradient_on_average() -> None:
    """A mean of n estimates is off by sqrt(d / n) of the gradient, for d weights."""
    model = Net().double()
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(model.loss(BATCH), list(model.parameters()))])
    before, n = values(model), 200
    optimizer = make("mezo", model, lr=1.0, probes=n, perturbation=1e-4)
    run(model, optimizer, 1)
    mean = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])
    error = ((mean - grads).norm() / grads.norm()).item()
    assert error == pytest.approx(math.sqrt(grads.numel() / n), rel=0.2)


def expected(name: str, optimizer: ZerothOrder, grads: list[dict[str, Tensor]], start: dict[str, Tensor]) -> Any:
    """What a rule makes of estimates, in fp64, by its formula."""
    lr, decay = RATES[name], 0.1
    w = {n: v.double() for n, v in start.items()}
    m = {n: torch.zeros_like(v) for n, v in w.items()}
    v, top = ({n: torch.zeros_like(x) for n, x in w.items()} for _ in range(2))
    for t, us in enumerate(grads, start=1):
        for n, u in us.items():
            w[n] = w[n] * (1 - lr * (decay if w[n].ndim >= 2 else 0.0))
            if name in ("mezo", "zo_conservative", "fzoo"):
                w[n] -= lr * u
            elif name == "zo_sign":
                w[n] -= lr * u.sign()
            elif name == "zo_momentum":
                m[n] = 0.9 * m[n] + u
                w[n] -= lr * m[n]
            else:
                m[n] = 0.9 * m[n] + 0.1 * u
                v[n] = 0.999 * v[n] + 0.001 * u**2
                top[n] = torch.maximum(top[n], v[n])
                root = (v[n] / (1 - 0.999**t)).sqrt() if name == "zo_adam" else top[n].sqrt()
                w[n] -= lr * m[n] / (1 - 0.9**t if name == "zo_adam" else 1) / (root + 1e-8)
    return w


@each
def test_an_update_is_the_rule_s_formula(name: str) -> None:
    """Five steps in fp64 with decay; states are fp32, 2**-24 each."""
    model = Net().double()
    start = values(model)
    optimizer = make(name, model, weight_decay=0.1)
    grads: list[dict[str, Tensor]] = []
    for _ in range(5):
        along = directions(optimizer)
        run(model, optimizer, 1)
        slopes = optimizer.slopes
        us = {n: sum(s * along[i][n].double() for i, s in enumerate(slopes)) for n in start}
        grads.append(us)  # type: ignore[arg-type]
    for n, w in expected(name, optimizer, grads, start).items():
        largest = max(1.0, *(float(us[n].abs().max()) for us in grads))
        torch.testing.assert_close(model.get_parameter(n).detach(), w, rtol=0, atol=RATES[name] * 2e-6 * largest, msg=n)


def test_fzoo_divides_by_the_spread_of_its_losses() -> None:
    model = Net().double()
    optimizer = make("fzoo", model, lr=0.0, probes=4)
    seen: list[float] = []
    optimizer.step(lambda: seen.append(float(model.loss(BATCH).detach())) or seen[-1])
    here, *there = seen
    spread = torch.tensor(there, dtype=torch.float64).std().item()
    assert optimizer.slopes == pytest.approx([(x - here) / (4 * 1e-3 * spread) for x in there])
    flat = make("fzoo", model)
    before = values(model)
    flat.step(lambda: 1.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "equal losses move nothing"


def test_conservative_takes_the_best_of_three() -> None:
    """On a loss that rises whatever is done, it stays; where it falls, it goes as mezo does, and never up."""
    model, plain = Net().double(), Net().double()
    optimizer, mezo = make("zo_conservative", model), make("mezo", plain)
    optimizer.step(lambda: model.loss(BATCH).detach())
    run(plain, mezo, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    far, before = make("zo_conservative", model, lr=100.0), values(model)
    run(model, far, 1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    last = math.inf
    for _ in range(10):
        run(model, optimizer, 1)
        now = model.loss(BATCH).item()
        assert now <= last + 1e-12
        last = now


@pytest.mark.train
@each
def test_descends(name: str) -> None:
    model = Net()
    optimizer = make(name, model)
    first = model.loss(BATCH).item()
    run(model, optimizer, 60)
    assert model.loss(BATCH).item() < 0.85 * first


@each
@pytest.mark.parametrize("store", ["keep", "bf16_sr", "bf16_ecc"])
def test_with_a_rate_of_zero_no_bit_changes(name: str, store: str) -> None:
    """100 steps in bf16: neither the passes nor the writing of an update of zero."""
    model = Net().bfloat16()
    before = values(model)
    run(model, make(name, model, lr=0.0, weights=store), 100 if (name, store) == ("mezo", "bf16_sr") else 3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@each
def test_a_run_is_made_again_to_the_bit_and_goes_on_from_a_file(name: str) -> None:
    settings: dict[str, Any] = {"lr": RATES[name] / 50}  # at a width of 512
    settings |= {"state": "8bit"} if ZEROTH[name].STATES else {}
    ends = []
    for _ in range(2):
        model = Net(width=512).bfloat16()
        optimizer = make(name, model, weights="bf16_sr", seed=3, **settings)
        run(model, optimizer, 2)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        run(model, optimizer, 2)
        ends.append(values(model))
    file.seek(0)  # type: ignore[possibly-undefined]
    saved = torch.load(file, weights_only=True)
    resumed = Net(width=512).bfloat16()
    resumed.load_state_dict(saved["model"])
    optimizer = make(name, resumed, weights="bf16_sr", seed=3, **settings)
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, 2)
    ends.append(values(resumed))
    assert all(torch.equal(ends[0][n], other[n]) for other in ends[1:] for n in other)
    other = Net(width=512).bfloat16()
    run(other, make(name, other, weights="bf16_sr", seed=4, **settings), 4)
    assert any(not torch.equal(ends[0][n], v) for n, v in values(other).items()), "another seed is another run"


@pytest.mark.parametrize("name", [name for name in ZEROTH if ZEROTH[name].ACCUMULATES_LOSSES])
def test_four_micro_batches_are_one_batch(name: str) -> None:
    """Losses add up: in fp64 no more apart than sums in another order, over the perturbation."""
    whole, parts = Net().double(), Net().double()
    ids = torch.arange(12).repeat(4)
    one, four = make(name, whole), make(name, parts)
    for _ in range(3):
        one.step(lambda: whole.loss(ids).detach())
        for part in ids.chunk(4):
            four.probe(lambda part=part: parts.loss(part).detach() / 4)
        four.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_passes_of_one_probe_have_the_same_dropout() -> None:
    model = Net(dropout=0.5).double()
    optimizer = make("mezo", model, lr=0.0, perturbation=1e-9)
    losses: list[float] = []
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.step(lambda: losses.append(float(model.loss(BATCH).detach())) or losses[-1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4, "and the next step another"


def test_frozen_parameters_are_not_perturbed() -> None:
    model = Net()
    model.embed.weight.requires_grad_(False)
    before = values(model)
    seen: list[bool] = []
    optimizer = make("mezo", model)
    optimizer.step(lambda: seen.append(model.head.weight is model.embed.weight) or model.loss(BATCH).detach())
    assert seen == [True, True]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - {"embed.weight"}


@each
def test_a_loss_that_is_no_number_moves_nothing_and_is_counted(name: str) -> None:
    model = Net()
    optimizer = make(name, model)
    run(model, optimizer, 1)
    before = values(model)
    optimizer.step(lambda: math.nan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.skipped().steps == 1
    run(model, optimizer, 1)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@each
def test_state_bytes_are_what_is_promised(name: str) -> None:
    model = Net(width=512)
    optimizer = make(name, model, **({"state": "8bit"} if ZEROTH[name].STATES else {}))
    run(model, optimizer, 1)
    promised = sum(optimizer.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"])
    held = sum(v.nbytes for raw in optimizer.state.values() for v in raw.values())
    assert held == promised
    if not ZEROTH[name].STATES:
        assert held == 16 * len(list(model.parameters())), "two whole numbers"


def backward(model: Net, optimizer: ZerothOrder) -> None:
    model.loss(BATCH).backward()
    optimizer.probe(lambda: model.loss(BATCH).detach())
    optimizer.step()


def twice(model: Net, optimizer: ZerothOrder) -> None:
    for _ in range(2):
        optimizer.probe(lambda: model.loss(BATCH).detach())


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Net, ZerothOrder], Any], str]] = {
    "gradients": ("mezo", {}, backward, "has no use for them"),
    "no loss": ("mezo", {}, lambda model, optimizer: optimizer.step(), "knows no loss"),
    "a loss in 16 bits": ("mezo", {}, lambda m, o: o.probe(lambda: m.loss(BATCH).bfloat16()), "the loss is bfloat16"),
    "no model": ("mezo", {}, lambda m, o: ZEROTH["mezo"](m.named_parameters()).probe(lambda: 1.0), "has no model"),
    "a window": ("zo_conservative", {}, twice, "a window has one micro-batch"),
    "a state of none": ("mezo", {"state": "8bit"}, lambda *_: None, "state='8bit' has no effect"),
    "betas": ("fzoo", {"betas": (0.9, 0.99)}, lambda *_: None, "has no effect with name='fzoo'"),
    "momentum": ("zo_momentum", {"momentum": 1.0}, lambda *_: None, "momentum=1.0"),
    "another's option": ("mezo", {"momentum": 0.9}, lambda *_: None, "zo_momentum. Leave it out"),
    "perturbation": ("mezo", {"perturbation": 0.0}, lambda *_: None, "perturbation=0.0"),
    "probes": ("mezo", {"probes": 0}, lambda *_: None, "probes=0"),
    "no share": ("mezo", {"share": 0.0}, lambda *_: None, "share=0.0"),
    "a share of all": ("fzoo", {"share": 1.0}, lambda *_: None, "share=1.0"),
    "no layers": ("mezo", {"block_layers": 0}, lambda *_: None, "block_layers=0"),
    "blocks of states": ("zo_adam", {"block_layers": 1}, lambda *_: None, "states of all blocks would be kept"),
    "a spread of one": ("fzoo", {"probes": 1}, lambda *_: None, "probes=1: must be at least 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case: str) -> None:
    name, settings, act, said = REFUSED[case]
    model = Net()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        act(model, make(name, model, **settings))
    assert said in str(caught.value)


def test_a_window_is_forgotten_with_the_gradients() -> None:
    model = Net()
    optimizer = make("mezo", model)
    optimizer.probe(lambda: model.loss(BATCH).detach())
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="knows no loss"):
        optimizer.step()
