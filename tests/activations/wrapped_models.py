"""Small models and a step of each, for the tests of the tiers that wrap a module's forward."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import tiny_llama


def llama(layers: int = 2, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "use_cache": False}
    return tiny_llama(num_hidden_layers=layers, dtype=dtype, **(sizes | changes)).train()


def loss_of(model: nn.Module, **inputs: Any) -> Tensor:
    ids = torch.arange(2 * 24).view(2, 24) * 7 % 128
    return model(input_ids=ids, labels=ids, **inputs).loss


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of(model, **inputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    assert one[1]
    for name, grad in one[1].items():
        assert torch.equal(grad, two[1][name]), name


class Block(nn.Module):
    """A layer with a dropout, two outputs, and a second differentiable input inside a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.drop = nn.Linear(16, 40), nn.Linear(40, 16), nn.Dropout(0.3)

    def forward(
        self, hidden_states: Tensor, extra: tuple[Tensor, ...] = (), scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        inner = self.drop(torch.tanh(self.up(hidden_states)) * scale)
        for e in extra:
            inner = inner * e
        return hidden_states + self.down(inner), inner.mean()
