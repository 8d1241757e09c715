"""What is refused beside DeepSpeed, by name and before anything starts. With DeepSpeed itself: tests/dist."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from hf_lowmem import checkpoints, rules
from hf_lowmem.cli.launch import prepare
from hf_lowmem.optim import OPTIMIZERS, elementwise, from_spec, make_optimizer
from hf_lowmem.rules import deepspeed
from hf_lowmem.specs import OptimSpec
from hf_lowmem.training import section
from hf_lowmem.training.arguments import LowMemTrainingArguments
from tests.conftest import tiny_llama

NEED_MATRICES = [name for name in OPTIMIZERS if name not in elementwise()]
EXAMPLE = Path(__file__).parents[2] / "integrations" / "accelerate" / "zero2.yaml"


def written(folder: Path, plugin: dict[str, Any], **deepspeed: Any) -> str:
    path = folder / "accelerate.yaml"
    content = {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed, section.KEY: plugin}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_adamw_and_lion_are_the_ones_that_work_element_by_element() -> None:
    assert elementwise() == ["adamw", "lion"]


@pytest.mark.parametrize("name", NEED_MATRICES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_needs_matrices_is_refused_by_name_with_fsdp2_as_the_remedy(
    name: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"zero_optimization": {"stage": stage}}
    with pytest.raises(ValueError, match=rf"deepspeed=.*optim='{name}'.*whole matrices.*FSDP2.*adamw, lion"):
        LowMemTrainingArguments(str(tmp_path), use_cpu=True, optim=name, deepspeed=config)
    with pytest.raises(
        ValueError, match=rf"DEEPSPEED cannot be combined with optim='{name}'.*fsdp_version: 2.*adamw, lion"
    ):
        prepare(written(tmp_path, {"optim": name}, zero_stage=stage))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=rf"ACCELERATE_USE_DEEPSPEED=true cannot be .* optim='{name}'.*FSDP2"):
        LowMemTrainingArguments(str(tmp_path), use_cpu=True, optim=name)


@pytest.mark.parametrize(
    ("plugin", "deepspeed", "message"),
    [
        ({"optim": "adamw"}, {"zero_stage": 3}, r"stage=3 cannot be combined with optim='adamw': ZeRO-3 cuts.*FSDP2"),
        ({"optim": "lion"}, {"zero_stage": 0}, r"stage=0 cannot be combined with optim='lion': without ZeRO.*DDP"),
        ({"optim": "adamw"}, {"zero_stage": "two"}, r"stage='two' cannot be combined with optim='adamw'"),
        (
            {"lowmem_activations": "fp8"},
            {"zero_stage": 3},
            r"stage=3 cannot be combined with lowmem_activations='fp8'.*ZeRO-3",
        ),
        (
            {"optim": "adamw"},
            {"zero_stage": 2, "offload_optimizer_device": "cpu"},
            r"offload_optimizer.device='cpu' cannot be combined with optim='adamw'.*CPU Adam.*Set it to none",
        ),
        (
            {"optim": "adamw", "lowmem_weights": "bf16_ecc"},
            {"zero_stage": 2},
            r"lowmem_weights='bf16_ecc' has no effect with.*DEEPSPEED: ZeRO keeps fp32.*Leave lowmem_weights unset",
        ),
        (
            {"optim": "adamw", "lowmem_step_in_backward": True},
            {"zero_stage": 1},
            r"lowmem_step_in_backward=True cannot be combined with.*DEEPSPEED: ZeRO takes each gradient away.*FSDP2",
        ),
    ],
)
def test_settings_that_do_not_go_with_zero_are_refused(
    plugin: dict[str, Any], deepspeed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(written(tmp_path, plugin, **deepspeed))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, r"optimizer=.*'AdamW'.*DeepSpeed would make that one instead.*Remove"),
        ({"optimizer": "auto"}, r"optimizer='auto' cannot be combined with optim='adamw'"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, r"elastic_checkpoint=True.*scales have not"),
        ({"checkpoint": {"load_universal": True}}, r"checkpoint.load_universal=True cannot.*Set it to false"),
        ({"zero_optimization": None}, r"stage=0 cannot be combined with optim='adamw'"),
    ],
)
def test_deepspeeds_own_settings_are_read_from_its_file(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare(written(tmp_path, {"optim": "adamw"}, deepspeed_config_file=str(file)))


def test_settings_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        prepare(written(tmp_path, {"optim": "adamw"}, deepspeed_config_file=str(tmp_path / "nowhere.json")))
    with pytest.raises(TypeError, match=r"deepspeed_config='zero2': expected keys with values"):
        deepspeed.from_yaml("file", {"deepspeed_config": "zero2"})


def test_the_example_is_taken() -> None:
    values, rest = prepare(str(EXAMPLE))
    assert values["optim"] in elementwise()
    assert rest["distributed_type"] == "DEEPSPEED"
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
    rules.check(rules.Run(optim="adamw", engine="deepspeed", zero=config))


def test_small_weights_keep_fp32_states_in_groups_of_their_own() -> None:
    model = tiny_llama()
    spec = OptimSpec(name="adamw", weight_decay=0.1, state="int8")
    plain, flat = from_spec(spec, model), from_spec(spec, model, flat=True)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    for group in flat.param_groups:
        assert all((sizes[n] < 4096) == (group["state"] == "fp32") for n in group["param_names"])
    decay = {n: g["weight_decay"] for g in plain.param_groups for n in g["param_names"]}
    assert decay == {n: g["weight_decay"] for g in flat.param_groups for n in g["param_names"]}
    assert len(from_spec(OptimSpec(name="adamw", weight_decay=0.1), model, flat=True).param_groups) == 2


@pytest.mark.parametrize(("name", "weights"), [*((n, "keep") for n in NEED_MATRICES), ("adamw", "bf16_sr")])
def test_an_engine_that_flattens_behind_the_optimizers_back_is_found_at_the_first_step(name: str, weights: str) -> None:
    optimizer = make_optimizer(name, tiny_llama(dtype=torch.bfloat16), weights=weights, **small(name))
    group = optimizer.param_groups[0]
    flat = torch.zeros(sum(p.numel() for p in group["params"]), requires_grad=True)
    flat.grad = torch.ones_like(flat)
    group["params"] = [flat]
    remedy = r"FSDP2.*adamw, lion" if weights == "keep" else r"weights='bf16_sr' has no effect.*Leave weights unset"
    with pytest.raises(ValueError, match=remedy):
        optimizer.step()
    assert not flat.any()


def small(name: str) -> dict[str, Any]:
    return {"rank": 8} if OPTIMIZERS[name].DEFAULTS.get("rank", 0) > 8 else {}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as DeepSpeed writes it, with one of its classes: made here, since the package may not be installed."""
    module = ModuleType("deepspeed.utils.tensor_fragment")
    made = type("fragment_address", (), {"__module__": module.__name__})
    module.fragment_address = made  # type: ignore[attr-defined]
    for name, value in (("deepspeed", ModuleType("deepspeed")), ("deepspeed.utils", ModuleType("deepspeed.utils"))):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    torch.save(
        {"at": made(), "x": torch.ones(3)}, folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    checkpoints.write_manifest(folder)
    return folder


def test_deepspeeds_classes_are_known_in_its_own_files_alone(saved: Path) -> None:
    checkpoints.verify(saved)
    file = saved / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.rename(saved / "optimizer.pt")
    checkpoints.write_manifest(saved)
    with pytest.raises(checkpoints.BadCheckpoint, match=r"optimizer.pt holds more than tensors.*fragment_address"):
        checkpoints.verify(saved)


def test_code_in_deepspeeds_files_is_refused(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("ran",)

    file = saved / "global_step4" / "mp_rank_00_model_states.pt"
    torch.save({"x": Evil()}, file)
    checkpoints.write_manifest(saved)
    with pytest.raises(checkpoints.BadCheckpoint, match=r"mp_rank_00_model_states.pt holds more.*print"):
        checkpoints.verify(saved)
