"""The fields parse from code, command line and YAML, and survive everything that HuggingFace does with arguments."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, SFTConfig, TrlParser

from hf_lowmem import LowMemArguments, LowMemDPOConfig, LowMemSFTConfig, LowMemTrainingArguments, with_lowmem
from hf_lowmem.optim import OPTIMIZERS

CONFIGS: list[Any] = [LowMemTrainingArguments, LowMemSFTConfig, LowMemDPOConfig, with_lowmem(GRPOConfig)]
DPO: Any = LowMemDPOConfig  # its loss_type, like TRL's, also takes one name
COMMON: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
SET: dict[str, Any] = {
    "optim": "apollo",
    "lowmem_state": "fp8_expand",
    "lowmem_weights": "keep",
    "lowmem_rank": 8,
    "lowmem_update_gap": 50,
    "lowmem_scale": 2.5,
    "lowmem_projection": "random",
}


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [text for k, v in settings.items() for text in (f"--{k}", str(v))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
class TestEveryConfig:
    def test_from_code(self, config: Any, tmp_path: Path) -> None:
        args = config(str(tmp_path), **COMMON, **SET)
        assert {k: getattr(args, k) for k in SET} == SET
        assert isinstance(args, TrainingArguments)
        assert isinstance(args, LowMemArguments)

    def test_from_the_command_line(self, config: Any, tmp_path: Path) -> None:
        parser = HfArgumentParser(config)
        (args,) = parser.parse_args_into_dataclasses(as_flags({"output_dir": tmp_path, **COMMON, **SET}))
        assert {k: getattr(args, k) for k in SET} == SET

    @pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
    def test_from_yaml(self, config: Any, parser: Any, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), **COMMON, **SET}))
        if parser is TrlParser:
            (args,) = parser(config).parse_args_and_config(["--config", str(path)])
        else:
            (args,) = parser(config).parse_yaml_file(str(path))
        assert {k: getattr(args, k) for k in SET} == SET

    def test_names_of_huggingface_keep_their_meaning(self, config: Any, tmp_path: Path) -> None:
        """The mixin is one: its code sees all names in one config, and in the others one of each kind."""
        names = [n.value for n in OptimizerNames]
        for optim in names if config is CONFIGS[0] else (names[0], "sgd", "adafactor", "apollo_adamw"):
            args = config(str(tmp_path), **COMMON, optim=optim)
            plain = TrainingArguments(str(tmp_path), **COMMON, optim=optim)
            assert args.optim == plain.optim, optim
            assert type(args.optim) is type(plain.optim), optim

    def test_the_default_is_huggingface_s(self, config: Any, tmp_path: Path) -> None:
        assert config(str(tmp_path), **COMMON).optim == TrainingArguments(str(tmp_path), **COMMON).optim

    def test_survives_to_dict_and_json(self, config: Any, tmp_path: Path) -> None:
        args = config(str(tmp_path), **COMMON, **SET)
        assert args.to_dict().items() >= SET.items()
        assert json.loads(args.to_json_string()).items() >= SET.items()
        assert "optim" in args.to_sanitized_dict()

    def test_set_optimizer(self, config: Any, tmp_path: Path) -> None:
        args = config(str(tmp_path), **COMMON)
        assert args.set_optimizer("apollo_mini", learning_rate=0.5, weight_decay=0.25) is args
        assert (args.optim, args.learning_rate, args.weight_decay) == ("apollo_mini", 0.5, 0.25)
        assert args.set_optimizer("sgd").optim == OptimizerNames.SGD

    def test_help_explains_each_field(self, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            HfArgumentParser(config).parse_args_into_dataclasses(["--help"])
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for name in [f.name for f in dataclasses.fields(LowMemArguments)]:
            assert f"--{name}" in text
        for word in (*OPTIMIZERS, "200 (galore", "fp8_expand", "bf16_ecc"):
            assert word in text


@pytest.mark.train
def test_all_survive_training_args_bin(tmp_path: Path) -> None:
    """Loaded in another process, which knows nothing but the files."""
    paths = []
    for config in CONFIGS:
        paths.append(str(tmp_path / f"{config.__name__}.bin"))
        torch.save(config(str(tmp_path), **COMMON, **SET), paths[-1])
    code = (
        "import json, sys, torch\n"
        "for path in sys.argv[2:]:\n"
        "    a = torch.load(path, weights_only=False)\n"
        "    print('read', json.dumps([type(a).__name__, {k: getattr(a, k) for k in json.loads(sys.argv[1])}]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(list(SET)), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.removeprefix("read ") for line in done.stdout.splitlines() if line.startswith("read ")]
    assert [json.loads(line) for line in lines] == [[config.__name__, SET] for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: c.__name__)  # TRL's GRPOConfig itself cannot be replaced
def test_replace(config: Any, tmp_path: Path) -> None:
    args = config(str(tmp_path), **COMMON, **SET)
    assert dataclasses.replace(args, lowmem_rank=16).lowmem_rank == 16


def test_with_lowmem_makes_one_class_a_config() -> None:
    made = with_lowmem(GRPOConfig)
    assert made is with_lowmem(GRPOConfig)
    assert made.__name__ == "LowMemGRPOConfig"
    assert issubclass(made, GRPOConfig)
    assert with_lowmem(made) is made
    assert with_lowmem(TrainingArguments) is LowMemTrainingArguments
    assert with_lowmem(SFTConfig) is LowMemSFTConfig
    assert with_lowmem(DPOConfig) is LowMemDPOConfig


def test_a_wrong_name_on_the_command_line_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"optim='apolo' is not available. Did you mean 'apollo'"):
        HfArgumentParser(CONFIGS[0]).parse_args_into_dataclasses(["--output_dir", "x", "--optim", "apolo"])


def test_our_names_are_none_of_huggingface_s() -> None:
    assert not set(OPTIMIZERS) & {n.value for n in OptimizerNames}


def test_what_trainingarguments_says_reaches_the_spec(tmp_path: Path) -> None:
    args = LowMemTrainingArguments(
        str(tmp_path), **COMMON, **SET, learning_rate=0.125, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=1e-3,
        weight_decay=0.0625, optim_target_modules=["q_proj"], seed=11,
    )  # fmt: skip
    spec = args.lowmem_optim_spec()
    assert (spec.name, spec.lr, spec.betas, spec.eps) == ("apollo", 0.125, (0.5, 0.75), 1e-3)
    assert (spec.weight_decay, spec.target_modules, spec.seed) == (0.0625, ["q_proj"], 11)
    assert (spec.state, spec.rank, spec.update_gap, spec.scale) == ("fp8_expand", 8, 50, 2.5)


def test_each_loss_has_its_own_default_beta(tmp_path: Path) -> None:
    assert LowMemDPOConfig(str(tmp_path), **COMMON).beta == DPOConfig(str(tmp_path), **COMMON).beta
    asft = DPO(str(tmp_path), **COMMON, loss_type="asft")
    assert (asft.beta, asft.asft_lambda, asft.loss_type) == (1.0, 1.0, ["asft"])
    assert DPO(str(tmp_path), **COMMON, loss_type="asft", beta=0.1).beta == 0.1
    (parsed,) = HfArgumentParser(DPO).parse_args_into_dataclasses(
        as_flags({"output_dir": tmp_path, **COMMON, "loss_type": "asft", "asft_lambda": 0.5})
    )
    assert (parsed.loss_type, parsed.asft_lambda, parsed.beta) == (["asft"], 0.5, 1.0)
    with_ipo = LowMemDPOConfig(str(tmp_path), **COMMON, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    assert with_ipo.loss_type == ["sigmoid", "sft"]


def settings(args: Any) -> tuple[Any, ...]:
    spec = args.lowmem_optim_spec()
    return spec.betas, spec.eps


def arguments(**fields: Any) -> LowMemTrainingArguments:
    merged: dict[str, Any] = COMMON | fields
    return LowMemTrainingArguments("out", **merged)


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestBetasAndEpsAreTheMethodsOwn:
    """However `optim` was set: HuggingFace's 0.9, 0.999 and 1e-8 are AdamW's."""

    def test_at_construction(self, name: str) -> None:
        own = OPTIMIZERS[name].DEFAULTS
        assert settings(arguments(optim=name)) == (own["betas"], own.get("eps"))

    @pytest.mark.parametrize("before", ["adamw_torch", "adamw", "soap", "lion"])
    def test_set_later(self, name: str, before: str) -> None:
        own = settings(arguments(optim=name))
        assert settings(arguments(optim=before).set_optimizer(name, learning_rate=1e-4)) == own
        assigned = arguments(optim=before)
        assigned.optim = name
        assert settings(assigned) == own
        assert settings(dataclasses.replace(arguments(optim=before), optim=name)) == own
        assert settings(arguments(optim=before).lowmem_replace(optim=name)) == own
        changed: dict[str, Any] = arguments(optim=before).to_dict() | {"optim": name}
        assert settings(LowMemTrainingArguments(**changed)) == own

    def test_after_a_round_trip(self, name: str, tmp_path: Path) -> None:
        args = arguments(optim=name)
        read = LowMemTrainingArguments(**json.loads(args.to_json_string()))
        assert settings(read) == settings(args)
        torch.save(args, tmp_path / "training_args.bin")
        loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert settings(loaded) == settings(args)
        for later in (loaded, copy.deepcopy(args), copy.copy(args)):
            assert settings(dataclasses.replace(later, optim="soap")) == ((0.95, 0.95), 1e-8)
            later.optim = "lion"
            assert later.lowmem_optim_spec().betas == (0.9, 0.99)

    def test_what_was_chosen_stays(self, name: str) -> None:
        beta1, beta2 = OPTIMIZERS[name].DEFAULTS["betas"]
        for args in (
            arguments(optim="adamw", adam_beta2=0.999).set_optimizer(name, beta2=0.999),
            dataclasses.replace(arguments(optim="lamb", adam_beta2=0.999), optim=name),
            dataclasses.replace(arguments(optim="soap"), optim=name, adam_beta2=0.999),
            arguments(optim="adamw", adam_beta2=0.999).lowmem_replace(optim=name),
        ):
            assert settings(args)[0] == (beta1, 0.999)
        args = arguments(optim="soap")
        args.adam_beta1 = 0.9
        args.optim = name
        assert settings(args)[0] == (0.9, beta2)
        args.adam_beta1 = None  # back to the method's own
        assert settings(args)[0] == (beta1, beta2)


def test_betas_of_huggingface_s_optimizers_are_huggingface_s() -> None:
    args = arguments(optim="soap")
    assert (args.adam_beta1, args.adam_beta2) == (0.95, 0.95)
    args.optim = "adamw_torch"
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert all(type(value) is float for value in (args.adam_beta1, args.adam_beta2, args.adam_epsilon))
    assert args.set_optimizer("adamw_torch", beta1=0.5).adam_beta1 == 0.5
