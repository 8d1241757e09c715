"""`lowmem="auto"`: one word, settings that fit when they are measured, five lines, and the same on a resume."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hf_lowmem import LowMemPlugin, LowMemSFTConfig, LowMemTrainer, LowMemTrainingArguments, checkpoints
from hf_lowmem.cli.main import main
from hf_lowmem.memory.units import parse_bytes
from hf_lowmem.planner.models import token_maker
from hf_lowmem.planner.search import budget
from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.fastest import prepare
from hf_lowmem.planner.search.losses import BOUND, is_accepted, parts_of
from hf_lowmem.planner.search.space import AS_IS, CHECKPOINTING, candidates, layers_by_tier
from hf_lowmem.training import section
from hf_lowmem.training.chosen import CHOSEN
from hf_lowmem.training.sft import LowMemSFTTrainer
from tests.planner.real import arguments, measure, small_config
from tests.test_scripts import as_text, model_and_data

__all__ = ["model_and_data"]  # a fixture

CONFIG = small_config(num_hidden_layers=2)
# Few things are open, so that a test searches for a second.
FEW: dict[str, Any] = {"optim": "adamw", "lowmem_activations": "fp8", "max_length": 32, "gradient_checkpointing": None}


def trainer_of(folder: Path, config: LlamaConfig = CONFIG, peft_config: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(small_config(num_hidden_layers=2) if config is CONFIG else config)
    args = arguments(**FEW | {"lowmem": "auto", "learning_rate": 1e-3} | settings)
    args.output_dir = str(folder)
    rows = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": rows})
    adapters = {} if peft_config is None else {"peft_config": peft_config}
    return LowMemSFTTrainer(
        model.to(torch.bfloat16), args, train_dataset=data, processing_class=token_maker(), **adapters
    )


def test_the_word_comes_through_every_door(monkeypatch: pytest.MonkeyPatch) -> None:
    (args,) = HfArgumentParser(LowMemTrainingArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        ["--output_dir", "out", "--lowmem", "auto", "--use_cpu"]
    )
    monkeypatch.setenv(section.VARIABLE, json.dumps({"lowmem": "auto"}))
    for made in (args, LowMemSFTConfig("out", use_cpu=True, bf16=False)):
        assert made.lowmem == "auto"
        assert {"optim", "lowmem_state", "lowmem_activations", "lowmem_step_in_backward"} <= made.lowmem_open


@pytest.mark.train
def test_every_door_gets_the_same_answer_and_keeps_it(
    model_and_data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, a YAML file, a section of an accelerate YAML and code: what is chosen is in each run's checkpoint."""
    model, data = model_and_data
    as_text(data)
    auto = {"lowmem": "auto", "lowmem_budget": "1GiB"}
    step: dict[str, Any] = {"optim": "adamw", "max_length": 32, "lowmem_activations": "fp8", "max_steps": 1}
    step |= {"dtype": "bfloat16", "save_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True}
    common = {"model_name_or_path": model, "dataset_name": data, **step}

    def flags(**values: Any) -> list[str]:
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(common | auto))
    assert main(["sft", *flags(**common, **auto, output_dir=tmp_path / "flags")]) == 0
    assert main(["sft", "--config", str(file), *flags(output_dir=tmp_path / "file")]) == 0
    monkeypatch.setenv(section.VARIABLE, json.dumps(auto))
    assert main(["sft", *flags(**common, output_dir=tmp_path / "section")]) == 0
    monkeypatch.delenv(section.VARIABLE)
    del step["dtype"]
    args = LowMemSFTConfig(str(tmp_path / "code"), **auto, **step, model_init_kwargs={"dtype": "bfloat16"})
    rows = Dataset.from_dict({"text": ["w1 w2 w3"] * 8})
    made = LowMemSFTTrainer(model, args, train_dataset=rows)
    chosen = [vars(made.args)[CHOSEN]["chosen"]]
    capsys.readouterr()
    for door in ("flags", "file", "section"):
        stored = checkpoints.read_manifest(tmp_path / door / "checkpoint-1")
        assert stored is not None
        chosen.append(stored["auto"]["chosen"])
    assert chosen[0]["lowmem_weights"]
    asked = {k: v for k, v in (common | auto).items() if k not in ("model_name_or_path", "dataset_name", "save_steps")}
    assert main(["plan", "--model", model, "--json", "--device", "cpu", *flags(**asked)]) == 0
    chosen.append(json.loads(capsys.readouterr().out)["chosen"])
    assert chosen == [chosen[0]] * 5


def test_where_no_step_can_be_planned_it_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"lowmem='auto' has no effect in LowMemPlugin.*hf-lowmem plan"):
        LowMemPlugin(lowmem="auto")
    args = LowMemTrainingArguments(str(tmp_path), lowmem="auto", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"lowmem='auto' with LowMemTrainer and LowMem.*LowMemSFTTrainer"):
        LowMemTrainer(LlamaForCausalLM(CONFIG), args)
    CONFIG.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--lowmem", "auto"]) == 2
    assert "--lowmem auto: the settings that fit in what? Give --budget" in capsys.readouterr().err


@pytest.mark.train
def test_it_says_in_five_lines_what_it_chose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: 3 * 2**30)
    caplog.set_level(logging.WARNING, "hf_lowmem")
    logging.getLogger("hf_lowmem").addHandler(caplog.handler)
    try:
        made = trainer_of(tmp_path, lowmem_state="int8")
    finally:
        logging.getLogger("hf_lowmem").removeHandler(caplog.handler)
    (said,) = {r.getMessage() for r in caplog.records if "auto' chose" in r.getMessage()}
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["lowmem='auto' chose", "memory", "loss", "time", "to pin it"]
    assert "2.75 GiB (3.00 GiB of this machine's RAM are free), for a step of 1 × 32 tokens" in lines[1]
    assert "of 0.5 % that auto allows: states int8 +0.15 %, weights bf16_sr +0.00 %" in lines[2]
    assert "lowmem_weights='bf16_sr'" in lines[4]
    assert (made.args.lowmem_state, made.args.optim, made.args.lowmem_activations) == ("int8", "adamw", "fp8")
    assert made.args.lowmem_weights == "bf16_sr"
    assert made.predicted["reserved_bytes"] <= parse_bytes("", "2.75GiB")


@pytest.mark.train
def test_a_resume_keeps_the_choice_whatever_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    few = parse_bytes("", "17MiB")
    monkeypatch.setattr(budget, "measured_budget", lambda device, model=None: (few, "little is free"))
    first = trainer_of(tmp_path, **saving)
    first.train()
    stored = checkpoints.read_manifest(tmp_path / "checkpoint-1")
    assert stored is not None
    assert stored["auto"]["asked"]["given"]["lowmem_activations"] == "fp8"
    monkeypatch.setattr(budget, "measured_budget", lambda device, model=None: (2**34, "much is free"))
    elsewhere = trainer_of(tmp_path / "other", **saving)
    fields = ("lowmem_state", "lowmem_weights", "per_device_train_batch_size")
    chosen = {name: getattr(first.args, name) for name in fields}
    assert {name: getattr(elsewhere.args, name) for name in fields} != chosen, "more is free, so more is taken"
    with pytest.raises(ValueError, match=r"the checkpoint was trained with .*Leave lowmem unset and set"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = trainer_of(tmp_path, **saving)
    assert {name: getattr(again.args, name) for name in fields} == chosen
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


@pytest.mark.train
def test_a_new_run_in_an_old_folder_is_searched_anew_if_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its model, its adapters or its length: what was chosen for less may not fit."""
    asked: dict[str, Any] = {"lowmem_budget": "1GiB"}
    trainer_of(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, **asked).train()
    monkeypatch.setattr(budget, "search", lambda **asked: pytest.fail("searched"))
    trainer_of(tmp_path, **asked)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    others: list[dict[str, Any]] = [
        {"config": small_config(num_hidden_layers=3)},
        {"config": small_config(num_hidden_layers=2, intermediate_size=1024)},
        {"peft_config": lora},
        {"max_length": 64},
        {"packing": True},
        {"lowmem_budget": "2GiB"},
    ]
    for other in others:
        with pytest.raises(pytest.fail.Exception, match="searched"):
            trainer_of(tmp_path, **asked | other)


@pytest.mark.slow
def test_the_choice_fits_when_it_is_measured_and_a_no_names_the_least(tmp_path: Path) -> None:
    given: dict[str, Any] = {"optim": "apollo_mini", "lowmem_state": "8bit", "lowmem_activations": "fp8"}
    asked = arguments(lowmem="auto", **given, max_grad_norm=0.0, max_length=64)
    search = prepare(CONFIG, asked, dtype="bfloat16", device="cpu")
    stores = {c.weights for c in search.found}
    assert stores == {"bf16_sr", "bf16_ecc", "int8_sr"}
    for c in search.found:
        assert is_accepted(c, parts_of(c, layers_by_tier(c.activations, 2), bf16_weights=True), asked)
    least = min(search.really(c, 64) for c in search.found if c.weights == "int8_sr")
    found = search.for_budget("budget", least).answer(64)
    assert found.args.lowmem_weights == "int8_sr"
    assert sum(max(0.0, cost or 0.0) for cost in found.losses.values()) <= BOUND
    truth = measure(CONFIG, found.args.lowmem_replace(lowmem=None), torch.bfloat16)
    assert truth.peak <= found.budget
    with pytest.raises(NothingFits, match=r"The smallest of [\d,]+ combinations needs"):
        search.for_budget("budget", 2**20).answer(64)


@pytest.mark.train
@pytest.mark.parametrize(
    ("saved", "rules"),
    [(None, {None}), (["lm_head"], {None, "scale", "adam_mini"}), (["embed_tokens"], {None, "scale", "adam_mini"})],
)
@pytest.mark.parametrize("asked", [{"lowmem": "auto"}, {"lowmem_budget": "8GiB"}])
def test_a_rule_for_embeddings_is_a_choice_where_one_is_trained(
    asked: dict[str, Any], saved: list[str] | None, rules: set[str | None]
) -> None:
    """Adapters leave embedding and output head as they are, unless they are named."""
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
    args = arguments(**FEW | {"optim": "apollo_mini"} | asked)
    assert {c.embeddings for c in prepare(CONFIG, args, peft_config=lora, device="cpu").found} == rules


@pytest.mark.parametrize("asked", [{"lowmem": "auto"}, {"lowmem_budget": "8GiB"}])
def test_a_way_of_adding_up_gradients_leaves_what_frees_them(asked: dict[str, Any]) -> None:
    given: dict[str, Any] = {"optim": "adamw", "lowmem_accumulation": "int8_sr", "max_grad_norm": 0.0}
    args = arguments(**given, gradient_accumulation_steps=4, **asked)
    found = candidates(args, depth=2, bf16_weights=True)
    assert {c.step_in_backward for c in found} == {True}


@pytest.mark.parametrize("asked", [{"lowmem": "auto"}, {"lowmem_budget": "8GiB"}])
def test_arguments_that_a_search_has_settled_are_the_only_candidate(asked: dict[str, Any]) -> None:
    """As those of a trainer that are handed to another one."""
    tier: dict[str, Any] = {"lowmem_activations": "fp8", "gradient_checkpointing": None}
    for kept, policy in (
        ({"gradient_checkpointing": True}, CHECKPOINTING),
        ({"gradient_checkpointing": False}, AS_IS),
        (tier, "fp8"),
    ):
        settled = arguments(optim="adamw", **asked).lowmem_settle(**kept)
        (only,) = candidates(settled, depth=2, bf16_weights=False)
        assert only.activations == policy


SMOLLM2_135M = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["3GiB", "2GiB"])
def test_a_model_of_135m_within_two_and_three_gib(budget: str) -> None:
    """bf16 weights and TRL's own batch, 8 rows, on a CPU; or a refusal that names the least, and keeps to it."""
    given: dict[str, Any] = {"gradient_checkpointing": None, "optim": "adamw_torch_fused", "max_length": 256}
    args = arguments(lowmem="auto", lowmem_budget=budget, per_device_train_batch_size=8, **given)
    search = prepare(SMOLLM2_135M, args, dtype="bfloat16", device="cpu")
    found = search.for_budget("budget", parse_bytes("budget", budget)).answer(256)
    few = min(2, found.args.gradient_accumulation_steps)  # a window of two passes has the peak of a longer one
    pinned = found.args.lowmem_replace(lowmem=None, lowmem_budget=None, gradient_accumulation_steps=few)
    assert measure(SMOLLM2_135M, pinned, torch.bfloat16).peak <= found.budget
    with pytest.raises(NothingFits, match=r"The smallest of [\d,]+ combinations needs") as refused:
        search.for_budget("budget", parse_bytes("budget", "256MiB")).answer(256)
    print(found.why, refused.value)
