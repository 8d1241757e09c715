"""GradNormLoRP (arXiv 2412.19616) as peft's DoRA adapters under a projected method, against the formula in float64.

    W = magnitude * (W0 + s * B @ A) / norm of each row of (W0 + s * B @ A), the norm taken as a constant by gradients
    A, B: projected to a small rank, Adam there, projected back.     magnitude: Adam.

The authors' code trains such adapters with projected gradients too, but has no package to compare with.
"""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_lowmem.optim import OPTIMIZERS, make_optimizer
from hf_lowmem.optim.state import values_of
from tests.test_scripts import ROOT, SMALL, as_text, model_and_data, run

__all__ = ["model_and_data"]  # a fixture is found by its name here

IN, OUT, ADAPTER, RANK, GAP, STEPS = 24, 18, 8, 3, 30, 100
LR, BETAS, SCALE, DECAY = 2e-3, (0.9, 0.98), 0.5, 0.1


def adapted(init: bool) -> Any:
    """A linear layer under DoRA; `init`: B = 0 as peft starts it, or both adapters random."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(IN, OUT))
    config = LoraConfig(
        r=ADAPTER, lora_alpha=2 * ADAPTER, target_modules=["0"], use_dora=True, init_lora_weights=init, bias="none"
    )
    return get_peft_model(model, config)


def adapter(model: Any) -> dict[str, nn.Parameter]:
    """The three trainable tensors, by short names."""
    short = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {short[next(k for k in short if k in n)]: p for n, p in named}


def effective_weight(w0: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    direction = w0 + 2.0 * b @ a  # lora_alpha / r
    return magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(64, IN, generator=generator), torch.randn(64, OUT, generator=generator)


def test_the_adapted_layer_computes_the_formula() -> None:
    model = adapted(init=False)
    parts, base = adapter(model), model.base_model.model[0].base_layer
    x, _ = data(0)
    weight = effective_weight(base.weight.double(), *(parts[k].double() for k in ("A", "B", "magnitude")))
    expected = x.double() @ weight.T + base.bias.double()
    # Sums of 24 products of numbers of size 1, and of 8 inside the weight: 32 roundings.
    assert (model(x) - expected).abs().max() <= 32 * 2**-23 * expected.abs().max()


@pytest.mark.parametrize("init", [True, False], ids=["as peft starts", "random adapters"])
@pytest.mark.parametrize("method", ["galore", "fira"])
def test_agrees_with_the_formula(method: str, init: bool) -> None:
    model = adapted(init)
    parts, base = adapter(model), model.base_model.model[0].base_layer
    optimizer = make_optimizer(
        method, model, lr=LR, betas=BETAS, weight_decay=DECAY, rank=RANK, update_gap=GAP, scale=SCALE, projection="svd"
    )
    assert {tuple(p.shape) for g in optimizer.param_groups if g["rank"] for p in g["params"]} == {
        (ADAPTER, IN),
        (OUT, ADAPTER),
    }, "both adapters are projected, the magnitudes are not"
    ours = {k: p.detach().double().requires_grad_() for k, p in parts.items()}
    moments = {k: [torch.zeros(()), torch.zeros(())] for k in parts}
    previous: dict[str, float] = {}
    begun = {k: p.detach().clone() for k, p in parts.items()}

    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

        weight = effective_weight(base.weight.detach().double(), ours["A"], ours["B"], ours["magnitude"])
        output = x.double() @ weight.T + base.bias.detach().double()
        grads = torch.autograd.grad((output - y.double()).square().mean(), list(ours.values()))
        for (name, p), grad in zip(ours.items(), grads, strict=True):
            with torch.no_grad():
                update = formula(method, name, grad, moments[name], previous, optimizer.state[parts[name]])
                rate = LR * math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
                p -= rate * update
                p -= LR * (DECAY if p.ndim == 2 else 0) * p
    for name, p in parts.items():
        assert (p - begun[name]).abs().max() > 0.01, "the adapter went somewhere"
        assert (p - ours[name]).abs().max() <= 1e-5


def formula(
    method: str, name: str, grad: Tensor, moments: list[Tensor], previous: dict[str, float], state: dict[str, Any]
) -> Tensor:
    """Adam's direction of the projected gradient, projected back. The basis alone is taken from the optimizer.

    A is (8, 24), so it is projected from the left; B is (18, 8), from the right.
    """
    basis = state["basis"].double() if "basis" in state else torch.eye(len(grad))
    wide = name != "B"
    g = grad.T if wide and grad.ndim == 2 else grad
    low = g @ basis.to(g.dtype)
    moments[0] = BETAS[0] * moments[0] + (1 - BETAS[0]) * low
    moments[1] = BETAS[1] * moments[1] + (1 - BETAS[1]) * low**2
    direction = moments[0] / (moments[1].sqrt() + 1e-6)
    if grad.ndim == 1:
        return direction
    update = SCALE * direction @ basis.T
    if method == "fira":
        phi = direction.norm(dim=1) / (low.norm(dim=1) + 1e-8)
        residual = (g - low @ basis.T) * phi[:, None]
        if previous.get(name, 0) > 0:
            residual = residual / (max(residual.norm().item() / (previous[name] + 1e-8), 1.01) / 1.01)
        previous[name] = residual.norm().item()
        update = update + residual
    return update.T if wide else update


def test_the_basis_of_a_waits_for_its_first_gradient() -> None:
    """B starts at zero, so A has no gradient in the first step, and a basis made then would last for a whole gap."""
    model = adapted(init=True)
    a = adapter(model)["A"]
    optimizer = make_optimizer("galore", model, lr=LR, rank=RANK, update_gap=GAP)
    kept = []
    for step in range(2):
        x, y = data(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        kept.append(optimizer.state[a]["basis"].clone())
    assert torch.equal(kept[0], torch.zeros(ADAPTER, RANK))
    torch.testing.assert_close(kept[1].mT @ kept[1], torch.eye(RANK))


def test_takes_less_than_adapters_under_adamw() -> None:
    taken = {}
    for method in ("adamw", "galore"):
        model = adapted(init=False)
        options: dict[str, Any] = {"rank": RANK, "update_gap": GAP} if "rank" in OPTIMIZERS[method].DEFAULTS else {}
        optimizer = make_optimizer(method, model, lr=LR, **options)
        (model(data(0)[0]) - data(0)[1]).square().mean().backward()
        optimizer.step()
        taken[method] = sum(v.nbytes for state in optimizer.state.values() for v in values_of(state).values())
    assert taken["adamw"] == 4 * 2 * (ADAPTER * (IN + OUT) + OUT)
    assert taken["galore"] == 4 * (2 * RANK * (IN + OUT) + RANK * 2 * ADAPTER + 2 * OUT)


FLAGS = ["--use_peft", "--use_dora", "--lora_target_modules", "all-linear", "--lora_r", "8", "--optim", "galore"]


@pytest.mark.train
def test_the_script_trains_adapters_with_projected_gradients(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    model, folder = model_and_data
    as_text(folder)
    where = ["--model_name_or_path", model, "--dataset_name", folder, "--output_dir", str(tmp_path / "out")]
    run("train_gradnormlorp.py", *where, *FLAGS, *SMALL, "--lowmem_rank", "3", "--save_steps", "2")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["use_dora"]
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    projected = [i for group in saved["param_groups"] if group["rank"] == 3 for i in group["params"]]
    assert len(projected) == 2 * 7, "A and B of the seven linear layers"
    assert all("basis" in saved["state"][i] for i in projected)


@pytest.mark.parametrize(
    ("adapters", "optim", "message"),
    [
        (None, "galore", "GradNormLoRP trains DoRA adapters"),
        (LoraConfig(use_dora=False), "galore", "Add --use_peft --use_dora"),
        (LoraConfig(use_dora=True), "adamw", "optim='adamw' does not project gradients. Choose one of: .*galore"),
    ],
    ids=["no adapters", "plain adapters", "no projection"],
)
def test_the_script_refuses_to_be_another_method(
    adapters: LoraConfig | None, optim: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    trainer_class = importlib.import_module("train_gradnormlorp").GradNormLoRPTrainer
    with pytest.raises(ValueError, match=message):
        trainer_class(model="none", args=SimpleNamespace(optim=optim), peft_config=adapters)
