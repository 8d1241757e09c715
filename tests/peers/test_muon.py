"""Muon against torch.optim.Muon in its own dtype, and against its formula in float64, fused weights part by part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, MixtralConfig, Phi3Config

from hf_lowmem.optim import OPTIMIZERS, make_optimizer, muon
from tests.peers.gradients import SHAPES, STEPS, gradient, start

SETTINGS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}


@pytest.mark.parametrize("momentum", [0.95, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch_s(shape: tuple[int, int], momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has bf16 for its iteration everywhere."""
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    theirs_p, ours_p = (nn.Parameter(start(shape)) for _ in range(2))
    settings: dict[str, Any] = SETTINGS | {"momentum": momentum}
    theirs = torch.optim.Muon([theirs_p], adjust_lr_fn="match_rms_adamw", **settings)
    ours = OPTIMIZERS["muon"]([ours_p], **settings)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in (theirs, ours)]
    worst = 0.0
    for step in range(STEPS):
        for p, optimizer, schedule in zip((theirs_p, ours_p), (theirs, ours), schedules, strict=True):
            p.grad = gradient(shape, step)
            optimizer.step()
            schedule.step()
        worst = max(worst, (ours_p - theirs_p).abs().max().item())
    moved = (ours_p - start(shape)).abs().max().item()
    print(f"{shape} momentum {momentum}: largest difference {worst:.1e}, moved {moved:.2f}")
    assert moved > 0.05
    assert worst <= 1e-5


class Formula:
    """Of one parameter that is these matrices: pairs of slices."""

    def __init__(self, parts: list[tuple[Any, ...]]) -> None:
        self.parts, self.m = parts, 0.0

    def step(self, x: Tensor, g: Tensor) -> Tensor:
        self.m = 0.95 * self.m + 0.05 * g
        u, direction = 0.05 * g + 0.95 * self.m, torch.zeros_like(x)
        for part in self.parts:
            y = u[part]
            rows, columns = y.shape
            y = y.T if rows > columns else y
            y = y / y.norm()
            for _ in range(5):
                a = y @ y.T
                y = 3.4445 * y + (-4.775 * a + 2.0315 * a @ a) @ y
            direction[part] = 0.2 * max(rows, columns) ** 0.5 * (y.T if rows > columns else y)
        return x * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) - SETTINGS["lr"] * direction


SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32, "pad_token_id": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
ALL = slice(None)


def cuts(*sizes: int) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


CASES: dict[str, tuple[Any, dict[str, list[tuple[Any, ...]]]]] = {
    "phi3": (
        Phi3Config(**SMALL),
        {
            "qkv_proj.weight": [(rows,) for rows in cuts(16, 8, 8)],
            "gate_up_proj.weight": [(rows,) for rows in cuts(24, 24)],
            "o_proj.weight": [(ALL,)],
            "down_proj.weight": [(ALL,)],
        },
    ),
    "gpt2": (
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8),
        {
            "c_attn.weight": [(ALL, columns) for columns in cuts(16, 16, 16)],
            "c_fc.weight": [(ALL,)],
            "c_proj.weight": [(ALL,)],
        },
    ),
    "mixtral": (
        MixtralConfig(**SMALL, num_local_experts=3),
        {
            "gate_up_proj": [(e, rows) for e in range(3) for rows in cuts(24, 24)],
            "experts.down_proj": [(e,) for e in range(3)],
            "q_proj.weight": [(ALL,)],
            "k_proj.weight": [(ALL,)],
            "v_proj.weight": [(ALL,)],
            "o_proj.weight": [(ALL,)],
        },
    ),
    "gpt_oss": (  # gate and up alternate, so they are one matrix here
        GptOssConfig(**SMALL, head_dim=4, num_local_experts=3, num_experts_per_tok=2),
        {
            "experts.gate_up_proj": [(e,) for e in range(3)],
            "experts.down_proj": [(e,) for e in range(3)],
            "q_proj.weight": [(ALL,)],
            "k_proj.weight": [(ALL,)],
            "v_proj.weight": [(ALL,)],
            "o_proj.weight": [(ALL,)],
        },
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_agrees_with_the_formula_and_leaves_the_rest_to_adamw(kind: str) -> None:
    config, matrices = CASES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = make_optimizer("muon", model, **SETTINGS)
    named = dict(model.named_parameters())
    formulas = {n: Formula(parts) for n in named for end, parts in matrices.items() if n.endswith(end)}
    assert len(formulas) == sum(g["role"] == "linear" and len(g["params"]) for g in optimizer.param_groups)
    others = {n: nn.Parameter(p.detach().clone()) for n, p in named.items() if n not in formulas}
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim >= 2)} for p in others.values()],
        lr=SETTINGS["lr"],
        foreach=False,
    )
    truth = {name: named[name].detach().double() for name in formulas}
    for step in range(10):
        for name, p in named.items():
            p.grad = gradient(tuple(p.shape), step)
            if name in formulas:
                truth[name] = formulas[name].step(truth[name], p.grad.double())
            else:
                others[name].grad = p.grad
        optimizer.step()
        adamw.step()
    for name, p in named.items():
        if name not in formulas:
            assert torch.equal(p, others[name]), name
        else:
            # An fp32 iteration that triples the smallest singular values five times; ten steps of 3e-3.
            assert (p.detach().double() - truth[name]).abs().max() <= 1e-5, name


def test_a_module_of_one_s_own_says_its_parts() -> None:
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    model[0].split_sizes = (16, 8)  # type: ignore[assignment]
    assert make_optimizer("muon", model).param_groups[0]["splits"] == [16, 8]
    model[0].split_sizes = (16, 9)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"split_sizes=\(16, 9\) of a Linear with 24 outputs"):
        make_optimizer("muon", model)


def test_singular_values_are_alike_and_updates_as_large_as_adamw_s() -> None:
    p = nn.Parameter(torch.zeros(48, 32))
    optimizer = OPTIMIZERS["muon"]([p], lr=1.0)
    p.grad = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 32)
    optimizer.step()
    values = torch.linalg.svdvals(p.detach()) / (0.2 * 48**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert 0.14 < p.square().mean().sqrt() < 0.24
