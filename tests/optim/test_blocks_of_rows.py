"""Long matrices whose rule sees rows or columns are updated by blocks of rows: the bits of one, in its memory."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowmem.kernels import registry
from hf_lowmem.kernels.spans import CPU_SPAN_PER_THREAD
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, chunked, rows, slot
from hf_lowmem.optim.rows import column_norms
from hf_lowmem.planner.accelerator import as_with_real_tensors
from hf_lowmem.planner.search.updates import own_temporaries
from hf_lowmem.specs import OptimSpec
from tests.optim.test_chunked import assert_same

MATRIX, BATCH = (83, 64), (11, 24, 16)  # the last rows are no whole number of blocks of any codec
STORES = [("keep", torch.float32), ("keep", torch.bfloat16), ("bf16_sr", torch.bfloat16), ("bf16_ecc", torch.bfloat16)]
RULES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "embedding by scale": (MATRIX, "apollo_mini", {"embeddings": "scale", "role": "embedding"}),
    "tied head by scale": (MATRIX, "apollo_mini", {"embeddings": "scale", "role": "head"}),
    "embedding by adam_mini": (MATRIX, "apollo_mini", {"embeddings": "adam_mini", "role": "embedding"}),
    "scale": (MATRIX, "scale", {}),
    "scale, Conv1D": (MATRIX, "scale", {"outputs": -1}),
    "scale, experts": (BATCH, "scale", {"experts": True}),
    "sinkgd, experts": (BATCH, "scale", {"experts": True, "sinkhorn_iters": 2}),
    "adam_mini": (MATRIX, "adam_mini", {}),
    "adam_mini, experts": (BATCH, "adam_mini", {"experts": True}),
}
BY_COLUMNS = ["embedding by scale", "scale, Conv1D"]
# Weights, gradient, update and their copies to go back to, momentum and its root; two more while a codec encodes.
MOST = 8


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_numba", lambda: False)
    monkeypatch.setattr(rows, "PIECE", 20 * 64)


def build(rule: str, store: str, dtype: torch.dtype, state: str = "8bit") -> tuple[Tensor, LowMemOptimizer]:
    shape, name, options = RULES[rule]
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a store that has nothing to store
        group: dict[str, Any] = {"params": [p]} | ({"rank": None} if "rank" in OPTIMIZERS[name].DEFAULTS else {})
        return p, OPTIMIZERS[name]([group], lr=0.01, state=state, weights=store, weight_decay=0.1, **options)


def step(p: Tensor, optimizer: LowMemOptimizer, number: int, bad: float | None = None) -> None:
    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    if bad is not None:
        grad.view(-1)[-1] = bad
    p.grad = grad.to(p.dtype)
    optimizer.step()


def bits(p: Tensor, optimizer: LowMemOptimizer) -> dict[str, Any]:
    found = {"weight": p.detach(), **optimizer.state_dict()["state"].get(0, {})}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


@pytest.mark.parametrize("syncs", [True, False], ids=["cpu", "as on a device"])
@pytest.mark.parametrize(("store", "dtype"), STORES, ids=["fp32", "bf16", "bf16_sr", "bf16_ecc"])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_give_the_bits_of_one_and_a_bad_gradient_leaves_all_of_them(
    rule: str, store: str, dtype: torch.dtype, syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)
    blocks: list[int] = []
    inner = slot.Slot.chunk
    monkeypatch.setattr(slot.Slot, "chunk", lambda *a, **kw: (blocks.append(kw["rows"]), inner(*a, **kw))[1])
    one, other = build(rule, store, dtype), build(rule, store, dtype)
    for number, bad in enumerate((None, torch.inf, None, torch.nan, None)):
        monkeypatch.setattr(chunked, "PART", 1 << 22)
        step(*one, number, bad)
        assert not blocks
        before = bits(*other)
        monkeypatch.setattr(chunked, "PART", 32 * 64)
        step(*other, number, bad)
        left_out = syncs and bad is not None  # known before the first block is cut
        assert len(blocks) > 1 or left_out
        assert sum(blocks) == (0 if left_out else len(other[0]))
        blocks.clear()
        after = bits(*other)
        assert_same(after, bits(*one))
        changed = {k for k in after if k not in before or not torch.equal(after[k], before[k])}
        assert changed == {"step"} if bad is not None else "weight" in changed
    assert other[1].skipped() == one[1].skipped() == (2, 2, 0)


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("rule", ["tied head by scale", "embedding by adam_mini"])
def test_whatever_stores_the_states(rule: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (build(rule, "bf16_sr", torch.bfloat16, state) for _ in range(2))
    for number in range(3):
        step(*one, number)
    monkeypatch.setattr(chunked, "PART", 32 * 64)
    for number in range(3):
        step(*other, number)
    assert_same(bits(*other), bits(*one))


@pytest.mark.parametrize("rule", BY_COLUMNS)
def test_columns_are_those_of_the_whole_gradient(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PART", 32 * 64)
    p, optimizer = build(rule, "keep", torch.float32)
    before = p.detach().double()
    step(p, optimizer, 0)
    assert p.grad is not None
    grad = p.grad.double()
    want = before * (1 - 0.01 * 0.1) - 0.01 * grad / grad.square().mean(0).sqrt()
    torch.testing.assert_close(p.detach().double(), want, rtol=0.0, atol=1e-6)  # a few 2**-24 of weights below 4


def test_norms_do_not_depend_on_the_pieces_of_who_asks() -> None:
    grad = torch.randn(83, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = column_norms(grad)
    assert found.dtype == torch.float32
    assert torch.equal(found, column_norms(grad.float()))
    torch.testing.assert_close(found, grad.double().norm(dim=0, keepdim=True).float())


def test_what_sees_the_whole_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PART", 32 * 64)
    cases: dict[str, dict[str, Any]] = {
        "scale": {"sinkhorn_iters": 2},
        "muon": {},
        "adam_mini": {"outputs": -1},
        "lamb": {},
    }
    for name, options in cases.items():
        p = nn.Parameter(torch.randn(MATRIX))
        optimizer = OPTIMIZERS[name]([p], lr=0.01, **options)
        p.grad = torch.randn(MATRIX)
        assert not chunked.can_chunk(p, optimizer.slot(p, optimizer.param_groups[0])), name


@pytest.mark.train
@pytest.mark.parametrize(
    ("name", "rule", "store"),
    [
        ("scale", "scale", "keep"),
        ("scale", "scale", "bf16_sr"),
        ("scale", "scale", "bf16_ecc"),
        ("adam_mini", None, "bf16_sr"),
    ],
)
def test_temporaries_are_those_of_a_block_however_long_the_matrix(
    name: str, rule: str | None, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PART", 1 << 20)
    monkeypatch.setattr(rows, "PIECE", 1 << 20)
    taken = []
    for length in (2, 3):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model = nn.Embedding(length * chunked.PART // 1024, 1024, dtype=torch.bfloat16)
        with as_with_real_tensors():
            spec = OptimSpec(name=name, state="8bit", embeddings=rule, weights=store)
            taken.append(own_temporaries(spec, model, fake, layers=False))
    random_bits = 2 * 4 * CPU_SPAN_PER_THREAD  # of one span: the words and a shifted copy
    numbers = 64 * 1024  # of rows, of columns, of what is finite
    assert taken[0] == taken[1] <= MOST * 4 * chunked.PART + random_bits + numbers
