"""A reference that FSDP will cut has the weights of process 0, whatever this process has loaded.

Two real processes: tests/cli/launch, whose reference would be half zeros with the oldest transformers.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.preference.reference import sharded
from tests.conftest import tiny_llama


def test_all_weights_and_buffers_are_those_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = tiny_llama(), tiny_llama()
    for x in (*other.parameters(), *other.buffers()):
        x.detach().zero_()
    other.lm_head.weight = other.model.embed_tokens.weight  # tied: sent once
    sent = iter([x for n, x in (*first.named_parameters(), *first.named_buffers()) if n != "lm_head.weight"])

    def broadcast(x: Tensor, src: int) -> None:
        assert src == 0
        x.copy_(next(sent).detach())

    cut: list[Any] = []
    monkeypatch.setattr(sharded.dist, "broadcast", broadcast)
    monkeypatch.setattr(sharded, "_cut", lambda model, accelerator: cut.append(model) or model)

    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    assert sharded.prepare_fsdp(other, accelerator) is other
    assert cut == [other]
    assert next(sent, None) is None
    for (name, x), y in zip(other.named_parameters(), [p for n, p in first.named_parameters()], strict=False):
        assert torch.equal(x, y), name
        assert x.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(other.buffers(), first.buffers(), strict=True))


def test_what_cannot_be_copied_to_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"'1.weight' is on the meta device.*fsdp_cpu_ram_efficient_loading: false"):
        sharded.take_from_first(model, torch.device("cpu"))
