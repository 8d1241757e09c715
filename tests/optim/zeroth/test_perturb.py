"""Passes at other weights: seen by every reader, and not a bit of the model's own weights changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim.zeroth.draws import Along, normal
from hf_lowmem.optim.zeroth.estimate import shifted
from hf_lowmem.optim.zeroth.perturb import Substitution, layers_of
from tests.optim.zeroth.nets import BATCH, Net


def moved(p: Tensor) -> Tensor:
    return p.detach() * 1.25 + 0.125


def by_hand(model: Net) -> Tensor:
    """The loss of a model whose weights are really others."""
    other = Net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(moved(p))
        return other.loss(BATCH)


def test_a_pass_sees_other_weights_and_leaves_the_model_alone() -> None:
    model = Net()
    before = {name: (id(p), p.detach().clone(), p._version) for name, p in model.named_parameters()}
    forwards = [vars(m).get("forward") for m in model.modules()]
    found = Substitution(model, model.parameters()).run(lambda: model.loss(BATCH).detach(), moved)
    assert torch.equal(found, by_hand(model))
    for name, p in model.named_parameters():
        assert (id(p), p._version) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert model.head.weight is model.embed.weight


def test_an_exception_leaves_the_model_alone() -> None:
    model = Net()
    ids = [id(p) for p in model.parameters()]
    passes = Substitution(model, model.parameters())

    def fails() -> Any:
        model.loss(BATCH)
        raise KeyError("inside")

    def cannot(p: Tensor) -> Tensor:
        if p.shape == (16,):
            raise MemoryError("of a layer")
        return moved(p)

    with pytest.raises(KeyError):
        passes.run(fails, moved)
    with pytest.raises(MemoryError):
        passes.run(lambda: model.loss(BATCH), cannot)
    assert [id(p) for p in model.parameters()] == ids
    assert all("forward" not in vars(m) for m in model.modules())


class ReadElsewhere(Net):
    """A model that reads a layer's weights itself, and never calls it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            inner: Any = layer
            x = x + torch.tanh(x @ inner.up.weight.T) @ inner.down.weight.T
        return self.head(x)


def test_a_layer_that_is_not_entered_is_taken_to_lie_outside() -> None:
    model = ReadElsewhere()
    passes = Substitution(model, model.parameters())
    for _ in range(2):
        found = passes.run(lambda: model.loss(BATCH).detach(), moved)
        other = ReadElsewhere()
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(moved(p))
            assert torch.equal(found, other.loss(BATCH))


def test_layers_are_the_outermost_lists_elements() -> None:
    model = nn.Sequential(Net(), nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})]))
    net, others = model
    assert layers_of(model) == [*net.layers, *others]  # type: ignore[misc]


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="not in the Net"):
        Substitution(Net(), Net().parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_shifted_parameter_is_rounded_once(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(dtype).mul_(0.02))
    z = [normal(seed, 0, p.numel(), p.device).view(p.shape) for seed in (5, 6)]
    found = shifted(p, [(1e-3, 5), (-2e-3, 6)], Along("normal"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (z[0] * 1e-3 + z[1] * -2e-3).to(wide) + p.detach().to(wide)
    assert torch.equal(found, expected.to(dtype))
    assert found.data_ptr() != p.data_ptr()
    # Whatever its place in memory is.
    turned = nn.Parameter(p.detach().t().contiguous().t())
    assert torch.equal(shifted(turned, [(1e-3, 5), (-2e-3, 6)], Along("normal")), found)


def test_in_place_perturbation_drifts_in_bf16() -> None:
    """Why weights are not perturbed in place: w += eps z, -= 2 eps z, += eps z, without any update, 200 times."""
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.02
    drift: dict[torch.dtype, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        w = start.to(dtype)
        for step in range(200):
            z = normal(step, 0, w.numel(), w.device).to(dtype)
            for factor in (1e-3, -2e-3, 1e-3):
                w = w + factor * z
        drift[dtype] = ((w.float() - start.to(dtype).float()).norm() / start.norm()).item()
    assert drift[torch.bfloat16] > 0.03, "of the weights, in 200 steps; 12 % in 1,000"
    assert drift[torch.float32] < 1e-5
