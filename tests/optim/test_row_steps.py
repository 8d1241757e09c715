"""A step by rows has the bits of the step by the whole gradient, whatever stores the states and the weights."""

import copy
import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.codecs import CODECS
from hf_lowmem.kernels import registry
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, StepInBackward, make_optimizer, row_steps, slot
from hf_lowmem.optim.row_steps import unit_of, whole_only
from hf_lowmem.optim.state import Group, Reach, StateDecl
from tests.optim.test_chunked import assert_same

ROWS, COLUMNS = 83, 64  # the last rows are no whole number of blocks of any codec
STORES = ["keep", "bf16_sr", "bf16_ecc"]
# The low-rank family leaves embeddings to one Adam of its own. What takes long is that there are so many.
CHEAP = [("adamw", codec) for codec in (*CODECS, "8bit")] + [(name, "8bit") for name in ("lion", "apollo")]
RULES = ("adamw", "lion", "apollo", "apollo_mini", "galore", "fira", "natural_galore")
EVERY = [
    pytest.param(name, codec, marks=[] if (name, codec) in CHEAP else pytest.mark.slow)
    for name in RULES
    for codec in (*CODECS, "8bit")
]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_numba", lambda: False)
    monkeypatch.setattr(row_steps, "PART", 32 * COLUMNS)


class Head(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Embedding(ROWS, COLUMNS, dtype=dtype)  # every method leaves embeddings to an elementwise rule


def build(name: str, codec: str = "8bit", store: str = "bf16_sr") -> tuple[Tensor, LowMemOptimizer]:
    model = Head(torch.float32 if store == "keep" else torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank without a matrix
        optimizer = make_optimizer(name, model, lr=0.01, state=codec, weights=store, weight_decay=0.1)
    return model.head.weight, optimizer


def gradient(step: int, bad: bool = False) -> Tensor:
    grad = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step))
    if bad:
        grad[-1, -1] = torch.nan
    return grad


def step_whole(p: Tensor, optimizer: LowMemOptimizer, grad: Tensor) -> None:
    p.grad = grad.to(p.dtype)
    optimizer.step()
    p.grad = None


def step_by(rows: int, p: Tensor, optimizer: LowMemOptimizer, grad: Tensor) -> Tensor:
    finite = grad.abs().max() < 1e15
    step = optimizer.step_rows(p, optimizer.param_groups[0], finite)
    with torch.no_grad():
        for first in range(0, ROWS, rows):
            step.take(first, grad[first : first + rows].clone())
        norm = step.close()
    optimizer.step()
    return norm


def bits(p: Tensor, optimizer: LowMemOptimizer) -> dict[str, Any]:
    return {"weight": p.detach(), **optimizer.state_dict()["state"][0]}


@pytest.mark.parametrize("syncs", [True, False], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("name", "codec"), EVERY)
def test_rows_give_the_bits_of_the_whole(
    name: str, codec: str, store: str, syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)
    one, other = build(name, codec, store), build(name, codec, store)
    unit = unit_of(other[0], other[1].slot(other[0], other[1].param_groups[0]))
    assert unit <= ROWS / 2, "more than one block"
    for step in range(3):
        grad = gradient(step, bad=step == 1)
        step_whole(*one, grad)
        norm = step_by(unit * (1 + step), *other, grad)
        assert_same(bits(*other), bits(*one))
        want = torch.linalg.vector_norm(grad.to(one[0].dtype), dtype=torch.float32)
        # Two orders of 13,000 sums in fp32: a few units in the last place for each doubling.
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0.0, equal_nan=True)
    assert other[1].skipped() == one[1].skipped() == (1, 1, 0)


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("name", ["adamw", "lion", "apollo"])
def test_kernels_give_them_too(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if impl == "cpu":
        pytest.importorskip("numba")
        monkeypatch.undo()
        monkeypatch.setattr(row_steps, "PART", 64 * COLUMNS)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HF_LOWMEM_KERNELS", impl)
    one, other = build(name), build(name)
    for step in range(3):
        grad = gradient(step, bad=step == 1)
        step_whole(*one, grad)
        step_by(48, *other, grad)
        assert_same(bits(*other), bits(*one))
    assert other[1].skipped() == one[1].skipped() == (1, 1, 0)


@pytest.mark.parametrize("syncs", [True, False])
def test_a_part_that_is_bad_against_what_was_said_is_left_out_and_counted(
    syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)
    p, optimizer = build("adamw")
    before = p.detach().clone()
    grad = gradient(0, bad=True)
    step = optimizer.step_rows(p, optimizer.param_groups[0], torch.tensor(True))
    with torch.no_grad():
        for first in range(0, ROWS, 32):
            step.take(first, grad[first : first + 32].clone())
        step.close()
    optimizer.step()
    changed = (p.detach() != before).any(1)
    assert changed[:64].all()
    assert not changed[64:].any()
    assert p.isfinite().all()
    assert optimizer.skipped() == (1, 1, 1)


def test_states_are_saved_and_resumed_to_the_same_bits() -> None:
    p, optimizer = build("adamw")
    step_by(32, p, optimizer, gradient(0))
    saved = copy.deepcopy((p.detach(), optimizer.state_dict()))
    q, again = build("adamw")
    with torch.no_grad():
        q.copy_(saved[0])
    again.load_state_dict(saved[1])
    for each in ((p, optimizer), (q, again)):
        step_by(32, *each, gradient(1))
    assert_same(bits(p, optimizer), bits(q, again))


class ByRow(LowMemOptimizer):
    """A momentum, and a number a row that counts what the update divides by."""

    name = "by_row"
    STATES = {
        "momentum": StateDecl(signed=True),
        "size": StateDecl(signed=False, shape=lambda shape, group: shape[:1], coded=False),
    }
    DEFAULTS: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99)}

    @classmethod
    def reach(cls, shape: torch.Size, group: Group) -> Reach:
        return "row"

    def update(self, p: Tensor, grad: Tensor, slot: slot.Slot, group: Group) -> None:
        momentum, size = slot.load("momentum"), slot.load("size")
        momentum.lerp_(grad, 0.1)
        size.lerp_(grad.square().mean(1), 0.01)
        p.sub_(momentum / (size.sqrt() + 1e-8)[:, None], alpha=group["lr"])
        slot.save("momentum", momentum)
        slot.save("size", size)


@pytest.mark.parametrize("store", STORES)
def test_a_rule_that_sees_a_row_is_stepped_by_rows(store: str) -> None:
    made: list[tuple[Tensor, LowMemOptimizer]] = []
    for _ in range(2):
        p = Head(torch.float32 if store == "keep" else torch.bfloat16).head.weight
        made.append((p, ByRow([p], lr=0.01, state="int8", weights=store)))
    for step in range(3):
        step_whole(*made[0], gradient(step, bad=step == 1))
        step_by(32, *made[1], gradient(step, bad=step == 1))
    assert_same(bits(*made[1]), bits(*made[0]))


def test_what_cannot_be_cut_says_why() -> None:
    def why(p: Tensor, name: str, **options: Any) -> str | None:
        optimizer = OPTIMIZERS[name]([p], lr=0.1, **options)
        return whole_only(p, optimizer.slot(p, optimizer.param_groups[0]))

    matrix = nn.Parameter(torch.randn(64, 128))
    assert why(matrix, "adamw") is None
    assert why(nn.Parameter(torch.randn(64)), "adamw") == (
        "it is no matrix that lies in memory row after row (shape (64,))"
    )
    assert "no matrix" in str(why(nn.Parameter(torch.randn(128, 64).t()), "adamw"))
    assert why(matrix, "lamb") == "lamb needs all of a gradient at once"
    assert why(matrix, "galore", rank=4) == "galore needs all of a gradient at once"
    assert "float16" in str(why(nn.Parameter(matrix.detach().half()), "adamw"))


def test_rows_out_of_order_or_cut_through_a_block_are_refused() -> None:
    p, optimizer = build("adamw")
    step = optimizer.step_rows(p, optimizer.param_groups[0], torch.tensor(True))
    with pytest.raises(ValueError, match=r"rows 0 to 3 after 0 of 83: .* multiple of"):
        step.take(0, gradient(0)[:3])
    with pytest.raises(ValueError, match="rows 32 to 64 after 0"):
        step.take(32, gradient(0)[32:64])


def test_in_backward_they_are_known_by_parameter_and_counted_in_the_norm() -> None:
    p, optimizer = build("adamw")
    stepping = StepInBackward(optimizer)
    assert stepping.whole_only(p) is None
    assert stepping.whole_only(torch.zeros(3, 3)) == "it is not a parameter that is stepped in backward"
    step = stepping.step_rows(p, torch.tensor(True))
    with torch.no_grad():
        step.take(0, gradient(0))
    stepping.close_rows(p, step)
    with pytest.raises(RuntimeError, match="a second gradient of it has come"):
        p.float().sum().backward()
    p.grad = None
    optimizer.step()
    assert stepping.grad_norm() == pytest.approx(gradient(0).norm().item(), rel=1e-2)
    p.float().sum().backward()  # the next pass is another one
    stepping.remove()
    assert stepping.whole_only(p) == "it is not a parameter that is stepped in backward"
