"""WeLore (arXiv 2407.11239) as a script: ranks by singular values, factors that are trained, a plain model saved."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_llama
from tests.test_scripts import ROOT, SMALL, as_text, model_and_data, run

__all__ = ["model_and_data"]  # a fixture is found by its name here


@pytest.fixture
def welore(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "train_welore", raising=False)
    import train_welore  # type: ignore[import-not-found]

    return train_welore


def of_low_rank(model: Any, rank: int = 5) -> Any:
    """The queries' and keys' weights of rank 5, and a little noise."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            values = torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1])
            p.data = (values / values.std() * 0.1 + 1e-5 * torch.randn(p.shape)).to(p.dtype)
    return model


def test_ranks_are_by_one_threshold(welore: ModuleType) -> None:
    spectra = {"steep": torch.tensor([8.0, 0.8, 0.08, 0.008]), "flat": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    # Divided by the largest: 1, .1, .01, .001 and 1, .75, .5, .25.
    assert welore.ranks_of(spectra, 0.375) == {"steep": 1, "flat": 4}
    assert welore.ranks_of(spectra, 0.25) == {"steep": 2, "flat": 4}
    assert welore.ranks_of(spectra, 0.5) == {"steep": 1, "flat": 3}
    assert welore.ranks_of({"none": torch.zeros(3)} | spectra, 0.9)["none"] == 1


@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_the_best_approximation(welore: ModuleType, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias=bias)
    pair = welore.factored(linear, 6)
    u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    best = (u[:, :6] * s[:6]) @ v[:6]
    x = torch.randn(5, 24)
    expected = nn.functional.linear(x.double(), best, None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(pair(x).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(welore.multiplied(pair)(x), pair(x), atol=1e-5, rtol=0)


def test_what_is_of_low_rank_is_trained_and_nothing_else(welore: ModuleType) -> None:
    model = of_low_rank(tiny_llama())
    ids = torch.arange(3, 19)[None]
    before = model(input_ids=ids).logits
    size = sum(p.numel() for p in model.parameters())
    layers = len(model.model.layers)
    smaller = {n: min(m.weight.shape) for n, m in welore.linears(model).items()}
    noise = sum(side - 5 for n, side in smaller.items() if "q_proj" in n or "k_proj" in n)
    low = welore.cut(model, noise / sum(smaller.values()))
    assert set(low) == {f"model.layers.{i}.self_attn.{n}_proj" for i in range(layers) for n in "qk"}
    assert set(low.values()) == {5}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{i}.weight" for name in low for i in (0, 1)}
    assert sum(p.numel() for p in model.parameters()) < size
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-3, rtol=0)
    keys = set(tiny_llama().state_dict())
    with welore.whole(model, low):
        assert set(model.state_dict()) == keys
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_refused_in_words(welore: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"welore_reduction=0.01: no linear weight of LlamaForCausalLM has a rank"):
        welore.cut(tiny_llama(), 0.01)
    with pytest.raises(ValueError, match=r"welore_reduction=1.5: expected a number between 0 and 1"):
        welore.WeLoreConfig("out", welore_reduction=1.5)
    with pytest.raises(ValueError, match="peft_config cannot be combined with WeLore"):
        welore.WeLoreTrainer("none", SimpleNamespace(fsdp=None), peft_config=object())


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_the_script_trains_factors_and_saves_a_plain_model(
    model_and_data: tuple[str, str], tmp_path: Path, resumed: bool
) -> None:
    model, folder = model_and_data
    as_text(folder)
    plain = of_low_rank(AutoModelForCausalLM.from_pretrained(model))
    plain.save_pretrained(model)
    out = tmp_path / "out"
    flags = ["--model_name_or_path", model, "--dataset_name", folder, "--output_dir", str(out), *SMALL]
    flags += ["--welore_reduction", "0.2", "--optim", "adamw", "--lowmem_state", "8bit", "--save_steps", "1"]
    flags += ["--learning_rate", "1e-2"]
    run("train_welore.py", *flags)
    with safe_open(out / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.q_proj.1.weight" in file.keys()  # noqa: SIM118
    made = AutoModelForCausalLM.from_pretrained(out)
    before, after = plain.state_dict(), made.state_dict()
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if "q_proj.weight" in n or "k_proj.weight" in n}
    if resumed:
        run("train_welore.py", *flags, "--resume_from_checkpoint", str(out / "checkpoint-1"))
        again = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(again[n], after[n]) for n in after), "to the same bits"
