"""A process's default dtype and default device are the user's for tensors of his own: no state follows them."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.codecs import CODECS
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, slot
from hf_lowmem.optim.state import COUNTS

SHAPE = (96, 64)


def settings() -> list[tuple[str, dict[str, Any]]]:
    """Every method, with what makes tensors of its own."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, cls in OPTIMIZERS.items():
        small = {k: v for k, v in {"rank": 4, "update_gap": 2}.items() if cls.DEFAULTS.get(k, 0) > v}
        found.append((name, small))
        if "rotate" in cls.DEFAULTS:
            found += [(name, small | {"rotate": True, "projection": p}) for p in ("subspace", "svd")]
        if "experts" in cls.DEFAULTS:
            found.append((name, small | {"experts": True}))
    return found


def run(name: str, options: dict[str, Any], *, restore: bool) -> tuple[torch.Tensor, LowMemOptimizer]:
    def make() -> tuple[nn.Parameter, LowMemOptimizer]:
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (3, 24, 64) if options.get("experts") else SHAPE
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))
        return p, OPTIMIZERS[name]([("w", p)], lr=0.01, **options)

    p, optimizer = make()
    for step in range(6):
        if step == 4 and restore:
            q, other = make()
            other.load_state_dict(optimizer.state_dict())
            with torch.no_grad():
                q.copy_(p)
            p, optimizer = q, other
        generator = torch.Generator("cpu").manual_seed(step + 1)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")
        if step == 2:
            p.grad.view(-1)[5] = torch.nan
        optimizer.step()
    return p.detach(), optimizer


DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize(
    ("dtype", "device", "syncs"),
    [
        (*DEFAULTS[0], False),
        (*DEFAULTS[3], True),
        *(pytest.param(*d, w, marks=pytest.mark.slow) for d, w in itertools.product(DEFAULTS, (True, False))),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "options"), settings(), ids=str)
def test_no_state_follows_the_defaults(
    name: str, options: dict[str, Any], dtype: torch.dtype, device: str, syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)
    for codec in ("fp32", "8bit"):
        chosen = options | {"state": codec}
        right, made = run(name, chosen, restore=False)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            got, optimizer = run(name, chosen, restore=True)
            skipped = optimizer.skipped()
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        assert torch.equal(got, right)
        assert skipped == (1, 1, 0)
        (state,), (expected,) = optimizer.state.values(), made.state.values()
        assert {k: (v.dtype, v.device) for k, v in state.items()} == {
            k: (v.dtype, v.device) for k, v in expected.items()
        }
        assert all(torch.equal(v, expected[k]) for k, v in state.items())


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS[:1] + DEFAULTS[3:], ids=str)
@pytest.mark.parametrize(("codec", "store"), list(itertools.product(CODECS, ["bf16_sr", "bf16_ecc"])))
def test_no_codec_and_no_store_follows_the_defaults(codec: str, store: str, dtype: torch.dtype, device: str) -> None:
    ends = []
    for defaults in ((torch.float32, None), (dtype, device)):
        p = nn.Parameter(torch.linspace(-1, 1, 96 * 64, dtype=torch.bfloat16, device="cpu").view(SHAPE))
        torch.set_default_dtype(defaults[0])
        torch.set_default_device(defaults[1])
        try:
            optimizer = OPTIMIZERS["adamw"]([("w", p)], lr=0.01, state=codec, weights=store)
            for step in range(1, 4):
                p.grad = torch.full_like(p, 0.1 * step)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        ends.append({k: v for k, v in optimizer.state[p].items() if k not in COUNTS} | {"weight": p.detach()})
    assert all(v.dtype == ends[1][k].dtype and torch.equal(v, ends[1][k]) for k, v in ends[0].items())
