"""The example scripts and every configuration that we ship, run as a user runs them, on a tiny model."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTTrainer
from hf_lowmem.cli import dpo as command
from hf_lowmem.cli.dpo import FirstStage
from hf_lowmem.cli.main import main
from hf_lowmem.codecs import codec_pair
from tests.conftest import tiny_llama
from tests.dist.imported import run_module
from tests.training.test_trainers import pair_data

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "integrations" / "trl").glob("*.yaml"))
FEW = ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--max_length", "32"]
FEW += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL = [*FEW, "--dtype", "float32"]


@pytest.fixture
def model_and_data(tmp_path: Path, tokenizer: Any) -> tuple[str, str]:
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.mkdir()
    for split in ("train", "test"):
        rows = [{k: str(v) for k, v in dict(row).items()} for row in pair_data(12)]  # type: ignore[call-overload]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(model), str(data)


def as_text(rows_folder: str) -> None:
    """SFT reads a `text` column."""
    for path in Path(rows_folder).glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({"text": r["prompt"] + r["chosen"]}) for r in rows))


def script_of(config: Path) -> str:
    return "train_preference.py" if "loss_type" in yaml.safe_load(config.read_text()) else "train_sft.py"


# The first of each script; what follows the script's own line is the command.
AS_SCRIPTS = list({script_of(config): config for config in reversed(CONFIGS)}.values())


def run(script: str, *flags: str) -> None:
    """A script of ours, in a process of its own."""
    done = run_module(f"scripts.{script.removesuffix('.py')}", flags, os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def run_here(command: str, *flags: str, status: int = 0) -> None:
    """A command of the wheel, in this process."""
    assert main([command, *flags]) == status


@pytest.mark.train
@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_runs_from_its_configuration(config: Path, model_and_data: tuple[str, str], tmp_path: Path) -> None:
    model, data = model_and_data
    script = script_of(config)
    if script == "train_sft.py":
        as_text(data)
    out = tmp_path / "out"
    flags = [
        "--config", str(config), "--model_name_or_path", model, "--dataset_name", data,
        "--output_dir", str(out), *FEW, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2",
    ]  # fmt: skip
    if config in AS_SCRIPTS:
        run(script, *flags)
    else:
        run_here("dpo" if script == "train_preference.py" else "sft", *flags)
    AutoModelForCausalLM.from_pretrained(out)
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_loss" in row for row in state["log_history"])
    settings = yaml.safe_load(config.read_text())
    saved = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)
    methods = {(g["method"], codec_pair(g["state"]), g["weights"]) for g in saved["param_groups"]}
    assert methods == {(settings["optim"], codec_pair(settings["lowmem_state"]), settings["lowmem_weights"])}


def test_an_unknown_key_is_refused(model_and_data: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    model, data = model_and_data
    run_here(
        "sft", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "o"),
        *SMALL, "--lowmem_stat", "int8", status=2,
    )  # fmt: skip
    assert "lowmem_stat" in capsys.readouterr().err


def test_a_missing_split_is_named(model_and_data: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    model, data = model_and_data
    run_here(
        "dpo", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "o"),
        *SMALL, "--dataset_train_split", "trian", status=2,
    )  # fmt: skip
    assert "dataset_train_split='trian': " in capsys.readouterr().err


def stage_arguments(out: Path, **more: Any) -> LowMemDPOConfig:
    few: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
    few |= {"per_device_train_batch_size": 4, "max_length": 32, "logging_steps": 1, "save_strategy": "no"}
    return LowMemDPOConfig(str(out), **(few | more))


def run_stage(model: str, args: LowMemDPOConfig, tokenizer: Any, peft: Any = None) -> str:
    return FirstStage(sft_first=True, sft_epochs=2, sft_learning_rate=1e-2).run(
        model=model,
        args=args,
        train_dataset=pair_data(12),
        eval_dataset=None,
        processing_class=tokenizer,
        quantization_config=None,
        peft_config=peft,
    )


def weights_at(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


@pytest.mark.train
def test_sft_first_then_preference_in_one_command(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    """A preference stage that hardly moves ends where the SFT stage ended, not where the model began."""
    model, data = model_and_data
    out = tmp_path / "out"
    run_here(
        "dpo", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(out), *SMALL,
        "--sft_first", "--sft_epochs", "2", "--sft_learning_rate", "1e-3", "--learning_rate", "1e-9", "--loss_type",
        "sigmoid", "--save_steps", "1", "--logging_steps", "1", "--optim", "apollo_mini",
    )  # fmt: skip
    first, between, last = weights_at(model), weights_at(out / "sft"), weights_at(out)
    assert all((between[n] - first[n]).abs().max() > 1e-4 for n in first)
    # Two steps of a normed update of at most 1e-9 an entry times APOLLO-Mini's scale of 128.
    assert all((last[n] - between[n]).abs().max() < 1e-6 for n in first)
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    (margin,) = [row["rewards/margins"] for row in state["log_history"] if "rewards/margins" in row]
    assert margin == 0  # the reference is the SFT stage's result


@pytest.mark.train
@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules=["q_proj"])], ids=["all weights", "adapters"])
def test_the_sft_stage_leaves_nothing_in_memory(
    peft: Any,
    model_and_data: tuple[str, str],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[weakref.ref[Any]] = []

    class Watched(LowMemSFTTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            done = super().train(*args, **kwargs)
            alive.extend(
                weakref.ref(x) for x in (self, self.model, self.optimizer, next(iter(self.model.parameters())))
            )
            return done

    monkeypatch.setattr(command, "LowMemSFTTrainer", Watched)
    args = stage_arguments(tmp_path / "out", optim="apollo_mini", lowmem_state="8bit")
    folder = run_stage(model_and_data[0], args, tokenizer, peft)
    assert len(alive) == 4
    assert not any(found() is not None for found in alive)
    before, after = weights_at(model_and_data[0]), weights_at(folder)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == (set(before) if peft is None else {n for n in before if "q_proj" in n})


@pytest.mark.train
def test_adapters_of_the_second_stage_are_new(model_and_data: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    """Without its adapter the policy is the SFT stage's result, which is DPO's reference."""
    peft, args = LoraConfig(r=4, target_modules=["q_proj"]), stage_arguments(tmp_path / "out")
    folder = run_stage(model_and_data[0], args, tokenizer, peft)
    trainer = LowMemDPOTrainer(
        folder, args=args, train_dataset=pair_data(8), processing_class=tokenizer, peft_config=peft
    )
    trainer.train()
    (margin,) = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margin == 0
    bare = {n: p for n, p in trainer.model.named_parameters() if "q_proj.base_layer.weight" in n}
    (found,) = bare.values()
    assert torch.equal(found, weights_at(folder)["model.layers.0.self_attn.q_proj.weight"])


def test_both_stages_have_the_same_fields(tmp_path: Path) -> None:
    shared = {
        "optim": "apollo_mini",
        "lowmem_state": "8bit",
        "lowmem_activations": "fp8",
        "gradient_accumulation_steps": 3,
    }
    args = stage_arguments(tmp_path, loss_type="asft", beta=0.1, learning_rate=1e-6, seed=7, **shared)
    stage = FirstStage(sft_first=True)
    made = stage.arguments(args, tmp_path / "sft")
    assert {name: getattr(made, name) for name in shared} == shared
    assert (made.seed, made.max_length, made.max_steps) == (7, 32, -1)
    assert (made.learning_rate, made.num_train_epochs, made.gradient_checkpointing) == (2e-5, 1.0, False)
    assert made.output_dir == str(tmp_path / "sft")


def test_the_sft_stage_reads_prompt_and_chosen() -> None:
    pairs = pair_data(3)
    found = command.answered(pairs)
    assert found.column_names == ["prompt", "completion"]
    assert list(found["completion"]) == list(pairs["chosen"])
    talk = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2"}]
    implicit = Dataset.from_list(
        [{"chosen": talk[0] + talk[1], "rejected": talk[0] + [{"role": "assistant", "content": "w3"}]}]
    )
    (row,) = command.answered(implicit)
    assert (row["prompt"], row["completion"]) == talk


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft_epochs": 1.0}, "sft_epochs=1.0 has no effect without an SFT stage"),
        ({"sft_learning_rate": 1e-5}, "sft_learning_rate=1e-05 has no effect without an SFT stage"),
        ({"sft_first": True, "sft_epochs": 0.0}, "sft_epochs=0.0: it must be a finite number above 0"),
        ({"sft_first": True, "sft_learning_rate": float("nan")}, "sft_learning_rate=nan: it must be a finite number"),
    ],
)
def test_a_bad_sft_stage_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FirstStage(**settings)


def test_what_cannot_be_one_command_is_refused(tmp_path: Path) -> None:
    stage: Any = FirstStage(sft_first=True)
    given: dict[str, Any] = {"model": "unused", "eval_dataset": None, "processing_class": None, "peft_config": None}
    given |= {"train_dataset": pair_data(4), "quantization_config": None}
    args = stage_arguments(tmp_path)
    with pytest.raises(ValueError, match="sft_first=True with a quantised model"):
        stage.run(**given | {"args": args, "quantization_config": object()})
    with pytest.raises(ValueError, match="sft_first=True with dataset_streaming=True"):
        stage.run(**given | {"args": args, "train_dataset": pair_data(4).to_iterable_dataset()})
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="is not there"):
        stage.run(**given | {"args": args})
    (tmp_path / "sft").mkdir()
    assert stage.run(**given | {"args": args}) == str(tmp_path / "sft")
