"""Long parameters are updated in parts: the same bits as in one piece, in the memory of a part."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowmem.codecs import CODECS
from hf_lowmem.kernels import registry
from hf_lowmem.kernels.spans import CPU_SPAN_PER_THREAD
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, chunked, make_optimizer, slot
from hf_lowmem.planner.accelerator import as_with_real_tensors
from hf_lowmem.planner.search.updates import own_temporaries
from hf_lowmem.specs import OptimSpec

SMALL = 512  # values of a part, two blocks of the longest; the real parts are too long for a test
ELEMENTWISE = [name for name, cls in OPTIMIZERS.items() if cls.ELEMENTWISE]
# Tensors of a part in fp32: weights, gradient, two moments, the root of one; two more while a codec encodes.
MOST = 7
FAMILY = ["apollo", "natural_galore"]  # their embeddings and vectors take Adam


@pytest.fixture(autouse=True)
def _the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, which a CPU has where numba is installed, makes no temporaries and no parts."""
    monkeypatch.setattr(registry, "has_numba", lambda: False)


class Long(nn.Module):
    """The last part of the embedding and its last block are ragged; the second parameter has one value too many."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(71, 67, dtype=dtype)
        self.vector = nn.Parameter(torch.randn(8 * SMALL + 1).to(dtype))


def train(
    name: str, codec: str, store: str = "keep", steps: int = 4, bad: int | None = None
) -> tuple[Long, LowMemOptimizer]:
    model = Long(torch.float32 if store == "keep" else torch.bfloat16)
    optimizer = make_optimizer(name, model, lr=0.01, state=codec, weights=store, weight_decay=0.1)
    for step in range(steps):
        fill(model, step, bad=step == bad)
        optimizer.step()
    return model, optimizer


def fill(model: Long, step: int, *, bad: bool = False) -> None:
    """Gradients of a step, of which the last value of all may be bad."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    if bad:
        assert model.vector.grad is not None
        model.vector.grad[-1] = float("nan")


def bits(model: Long, optimizer: LowMemOptimizer) -> dict[str, Any]:
    found: dict[str, Any] = {k: v.detach() for k, v in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{k}": v for k, v in state.items()}
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for k, v in a.items():
        assert torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k], k


@pytest.mark.parametrize(
    ("store", "syncs"), [("bf16_sr", True), ("bf16_ecc", False)], ids=["bf16_sr", "bf16_ecc as on a device"]
)
@pytest.mark.parametrize("name", ELEMENTWISE + FAMILY)
@pytest.mark.parametrize("codec", list(CODECS))
def test_parts_give_the_bits_of_the_whole(
    codec: str, name: str, store: str, syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)
    whole = bits(*train(name, codec, store, bad=2))
    monkeypatch.setattr(chunked, "CHUNK", SMALL)
    used = []
    inner = slot.Slot.chunk
    monkeypatch.setattr(slot.Slot, "chunk", lambda *a: (used.append(a[0].shape), inner(*a))[1])
    assert_same(bits(*train(name, codec, store, bad=2)), whole)
    # Chunks of both parameters, in all steps; of a bad gradient that is known to be so, none.
    assert len(used) == 4 * (10 + 9) - (9 if syncs else 0)


def test_a_bad_gradient_in_one_part_leaves_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", SMALL)
    for syncs in (True, False):
        monkeypatch.setattr(slot, "reads_are_free", lambda device, w=syncs: w)
        model, optimizer = train("adamw", "int4", steps=3)
        before = copy.deepcopy(bits(model, optimizer))
        fill(model, 9, bad=True)
        optimizer.step()
        after = bits(model, optimizer)
        changed = {k for k, v in after.items() if not torch.equal(v, before[k])} - {"0.step", "1.step"}
        assert changed
        assert "vector" not in changed
        assert not any(k.startswith("1.") for k in changed)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_parts_round_at_random_each_for_itself_and_resume_to_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", SMALL)
    model, optimizer = train(name, "bf16", "bf16_sr")
    with torch.no_grad():
        model.vector.fill_(1.0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = Long(torch.bfloat16)
    again.load_state_dict(saved[0])
    resumed = make_optimizer(name, again, lr=0.01, state="bf16", weights="bf16_sr", weight_decay=0.1)
    resumed.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (again, resumed)):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        o.param_groups[0]["lr"] = o.param_groups[-1]["lr"] = 1e-4
        o.step()
    assert_same(bits(model, optimizer), bits(again, resumed))
    chunks = (model.vector.detach() != 1)[: 8 * SMALL].view(8, SMALL)
    assert 0 < chunks.float().mean() < 1
    assert len({tuple(chunk.tolist()) for chunk in chunks}) == 8, "no two parts have drawn the same numbers"


@pytest.mark.train
@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_temporaries_are_those_of_a_part_however_long_the_parameter(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 1 << 20)
    taken = []
    for length in (2, 4):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model = nn.Embedding(length * chunked.CHUNK // 1024, 1024, dtype=torch.bfloat16)
        with as_with_real_tensors():
            taken.append(own_temporaries(OptimSpec(name="adamw", state=codec), model, fake, layers=False))
    random_bits = 2 * 4 * CPU_SPAN_PER_THREAD  # of one span: the words and a shifted copy
    flags = 16  # of what is finite
    assert taken[0] == taken[1] <= MOST * 4 * chunked.CHUNK + random_bits + flags
