"""DyLoRA (arXiv 2210.07558) and NOLA (arXiv 2310.02556) as scripts: layers against LoRA's and the formula; runs."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import tiny_llama
from tests.test_scripts import ROOT, SMALL, as_text, model_and_data
from tests.training.test_trainers import token_data

__all__ = ["model_and_data"]  # a fixture is found by its name here
IDS = torch.arange(3, 19)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def dylora(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("train_dylora")


@pytest.fixture
def nola(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("train_nola")


def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def shaken(model: Any) -> Any:
    """The model with adapters that do something."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / b", "rslora"])
def test_the_first_ranks_are_an_adapter_of_that_rank(dylora: Any, rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=5, lora_alpha=7, target_modules=TARGETS, use_rslora=rslora)
    model = shaken(get_peft_model(tiny_llama(), dylora.dylora(config)))
    model.save_pretrained(tmp_path / "whole")
    for rank in range(1, 6):
        out = tmp_path / str(rank)
        assert dylora.truncate([str(tmp_path / "whole"), "--rank", str(rank), "--output", str(out)]) == 0
        plain: Any = PeftModel.from_pretrained(tiny_llama(), str(out))  # PEFT's own layers
        assert {p.shape[0] for n, p in plain.named_parameters() if "lora_A" in n} == {rank}
        dylora.set_rank(model, rank)
        # The scaling is one product there and two here.
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            wanted = [m.get_delta_weight("default") for m in plain.modules() if hasattr(m, "get_delta_weight")]
            found = [m.get_delta_weight("default") for m in model.modules() if hasattr(m, "get_delta_weight")]
        assert len(found) == len(TARGETS)
        for theirs, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    dylora.set_rank(model, 2)
    logits(model).sum().backward()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert p.grad[:2].any()
            assert not p.grad[2:].any()


def test_every_rank_is_drawn_and_by_the_step_alone(dylora: Any) -> None:
    drawn = [dylora.rank_of(3, step, 8) for step in range(400)]
    counts = [drawn.count(rank) for rank in range(1, 9)]
    assert sum(counts) == 400
    assert min(counts) > 25  # of 50; five times the root of their variance is 33
    assert drawn == [dylora.rank_of(3, step, 8) for step in range(400)]
    assert drawn != [dylora.rank_of(4, step, 8) for step in range(400)]


def test_a_step_has_one_rank_and_what_is_between_steps_has_all(
    dylora: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(dylora.LowMemSFTTrainer, "training_step", lambda self, *_: seen.append(ranks(self.model)))
    args = dylora.LowMemSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    config = LoraConfig(r=6, target_modules=TARGETS)
    trainer = dylora.DyLoraTrainer(
        tiny_llama(), args=args, train_dataset=token_data(8), processing_class=tokenizer, peft_config=config
    )
    for step in range(5):
        trainer.state.global_step = step
        trainer.training_step(trainer.model, {})
        assert ranks(trainer.model) == {6}
    assert seen == [{dylora.rank_of(args.seed, step, 6)} for step in range(5)]


def ranks(model: Any) -> set[int]:
    return {int(m.rank) for m in model.modules() if hasattr(m, "rank")}


def test_nola_is_its_formula(nola: Any) -> None:
    torch.manual_seed(0)
    mixture = nola.Mixture(7, 11, 3, 5, 1.0).double()
    every = nola.normal(11, 0, 7 * 15, torch.device("cpu")).view(7, 3, 5).double() / math.sqrt(7)
    wanted = torch.einsum("i,irc->rc", mixture.weight[0], every)
    torch.testing.assert_close(mixture.matrix(), wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda w: nola.Mix.apply(w, 11, 3, 5), (mixture.weight,))
    nola.BLOCK, block = 20, nola.BLOCK  # one matrix at a time
    torch.testing.assert_close(mixture.matrix(), wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda w: nola.Mix.apply(w, 11, 3, 5), (mixture.weight,))
    nola.BLOCK = block
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(mixture(x), x @ wanted.T, atol=1e-12, rtol=0)


def test_a_nola_file_holds_coefficients_alone_and_gives_the_model_back(nola: Any, tmp_path: Path) -> None:
    config = nola.NolaConfig(r=4, lora_alpha=8, target_modules=TARGETS, nola_bases=16, nola_seed=5)
    model = get_peft_model(tiny_llama(), config)
    assert torch.equal(logits(model), logits(tiny_llama())), "training begins with the model as it is"
    a = [m.matrix() for n, m in model.named_modules() if n.endswith("lora_A.default")]
    assert len({round(m.sum().item(), 6) for m in a}) == len(TARGETS), "each layer has its own matrices"
    assert a[0].std().item() * math.sqrt(3 * 64) == pytest.approx(1, abs=0.6)  # 16 coefficients' own deviation
    shaken(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == 2 * 16 * len(TARGETS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 16 * len(TARGETS)
    again = nola.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model), atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


FLAGS = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4", "--lowmem_activations", "fp8_recompute"]


@pytest.mark.train
@pytest.mark.parametrize("name", ["train_dylora", "train_nola"])
def test_a_script_trains_and_a_resumed_run_ends_in_the_same_bits(
    name: str, model_and_data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = model_and_data
    as_text(folder)
    where = ["--model_name_or_path", model, "--dataset_name", folder, "--output_dir", str(tmp_path / "out")]
    flags = [*where, *FLAGS, *SMALL, "--learning_rate", "1e-2", "--save_steps", "1", "--optim", "adamw"]
    flags += ["--nola_bases", "8"] if name == "train_nola" else []
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script: Any = importlib.import_module(name)
    config = getattr(script, "NolaSFTConfig", script.LowMemSFTConfig)
    trainer = script.NolaTrainer if name == "train_nola" else script.DyLoraTrainer
    assert script.train(config, trainer, arguments=flags) == 0
    first = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert all(t.any() for t in first.values())
    resumed = [*flags, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    resumed[resumed.index(str(tmp_path / "out"))] = str(tmp_path / "again")
    assert script.train(config, trainer, arguments=resumed) == 0
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first.keys() == second.keys()


def test_what_is_no_plain_adapter_is_refused(
    dylora: Any, nola: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[dict[str, Any]] = [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
    ]
    for odd in cases:
        (name,) = odd
        with pytest.raises(ValueError, match=f"{name}=.*DyLoRA is of plain"):
            dylora.dylora(LoraConfig(target_modules=TARGETS, **odd))
        with pytest.raises(ValueError, match=f"{name}=.*NOLA mixes plain"):
            nola.NolaConfig(target_modules=TARGETS, **odd)
    for trainer in (dylora.DyLoraTrainer, nola.NolaTrainer):
        with pytest.raises(ValueError, match=r"peft_config=None.*Add --use_peft"):
            trainer("none", args=None, peft_config=None)
    with pytest.raises(ValueError, match="nola_bases=0"):
        nola.NolaSFTConfig(str(tmp_path), nola_bases=0)
    with pytest.raises(ValueError, match="would repeat each other"):
        nola.Mixture(1 << 20, 0, 1 << 10, 1 << 10, 1.0)
    get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=TARGETS)).save_pretrained(str(tmp_path / "adapter"))
    given = [str(tmp_path / "adapter"), "--output"]
    for arguments, said in (
        ([*given, str(tmp_path / "new"), "--rank", "4"], "--rank 4: expected a whole number from 1 to 3"),
        ([*given, str(tmp_path / "adapter"), "--rank", "2"], "is there already"),
        ([str(tmp_path / "none"), "--output", str(tmp_path / "new"), "--rank", "2"], "No such file"),
    ):
        assert dylora.truncate(arguments) == 2
        assert said in capsys.readouterr().err
