"""The option `basis`: a codec for the basis alone, in galore, fira and natural_galore."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem import LowMemTrainingArguments
from hf_lowmem.codecs import CODECS
from hf_lowmem.optim import OPTIMIZERS
from tests.contracts.test_optimizers import same_bits

METHODS = ("galore", "fira", "natural_galore")
RANK = 16


def made(name: str, shape: tuple[int, ...] = (96, 64), state: str = "fp32", **options: Any) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    settings: dict[str, Any] = {"lr": 0.01, "rank": RANK, "update_gap": 2, "basis": "int4"} | options
    return OPTIMIZERS[name]([("p", p)], state=state, **settings), p


def gradient(p: nn.Parameter, seed: int) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + seed))


def stepped(optimizer: Any, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        p.grad = gradient(p, step)
        optimizer.step()


def basis_of(optimizer: Any, p: nn.Parameter) -> Tensor:
    return optimizer.slot(p, optimizer.param_groups[0]).load("basis")


@pytest.mark.parametrize("shape", [(96, 64), (256, 384), (3, 64, 96)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_it_takes_half_a_byte_a_value_and_stays_nearly_orthonormal(name: str, shape: tuple[int, ...]) -> None:
    optimizer, p = made(name, shape, state="8bit")
    stepped(optimizer, p, range(3))
    values = RANK * min(shape[-2:]) * (shape[0] if len(shape) == 3 else 1)
    held = sum(t.nbytes for k, t in optimizer.state[p].items() if k.startswith("basis"))
    assert held == CODECS["int4"].nbytes(values, signed=True) == values // 2 + 4 * values // 128
    assert optimizer.state_bytes(p, optimizer.param_groups[0]) == sum(t.nbytes for t in optimizer.state[p].values())
    lengths = torch.linalg.svdvals(basis_of(optimizer, p))
    assert 0.85 < lengths.min() <= lengths.max() < 1.15
    plain, q = made(name, shape, state="8bit", basis=None)
    stepped(plain, q, range(3))
    assert plain.state[q]["basis.codes"].nbytes == values


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_step_is_the_formula_by_the_decoded_basis(name: str, shape: tuple[int, ...]) -> None:
    """In float64, the first step, from the second moment's start to the weights."""
    optimizer, p = made(name, shape, scale=0.5)
    before = p.detach().double()
    stepped(optimizer, p, range(1))
    basis, grad = basis_of(optimizer, p).double(), gradient(p, 0).double()
    tall = shape[0] >= shape[1]
    (b1, b2), eps = (0.9, 0.999), 1e-6
    low = grad @ basis if tall else basis.T @ grad
    direction = (1 - b1) * low / ((1 - b2) ** 0.5 * low.abs() + eps)
    back = (lambda x: x @ basis.T) if tall else (lambda x: basis @ x)
    update = 0.5 * back(direction)
    if name == "fira":
        dim = 1 if tall else 0
        phi = direction.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        update = update + (grad - back(low)) * phi
    expected = before - 0.01 * (1 - b2) ** 0.5 / (1 - b1) * update
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    whole, p = made(name, state="8bit")
    stepped(whole, p, range(5))
    part, q = made(name, state="8bit")
    stepped(part, q, range(3))
    buffer = io.BytesIO()
    torch.save(part.state_dict(), buffer)
    buffer.seek(0)
    again, r = made(name, state="8bit")
    r.data.copy_(q.data)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    stepped(again, r, range(3, 5))
    assert torch.equal(p, r)
    assert same_bits(whole.state_dict(), again.state_dict())


def test_a_checkpoint_with_another_basis_is_refused_and_an_older_one_is_taken() -> None:
    optimizer, p = made("galore", basis=None)
    stepped(optimizer, p, range(1))
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"basis=None, this optimizer has basis='int4'"):
        made("galore")[0].load_state_dict(saved)
    for group in saved["param_groups"]:
        del group["basis"]  # of a version before there was the option
    made("galore", basis=None)[0].load_state_dict(saved)


@pytest.mark.parametrize(("state", "named"), [("fp32", "fp32"), ("8bit", "int8_softsign"), ("int8,fp8", "int8")])
@pytest.mark.parametrize("name", METHODS)
def test_a_basis_that_is_not_named_is_the_one_of_the_state(name: str, state: str, named: str) -> None:
    """Named or not, it is stored the same: either continues the other, and to the same bits."""
    for before, after in ((None, named), (named, None)):
        whole, p = made(name, state=state, basis=before)
        stepped(whole, p, range(3))
        saved, at = whole.state_dict(), p.detach().clone()
        again, q = made(name, state=state, basis=after)
        q.data.copy_(at)
        again.load_state_dict(saved)
        stepped(whole, p, range(3, 5))
        stepped(again, q, range(3, 5))
        assert torch.equal(p, q)
        assert same_bits(whole.state_dict()["state"], again.state_dict()["state"])


def test_a_small_parameter_keeps_fp32() -> None:
    optimizer, p = made("galore", (48, 32))
    stepped(optimizer, p, range(1))
    assert optimizer.state[p]["basis"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("galore", {"basis": "int5"}, "basis='int5' is not available.*int4"),
        ("galore", {"basis": "8bit"}, "basis='8bit' is not available"),
        ("galore", {"projection": "random"}, "basis='int4' has no effect with projection='random'"),
        ("apollo", {}, "basis='int4' is not an option of name='apollo'"),
    ],
)
def test_what_would_do_nothing_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(name, **options)


def test_the_field_is_optim_args() -> None:
    args = LowMemTrainingArguments("unused", optim="fira", optim_args="basis=int4", use_cpu=True, bf16=False)
    assert args.lowmem_optim_spec().options == {"basis": "int4"}
