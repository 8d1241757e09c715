"""A step of weights at rest: every rule writes codes, which are those of an fp32 weight with that step."""

from typing import Any

import pytest
import torch

from hf_lowmem.optim import OPTIMIZERS, StepInBackward, chunked, fused, make_optimizer
from hf_lowmem.optim.lowrank import apollo
from hf_lowmem.weights import AtRest, at_rest, int8, resting
from tests.contracts.test_optimizers import options
from tests.weights.test_rest import llama, loss_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in OPTIMIZERS},
    "sinkhorn": ("scale", {"sinkhorn_iters": 2}),
    "an embedding by columns": ("apollo_mini", {"embeddings": "scale"}),
    "an embedding by rows": ("muon", {"embeddings": "adam_mini"}),
    "cautious": ("adamw", {"cautious": True}),
    "cautious low rank": ("apollo_mini", {"cautious": True}),
}


def groups_of(optimizer: Any) -> dict[int, Any]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_an_fp32_weight_with_that_step(case: str) -> None:
    name, settings = CASES[case]
    settings = {"lr": 0.01, "weight_decay": 0.1, "state": "8bit"} | options(name) | settings
    model, plain = llama(num_hidden_layers=1), llama(num_hidden_layers=1).float()
    optimizer = make_optimizer(name, model, weights="int8_sr", **settings)
    groups, pairs = groups_of(optimizer), list(zip(model.parameters(), plain.parameters(), strict=True))
    twin = make_optimizer(name, plain, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        before = []
        for p, q in pairs:
            kept = at_rest(p)
            with torch.no_grad():
                q.copy_(p if kept is None else kept.load())
            before.append(None if kept is None else [t.clone() for t in kept.stored()])
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        twin.step()
        for (p, q), old in zip(pairs, before, strict=True):
            optimizer.step_param(p, groups[id(p)])
            kept = at_rest(p)
            if kept is None or old is None:
                continue
            seed = optimizer.slot(p, groups[id(p)]).weight_seed
            first = old[0].clone()
            int8.encode_(q.detach().view(-1), *old, group=kept.group, seed=seed)
            assert all(map(torch.equal, kept.stored(), old)), kept.name
            assert not torch.equal(kept.codes, first), kept.name
    assert len(resting(model)) == 8


def test_a_thousand_steps_of_no_gradient_change_nothing() -> None:
    """All the way an optimizer goes: gradients of zero, no weight decay, codes drawn anew in each step."""
    model = llama(num_hidden_layers=1)
    optimizer = make_optimizer("adamw", model, lr=1e-2, weight_decay=0.0, state="8bit", weights="int8_sr")
    p = model.model.layers[0].self_attn.k_proj.weight
    kept, group = at_rest(p), groups_of(optimizer)[id(p)]
    assert kept is not None
    before = [t.clone() for t in kept.stored()]
    for _ in range(1000):
        p.grad = torch.zeros(p.shape, dtype=p.dtype)
        optimizer.step_param(p, group)
    assert kept.writes[0] > 1000
    assert all(map(torch.equal, kept.stored(), before))


@pytest.mark.parametrize("name", ["adamw", "apollo_mini"])
def test_no_kernel_takes_a_weight_at_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, it is the loop that knows the codes; nor does anybody step it by rows."""
    for module in (fused, apollo):
        monkeypatch.setattr(module, "kernel_runs", lambda *_: True)
    monkeypatch.setattr("hf_lowmem.optim.base.kernel_runs", lambda *_: True)
    found = {}
    for weights in ("int8_sr", "bf16_sr"):
        model = llama(num_hidden_layers=1)
        optimizer = make_optimizer(name, model, state="8bit", weights=weights, **options(name))
        stepping = StepInBackward(optimizer)
        loss_of(model)
        p, groups = model.model.layers[0].mlp.up_proj.weight, groups_of(optimizer)
        group = groups[id(p)]
        p.grad = torch.ones_like(p, dtype=p.dtype)
        slot = optimizer.slot(p, group)
        takes = optimizer.steps_together if slot.low_rank else optimizer._fuses
        found[weights] = takes(p, slot, group, {}), stepping.whole_only(model.model.embed_tokens.weight)
        p.grad = None
        stepping.remove()
    assert found == {"int8_sr": (False, "it is at rest in int8"), "bf16_sr": (True, None)}


def test_rows_of_a_weight_at_rest_are_refused() -> None:
    model = llama(num_hidden_layers=1)
    optimizer = make_optimizer("adamw", model, weights="int8_sr")
    p = model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight is at rest in int8"):
        optimizer.step_rows(p, groups_of(optimizer)[id(p)], torch.tensor(True))


QUICK = ("adamw", "apollo_mini", "muon", "scale")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_every_method_steps_codes_in_backward(name: str) -> None:
    """As it steps bf16_sr weights whose rounding is another: the first step's direction, and a loss that falls."""
    model = llama()
    optimizer = make_optimizer(name, model, lr=0.02 if name == "lamb" else 2e-3, weights="int8_sr", **options(name))
    stepping = StepInBackward(optimizer)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is None for p in model.parameters())
    assert all(at_rest(p) is not None for p in model.model.layers.parameters() if p.ndim == 2)
    stepping.remove()


def test_a_long_weight_is_stepped_in_chunks_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 24, 1024):
        for module in ("chunked", "loaded_state"):
            monkeypatch.setattr(f"hf_lowmem.optim.{module}.CHUNK", chunk)
        model = llama()
        optimizer = make_optimizer("adamw", model, lr=1e-2, state="int8", weights="int8_sr")
        stepping = StepInBackward(optimizer)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
        stepping.remove()
        found.append(resting(model))
    assert all(torch.equal(found[0][n].codes, found[1][n].codes) for n in found[0])


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_what_is_not_finite_leaves_codes_as_they_were(where: str) -> None:
    model = llama()
    optimizer = make_optimizer("adamw", model, lr=1e-3 if where == "gradient" else 1e37, weights="int8_sr")
    if where == "update":
        optimizer.update = lambda p, *_: p.fill_(torch.inf)  # type: ignore[method-assign]
    stepping = StepInBackward(optimizer)
    before = {n: w.codes.clone() for n, w in resting(model).items()}
    loss = loss_of(model)
    (loss * (float("nan") if where == "gradient" else 1)).backward()
    optimizer.step()
    assert all(torch.equal(w.codes, before[n]) for n, w in resting(model).items())
    assert all(w.scale.isfinite().all() for w in resting(model).values())
    assert optimizer.skipped().steps == 1
    stepping.remove()


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("apollo_mini", {"embeddings": "scale", "rank": 1}),
    ("apollo_mini", {"embeddings": "adam_mini"}),
    ("scale", {}),
    ("adam_mini", {}),
]


@pytest.mark.parametrize(("name", "settings"), ROWS)
def test_codes_are_stepped_by_blocks_of_rows_to_the_same_bits(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, AtRest]] = []
    cut: list[AtRest | None] = []
    inner = chunked._blocks_of
    monkeypatch.setattr(chunked, "_blocks_of", lambda p, slot: cut.append(slot.rest) or inner(p, slot))
    for part in (1 << 22, 1024):
        monkeypatch.setattr(chunked, "PART", part)
        cut.clear()
        model = llama()
        optimizer = make_optimizer(name, model, lr=1e-2, state="8bit", weights="int8_sr", **settings)
        stepping = StepInBackward(optimizer)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
        stepping.remove()
        found.append(resting(model))
        assert any(kept is not None for kept in cut) == (part == 1024)
    whole, blocks = found
    assert all(torch.equal(whole[n].codes, blocks[n].codes) for n in whole)
    assert all(torch.equal(whole[n].scale, blocks[n].scale) for n in whole)
