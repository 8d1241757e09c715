"""Bad settings of the launcher and the plugin: an error before any process starts, which names what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_lowmem.cli.launch import prepare
from hf_lowmem.cli.main import main
from hf_lowmem.training import section
from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.plugin import LowMemPlugin
from tests.conftest import tiny_llama

# (section, type, what the message says)
FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optimizer": "adamw"}, ValueError, r"field='optimizer' is not available.*Did you mean 'optim'"),
    ({"lowmem_sate": "8bit"}, ValueError, r"field='lowmem_sate' is not available.*'lowmem_state'"),
    ({"per_device_train_batch_size": 2}, ValueError, r"field='per_device_train_batch_size' is not available"),
    ({"optim": "adamw8"}, ValueError, r"optim='adamw8' is not available"),
    ({"optim": 8}, TypeError, r"optim=8: expected a string, got int"),
    ({"optim": ["adamw"]}, TypeError, r"optim=\['adamw'\]: expected a string, got list"),
    ({"lowmem_state": "8bit"}, ValueError, r"lowmem_state='8bit' has no effect with optim='adamw_torch"),
    ({"lowmem_rank": 4}, ValueError, r"lowmem_rank=4 has no effect with optim="),
    ({"lowmem_step_in_backward": True}, ValueError, r"lowmem_step_in_backward=True has no effect with optim="),
    ({"optim": "adamw", "lowmem_state": "int9"}, ValueError, r"lowmem_state='int9' is not available"),
    ({"optim": "adamw", "lowmem_state": 8}, TypeError, r"lowmem_state=8: expected the name of a codec"),
    ({"optim": "adamw", "lowmem_state": "int8,int8,int8"}, ValueError, r"lowmem_state='int8,int8,int8'"),
    ({"optim": "adamw", "lowmem_weights": "fp4"}, ValueError, r"lowmem_weights='fp4' is not available"),
    ({"optim": "adamw", "lowmem_rank": 4}, ValueError, r"lowmem_rank=4 has no effect with optim='adamw'"),
    ({"optim": "apollo", "lowmem_rank": 0}, ValueError, r"lowmem_rank=0: must be at least 1"),
    ({"optim": "apollo", "lowmem_rank": "64"}, TypeError, r"lowmem_rank='64': expected an integer"),
    ({"optim": "apollo", "lowmem_rank": 2.5}, TypeError, r"lowmem_rank=2.5: expected an integer"),
    ({"optim": "galore", "lowmem_update_gap": -1}, ValueError, r"lowmem_update_gap=-1: must be at least 1"),
    ({"optim": "galore", "lowmem_scale": 0}, ValueError, r"lowmem_scale=0: must be a finite number"),
    ({"optim": "galore", "lowmem_scale": "big"}, TypeError, r"lowmem_scale='big': expected a number"),
    ({"optim": "galore", "lowmem_projection": "qr"}, ValueError, r"lowmem_projection='qr' is not available"),
    ({"optim": "apollo", "lowmem_projection": "svd", "lowmem_rotate": True}, ValueError, r"lowmem_rotate=True has no"),
    ({"optim": "galore", "lowmem_rotate": "yes"}, TypeError, r"lowmem_rotate='yes': expected True or False"),
    ({"optim": "adamw", "lowmem_step_in_backward": 1}, TypeError, r"lowmem_step_in_backward=1: expected True or False"),
    ({"optim": "adamw", "adam_beta1": 1.0}, ValueError, r"adam_beta1=1.0: must be a finite number in \[0, 1\)"),
    ({"optim": "adamw", "adam_epsilon": -1e-8}, ValueError, r"adam_epsilon=-1e-08: must be"),
    ({"optim": "adamw", "learning_rate": "fast"}, TypeError, r"learning_rate='fast': expected a number"),
    ({"optim": "adamw", "learning_rate": -1.0}, ValueError, r"learning_rate=-1.0: must be"),
    ({"optim": "adamw", "weight_decay": float("nan")}, ValueError, r"weight_decay=nan: must be a finite number"),
    ({"optim": "adamw", "optim_args": "damping"}, ValueError, r"optim_args='damping': 'damping' is not of the form"),
    ({"optim": "adamw", "optim_args": "damping=1"}, ValueError, r"damping=1.*no effect|damping.*means nothing|damping"),
    ({"optim": "adamw", "optim_target_modules": "all-linear"}, ValueError, r"optim_target_modules='all-linear' has no"),
    ({"optim": "apollo", "optim_target_modules": []}, ValueError, r"optim_target_modules=\[\] names no module"),
    ({"lowmem_activations": "fp4"}, ValueError, r"lowmem_activations='fp4' is not available"),
    ({"lowmem_activations": "fp8:3-1"}, ValueError, r"lowmem_activations='fp8:3-1': 'fp8:3-1' is not a tier"),
    ({"lowmem_activations": "fp8:0-3,exact:2-"}, ValueError, r"names layer 2 twice"),
    ({"lowmem_activations": True}, TypeError, r"lowmem_activations=True: expected a string, got bool"),
    ({"lowmem_activations_stochastic": True}, ValueError, r"stochastic=True has no effect without lowmem_activations"),
    ({"lowmem_activations": "exact", "lowmem_activations_stochastic": True}, ValueError, r"rounds nothing"),
    ({"lowmem_activations": "fp8", "lowmem_activations_stochastic": "no"}, TypeError, r"expected True or False"),
    ({"gradient_checkpointing": True}, ValueError, r"gradient_checkpointing.*(not available|has no effect)"),
]

# (section, accelerate's part, type, message)
ENGINES: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (
        {"optim": "apollo"},
        {"distributed_type": "DEEPSPEED"},
        ValueError,
        r"DEEPSPEED cannot be combined with optim='apollo'.*fsdp_version: 2",
    ),
    (
        {"optim": "adamw"},
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
        ValueError,
        r"zero_optimization.stage=3 cannot be combined with optim='adamw'.*fsdp_version: 2",
    ),
    ({"optim": "adamw"}, {"distributed_type": "FSDP"}, ValueError, r"fsdp_version: 1 cannot be .*with fsdp_version: 2"),
    (
        {"optim": "galore"},
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
        ValueError,
        r"fsdp_version: 1 cannot be combined with optim='galore': FSDP1 flattens weights",
    ),
    ({"optim": "adamw"}, {"distributed_type": "FSDP", "fsdp_config": "v2"}, TypeError, r"fsdp_config='v2': expected"),
    (
        {"lowmem_activations": "fp8"},
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}},
        ValueError,
        r"fsdp_activation_checkpointing: true cannot be combined with lowmem_activations='fp8'",
    ),
    ({"optim": "adamw"}, {"num_processes": 0}, ValueError, r"num_processes=0: expected a number of at least 1"),
    ({"optim": "adamw"}, {"num_processes": "two"}, ValueError, r"num_processes='two': expected a number"),
    (
        {"optim": "adamw", "lowmem_step_in_backward": True},
        {"num_processes": 2},
        ValueError,
        r"num_processes=2 cannot be combined with lowmem_step_in_backward=True",
    ),
    (
        {"optim": "adamw", "lowmem_step_in_backward": True},
        {"mixed_precision": "fp16"},
        ValueError,
        r"mixed_precision: fp16 cannot be combined with lowmem_step_in_backward=True.*Use bf16",
    ),
]


def written(folder: Path, content: Any) -> str:
    path = folder / "accelerate.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("values", "kind", "message"), FIELDS, ids=[str(values) for values, _, _ in FIELDS])
def test_a_bad_section_is_refused_before_anything_starts(
    values: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        prepare(written(tmp_path, {"num_processes": 1, section.KEY: values}))


@pytest.mark.parametrize(("values", "rest", "kind", "message"), ENGINES)
def test_a_section_that_the_engine_does_not_go_with_is_refused(
    values: dict[str, Any], rest: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        prepare(written(tmp_path, rest | {section.KEY: values}))


def test_step_in_backward_goes_with_fsdp2(tmp_path: Path) -> None:
    rest = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 2}
    values = {"optim": "adamw", "lowmem_step_in_backward": True}
    assert prepare(written(tmp_path, rest | {section.KEY: values})) == (values, rest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", "expected keys with values"),
        (f"{section.KEY}: adamw\n", "expected fields with values"),
        (f"{section.KEY}:\n  1: adamw\n", "expected fields with values"),
        (f"{section.KEY}: [adamw]\n", "expected fields with values"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        prepare(path)
    assert "accelerate.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config_file='.*none.yaml': there is no such file"):
        prepare(str(tmp_path / "none.yaml"))


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {section.KEY: {"optim": "adamww"}})
    with pytest.raises(SystemExit) as caught:
        main(["launch", "--config_file", path, "script.py"])
    assert caught.value.code == 2
    assert "hf-lowmem launch: error: optim='adamww' is not available" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{optim: adamw}", "adamw", '["adamw"]', "3"])
def test_a_variable_that_is_no_json_object_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(section.VARIABLE, text)
    for read in (LowMemPlugin.from_env, lambda: LowMemTrainingArguments(str(tmp_path), use_cpu=True)):
        with pytest.raises((TypeError, ValueError), match=section.VARIABLE):
            read()


def test_training_arguments_take_the_section_where_nothing_else_was_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(section.VARIABLE, '{"optim": "apollo", "lowmem_rank": 4, "learning_rate": 0.25}')
    args = LowMemTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.optim, args.lowmem_rank, args.learning_rate) == ("apollo", 4, 0.25)
    args = LowMemTrainingArguments(str(tmp_path), use_cpu=True, lowmem_rank=8, learning_rate=1e-3)
    assert (args.optim, args.lowmem_rank, args.learning_rate) == ("apollo", 8, 1e-3)
    monkeypatch.setenv(section.VARIABLE, '{"rank": 4}')
    with pytest.raises(ValueError, match=r"HF_LOWMEM_CONFIG \(hf_lowmem_config\): field='rank' is not available"):
        LowMemTrainingArguments(str(tmp_path), use_cpu=True)


@pytest.fixture
def accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=False)


def test_prepare_wants_exactly_one_optimizer(accelerator: Any) -> None:
    model = tiny_llama()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer=SGD cannot be combined with optim='adamw'.*Pass one or the other"):
        LowMemPlugin(optim="adamw").prepare(accelerator, model, optimizer=other)
    with pytest.raises(ValueError, match=r"is not one of hf_lowmem's.*optimizer=yours"):
        LowMemPlugin(lowmem_activations="exact").prepare(accelerator, model)
    with pytest.raises(TypeError, match="expected a function from the optimizer to its scheduler"):
        LowMemPlugin(optim="adamw").prepare(accelerator, model, scheduler="cosine")  # type: ignore[arg-type]


def test_step_in_backward_is_checked_against_the_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 with step in backward: 'adamw' needs whole"):
        LowMemPlugin(optim="adamw", lowmem_step_in_backward=True).prepare(accelerator, tiny_llama())
    AcceleratorState._reset_state(reset_partial_state=False)
