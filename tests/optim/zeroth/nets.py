"""A small model with layers, a tied head and dropout, and a batch for it."""

import torch
from torch import Tensor, nn

from hf_lowmem.optim.zeroth.estimate import ZerothOrder


class Layer(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 16), nn.Linear(16, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Embedding and head share a weight; the loss is a mean over the batch."""

    def __init__(self, dropout: float = 0.0, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, width)
        self.layers = nn.ModuleList([Layer(width, dropout) for _ in range(layers)])
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.mul_(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss(self, ids: Tensor) -> Tensor:
        logits = self(ids)
        wide = logits.float() if logits.dtype == torch.bfloat16 else logits
        return nn.functional.cross_entropy(wide, (ids * 5 + 1) % 12)


BATCH = torch.arange(12).repeat(2)
# At which the rules go far on `Net` in some hundred steps.
RATES = {
    "mezo": 0.02,
    "zo_sign": 0.016,
    "zo_momentum": 2e-3,
    "zo_adam": 0.04,
    "zo_adamm": 0.01,
    "zo_conservative": 0.02,
    "fzoo": 2e-4,
}


def directions(optimizer: ZerothOrder) -> list[dict[str, Tensor]]:
    """The directions of the update that comes next, by name of the parameter: one dict a probe."""
    found: list[dict[str, Tensor]] = [{} for _ in range(optimizer.probes)]
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            slot = optimizer.slot(p, group)
            slot.open(optimizer.state[p])
            for probe, seed in enumerate(optimizer._seeds(slot)):
                along = optimizer._along(slot, group)
                found[probe][name] = along.sum([(1.0, seed)], 0, p.numel(), p.device).view(p.shape)
    return found
