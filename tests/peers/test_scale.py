"""SCALE and SinkGD against their formulas in float64, written naively, for every role that a parameter has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig

from hf_lowmem.optim import OPTIMIZERS, make_optimizer
from tests.conftest import tiny_llama
from tests.peers.gradients import gradient

LR, DECAY, BETAS, EPS, STEPS = 3e-3, 0.1, (0.9, 0.95), 1e-8, 20


class Formula:
    """Algorithm 1 of arXiv 2506.16659 for one parameter; `along`: the dimension that is averaged, None for AdamW."""

    def __init__(self, along: int | None, *, momentum: bool = False, iterations: int = 0, decay: float = DECAY) -> None:
        self.along, self.momentum, self.iterations, self.decay, self.t = along, momentum, iterations, decay, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def step(self, x: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        x = x * (1 - LR * self.decay)
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        if self.along is None:
            m, v = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
            return x - LR * m / (v.sqrt() + EPS)
        u = self.m if self.momentum else g
        for _ in range(self.iterations):  # arXiv 2502.06742: norms of sqrt(n) for rows, then of sqrt(m) for columns
            other = -3 - self.along
            u = u * u.shape[self.along] ** 0.5 / u.norm(dim=self.along, keepdim=True)
            u = u * u.shape[other] ** 0.5 / u.norm(dim=other, keepdim=True)
        if not self.iterations:
            u = u / u.square().mean(self.along, keepdim=True).sqrt().clamp(min=1e-8)
        return x - LR * u


def check(model: nn.Module, formulas: dict[str, Formula], **options: Any) -> None:
    optimizer = make_optimizer("scale", model, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS, **options)
    named = dict(model.named_parameters())
    assert named.keys() == formulas.keys()
    truth = {name: p.detach().double() for name, p in named.items()}
    start = dict(truth)
    for step in range(STEPS):
        for name, p in named.items():
            p.grad = gradient(tuple(p.shape), step)
            truth[name] = formulas[name].step(truth[name], p.grad.double())
        optimizer.step()
    for name, p in named.items():
        # Twenty steps of 3e-3, each off by some 2**-24 of the step and of a weight of at most 1.
        assert (p.detach().double() - truth[name]).abs().max() <= 1e-5, name
        assert (truth[name] - start[name]).abs().max() > 0.01, name


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    formulas = {}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            formulas[name] = Formula(None, decay=0.0)
        elif "embed" in name and not tied:
            formulas[name] = Formula(-2)
        else:
            formulas[name] = Formula(-1, momentum="lm_head" in name or "embed" in name)
    check(model, formulas)


def test_conv1d_s_outputs_are_columns() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8, tie_word_embeddings=False)
    )
    formulas = {}
    for name, p in model.named_parameters():
        along = None if p.ndim < 2 else -2 if ".h." in name or "wte" in name or "wpe" in name else -1
        formulas[name] = Formula(along, momentum="lm_head" in name, decay=DECAY * (p.ndim >= 2))
    check(model, formulas)


def test_fused_experts_that_are_transposed_and_their_biases() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GptOssConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=32,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )
    formulas = {}
    for name, p in model.named_parameters():
        linear = name.endswith(("proj.weight", "experts.gate_up_proj", "down_proj"))
        if linear or "embed" in name or "lm_head" in name:
            along = -2 if p.ndim == 3 or "embed" in name else -1
        else:
            along = None
        formulas[name] = Formula(along, momentum="lm_head" in name, decay=DECAY * (p.ndim >= 2))
    check(model, formulas)


def test_sinkgd_with_adam_for_embedding_and_head() -> None:
    """The setting of its paper."""
    model, formulas = tiny_llama(), {}
    for name, p in model.named_parameters():
        linear = name.endswith("_proj.weight")
        formulas[name] = Formula(-1, iterations=5) if linear else Formula(None, decay=DECAY * (p.ndim >= 2))
    check(model, formulas, sinkhorn_iters=5, embeddings="adam")


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_an_update_s_root_mean_square_is_one_for_each_output(iterations: int) -> None:
    p = nn.Parameter(torch.zeros(40, 24))
    optimizer = OPTIMIZERS["scale"]([p], lr=1.0, sinkhorn_iters=iterations)
    p.grad = gradient((40, 24), 0) * torch.logspace(-6, 6, 40)[:, None]
    optimizer.step()
    tolerance = 1e-5 if iterations == 0 else 0.3  # columns are made alike last
    assert (p.square().mean(1).sqrt() - 1).abs().max() < tolerance
    if iterations:
        assert (p.square().mean(0).sqrt() - 1).abs().max() < 1e-5


def test_rows_without_a_gradient_stay() -> None:
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = OPTIMIZERS["scale"]([{"params": [p], "role": "embedding"}], lr=0.1)
    p.grad = torch.zeros(6, 4)
    p.grad[2] = 5.0
    optimizer.step()
    moved = 1 - p.detach()
    assert not moved[[0, 1, 3, 4, 5]].any()
    # One row of six has all of a column's length: its steps are sqrt(6) times the learning rate.
    assert torch.allclose(moved[2], torch.full((4,), 0.1 * 6**0.5))
