"""One word for several fields: the same run as the fields written out, through every door."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import HfArgumentParser

from hf_lowmem import LowMemDPOConfig, LowMemPlugin, LowMemSFTConfig, LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.training import section
from hf_lowmem.training.presets import PRESETS
from tests.conftest import tiny_llama
from tests.training.test_trainers import COMMON, token_data, weights

CONFIGS = [LowMemTrainingArguments, LowMemSFTConfig, LowMemDPOConfig]
CPU: dict[str, Any] = {"use_cpu": True, "bf16": False}
PASSING = ("lowmem", "logging_dir", "run_name")


def fields_of(preset: str, config: Any) -> dict[str, Any]:
    return {name: value for name, value in PRESETS[preset].items() if name in config.__dataclass_fields__}


def values(args: Any) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in PASSING}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_fields(config: Any, preset: str) -> None:
    args = config("out", lowmem=preset, **CPU)
    assert values(args) == values(config("out", **fields_of(preset, config), **CPU))
    assert args.lowmem_open.isdisjoint(fields_of(preset, config)), "a search leaves what a preset has chosen"


def test_what_is_set_beside_a_preset_is_kept() -> None:
    args = LowMemSFTConfig("out", lowmem="smallest", optim="apollo", lowmem_rank=8, lowmem_activations="fp8", **CPU)
    assert (args.optim, args.lowmem_rank, args.lowmem_activations) == ("apollo", 8, "fp8")
    assert (args.lowmem_state, args.lowmem_step_in_backward, args.max_grad_norm) == ("8bit", True, 0.0)


def test_copies_keep_what_was_filled_in() -> None:
    args = LowMemTrainingArguments("out", lowmem="smallest", **CPU)
    other = dataclasses.replace(args, lowmem_state="int8")
    assert (other.lowmem_state, other.lowmem_step_in_backward) == ("int8", True)
    assert values(pickle.loads(pickle.dumps(args))) == values(args)
    assert values(args.lowmem_replace(lowmem_state="8bit")) == values(args)


@pytest.mark.parametrize("word", ["light", "auto", "tiny", "", True])
def test_a_copy_does_not_take_another_word(word: Any) -> None:
    args = LowMemSFTConfig("out", lowmem="smallest", **CPU)
    with pytest.raises(ValueError, match=rf"lowmem_replace\(lowmem={word!r}\) would fill in nothing.*Make new"):
        args.lowmem_replace(lowmem=word)
    assert values(args.lowmem_replace(lowmem=args.lowmem)) == values(args.lowmem_replace(lowmem=None)) == values(args)


def test_the_command_line_takes_the_word() -> None:
    (args,) = HfArgumentParser(LowMemTrainingArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        ["--output_dir", "out", "--lowmem", "balanced", "--lowmem_state", "int8", "--use_cpu"]
    )
    assert (args.optim, args.lowmem_state, args.lowmem_activations) == ("apollo", "int8", "checkpoint_fp8")


def test_a_section_and_a_plugin_take_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(section.VARIABLE, json.dumps({"lowmem": "balanced"}))
    for made in (LowMemPlugin.from_env(), LowMemTrainingArguments("out", **CPU)):
        assert (made.optim, made.lowmem_state, made.lowmem_activations) == ("apollo", "8bit", "checkpoint_fp8")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lowmem": "tiny"}, "lowmem='tiny'"),
        ({"lowmem": "light", "optim": "lion", "lowmem_state": "int8"}, "lowmem='light' has no effect"),
        ({"lowmem": "smallest", "gradient_accumulation_steps": 2}, r"\(lowmem='smallest' sets "),
        ({"lowmem": "smallest", "max_grad_norm": 0.5}, r"\(lowmem='smallest' sets "),
        ({"lowmem": "balanced", "gradient_checkpointing": True}, r"\(lowmem='balanced' sets "),
    ],
)
def test_refusals_name_the_preset(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LowMemTrainingArguments("out", **CPU, **fields)


@pytest.mark.train
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_is_that_of_the_fields(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    common = {k: v for k, v in COMMON.items() if k not in ("gradient_checkpointing", "max_grad_norm")}
    stored = {"lowmem_weights": "bf16_sr"} if dtype is torch.bfloat16 else {}
    ended = []
    for name, fields in (("word", {"lowmem": preset}), ("fields", fields_of(preset, LowMemTrainingArguments) | stored)):
        asked: dict[str, Any] = common | {"max_steps": 2} | fields
        args = LowMemTrainingArguments(str(tmp_path / name), **asked)
        trainer = LowMemTrainer(tiny_llama(dtype=dtype), args, train_dataset=token_data())
        trainer.train()
        ended.append(weights(trainer.model))
        assert trainer.args.lowmem_weights == stored.get("lowmem_weights")
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))


def test_a_plugin_stores_bf16_weights_as_the_preset_says() -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = LowMemPlugin(lowmem="light", learning_rate=1e-3)
    _, optimizer = plugin.prepare(Accelerator(cpu=True), tiny_llama(dtype=torch.bfloat16))
    assert {group["weights"] for group in optimizer.optimizer.param_groups} == {"bf16_sr"}
    plugin.remove()
