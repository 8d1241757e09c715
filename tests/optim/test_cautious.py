"""`cautious=True`: what a step leaves out and how much larger the rest is, by every method that has the option."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem import rules
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, StepInBackward, base, make_optimizer, methods_with
from hf_lowmem.optim.cautious import warn_left_out, warn_slower
from hf_lowmem.specs import OptimSpec
from tests.conftest import Mixed, tiny_llama

METHODS = methods_with("cautious")
each = pytest.mark.parametrize("name", METHODS)


def make(name: str, model: nn.Module, **kwargs: Any) -> LowMemOptimizer:
    settings = {k: v for k, v in {"rank": 4, "update_gap": 3}.items() if k in OPTIMIZERS[name].DEFAULTS}
    given: dict[str, Any] = {"lr": 0.01} | settings | kwargs
    return make_optimizer(name, model, **given)


def gradients(model: nn.Module, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw) if p.requires_grad else None


def masked(moved: Tensor, grad: Tensor, batch: bool) -> Tensor:
    """arXiv 2411.16085, algorithm 1, with the mean that the authors' code has now; number by number in float64."""
    parts = zip(moved.double(), grad.double(), strict=True) if batch else [(moved.double(), grad.double())]
    found = []
    for change, g in parts:
        mask = (-change * g > 0).double()
        found.append(change * mask / max(mask.mean().item(), 1e-3))
    return torch.stack(found) if batch else found[0]


def test_the_methods_that_have_it() -> None:
    assert set(METHODS) == {"adamw", "lion", "apollo", "apollo_mini", "galore", "fira", "natural_galore"}
    with pytest.raises(ValueError, match=r"cautious=True is not an option of name='lamb' alone. It belongs to: adamw"):
        make("lamb", Mixed(), cautious=True)
    with pytest.raises(TypeError, match="cautious='yes': expected True or False"):
        make("adamw", Mixed(), cautious="yes")


@each
def test_a_step_is_the_plain_one_without_what_goes_against_the_gradient(name: str) -> None:
    """Moments do not see it, so both have the same ones at each step."""
    plain_model, model = Mixed(), Mixed()
    plain, cautious = make(name, plain_model), make(name, model, cautious=True)
    left_out = 0
    for step in range(6):
        for net, optimizer in ((plain_model, plain), (model, cautious)):
            gradients(net, step)
            for p in net.parameters():
                p.data.zero_()  # from where a step is seen without a rounding
            optimizer.step()
        for p, q in zip(plain_model.parameters(), model.parameters(), strict=True):
            if not q.requires_grad or not q.numel():
                continue
            assert q.grad is not None
            batch = q.ndim == 3 and "rank" in plain.defaults
            expected = masked(p.detach(), q.grad, batch)
            left_out += int((expected == 0).sum())
            torch.testing.assert_close(q.detach().double(), expected, rtol=1e-6, atol=0)
    assert left_out > 100


@each
@pytest.mark.parametrize("state", ["8bit", "int8"])
def test_encoded_states_have_no_kernel_that_forgets_it(name: str, state: str) -> None:
    """Where kernels step plain runs: whole, and matrices in shared launches."""
    model = tiny_llama()
    optimizer = make(name, model, cautious=True, state=state)
    for step in range(4):
        gradients(model, step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.grad is not None
            assert not ((p.detach() - old) * p.grad > 0).any()


@pytest.mark.parametrize("rule", ["adam", "scale", "adam_mini"])
def test_what_it_leaves_alone_is_said(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    """Embedding and head by another rule step as they would without it; linear weights do not."""
    warn_left_out.cache_clear()
    models = [tiny_llama(num_hidden_layers=1) for _ in range(2)]
    for model, cautious in zip(models, (False, True), strict=True):
        optimizer = make("galore", model, embeddings=rule, cautious=cautious)
        for step in range(3):
            gradients(model, step)
            optimizer.step()
    plain, careful = (dict(model.named_parameters()) for model in models)
    same = {name for name in plain if torch.equal(plain[name], careful[name])}
    assert same == (set() if rule == "adam" else {"model.embed_tokens.weight", "lm_head.weight"})
    assert caplog.text.count(f"the rule embeddings={rule!r}") == (rule != "adam")


def test_adamw_against_its_formula() -> None:
    p = nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)))
    optimizer = OPTIMIZERS["adamw"]([p], lr=3e-3, weight_decay=0.1, cautious=True)
    x, m, v = p.detach().double(), torch.zeros(40, 24).double(), torch.zeros(40, 24).double()
    for t in range(1, 51):
        p.grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(t))
        optimizer.step()
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        mask = (m * g > 0).double()
        x = x * (1 - 3e-3 * 0.1) - 3e-3 * u * mask / mask.mean().clamp(min=1e-3)
        assert 0.2 < mask.mean() <= 1
    assert (p - x).abs().max() <= 1e-5


@each
def test_a_run_resumes_and_steps_in_backward_alike(name: str) -> None:
    def train(model: Any, optimizer: LowMemOptimizer, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    settings: dict[str, Any] = {"cautious": True, "state": "8bit"}
    model = tiny_llama()
    optimizer = make(name, model, **settings)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))

    again = tiny_llama()
    again.load_state_dict(saved[0])
    resumed = make(name, again, **settings)
    resumed.load_state_dict(saved[1])
    train(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    other = tiny_llama()
    stepped = make(name, other, **settings)
    stepping = StepInBackward(stepped)
    train(other, stepped, range(6))
    stepping.remove()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@each
def test_no_part_of_a_parameter_is_stepped_alone(name: str) -> None:
    model = tiny_llama()
    optimizer = make(name, model, cautious=True)
    assert {optimizer.slot(p, g).reach for g in optimizer.param_groups for p in g["params"]} == {"whole"}
    assert all(optimizer.rule(p.shape, g) in (name, "adam") for g in optimizer.param_groups for p in g["params"])


def test_who_has_a_kernel_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(base, "kernel_runs", lambda kernel, p, codecs=(): True)
    warn_slower.cache_clear()
    model = tiny_llama()
    optimizer = make("adamw", model, cautious=True)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            gradients(model, step)
            optimizer.step()
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["adamw with cautious=True"]


def test_accumulated_projections_are_no_gradient() -> None:
    """The gradient stays, and who would have it freed is told before."""
    model = tiny_llama()
    optimizer = make("galore", model, cautious=True)
    gradients(model, 0)
    group = optimizer.param_groups[0]
    assert group["rank"] == 4
    assert not optimizer.accumulate_param(group["params"][0], group)
    spec = OptimSpec(name="galore", options={"cautious": True})
    run = rules.Run(optim="galore", spec=spec, in_backward=True, accumulation=4)
    with pytest.raises(ValueError, match="cautious=True compares an update with whole gradients"):
        rules.check(run)
    rules.check(rules.Run(optim="galore", spec=OptimSpec(name="galore"), in_backward=True, accumulation=4))
