"""Memory over a step of a real run: a point at each layer's edge, in the report, and a picture of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem import LowMemCallback, LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.cli.main import main
from hf_lowmem.memory import parameter_bytes
from hf_lowmem.runs.report import REPORT, read_report
from hf_lowmem.runs.timeline import BACKWARD, FORWARD, STEP, layers_of, rest_of
from tests.runs.callback.runs import data, llama, nothing_is_left, trainer_of

LAYERS = ["model.layers.0", "model.layers.1"]
SHAPE = [(FORWARD, ""), *((FORWARD, n) for n in LAYERS), *((BACKWARD, n) for n in LAYERS[::-1]), (STEP, ""), (STEP, "")]


def points(folder: Path) -> list[dict[str, Any]]:
    return read_report(folder)["trainings"][-1]["timeline"]


def phases(folder: Path) -> list[tuple[str, str]]:
    return [(point["phase"], point["module"]) for point in points(folder)]


def ours(folder: Path, **settings: Any) -> Any:
    args = LowMemTrainingArguments(
        str(folder), use_cpu=True, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, **settings
    )
    return LowMemTrainer(llama(), args, train_dataset=data(16))  # type: ignore[arg-type]


@pytest.mark.train
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_a_point_at_each_edge_and_what_is_counted_there(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, LowMemCallback(verbose=False), **settings)
    trainer.train()
    found = points(tmp_path)
    assert phases(tmp_path) == SHAPE
    model: Any = trainer.model
    whole = parameter_bytes(model)
    assert {point["weights"] for point in found} == {whole}
    gradients = [point["gradients"] for point in found]
    first = gradients[0]  # of the first micro-batch of a window there are none yet
    assert first == (whole if "gradient_accumulation_steps" in settings else 0)
    assert gradients[-2:] == [whole, 0], "they are dropped after the step"
    assert gradients[:-1] == sorted(gradients[:-1])
    assert [point["optimizer"] for point in found[:-1]] == [0] * 6
    assert found[-1]["optimizer"] > 2 * whole
    assert all(rest_of(point) >= 0 for point in found)
    assert nothing_is_left(model)


@pytest.mark.train
@pytest.mark.parametrize(
    "fields",
    [
        {"optim": "adamw", "lowmem_step_in_backward": True, "max_grad_norm": 0.0},
        {"lowmem_activations": "checkpoint_fp8"},
    ],
    ids=str,
)
def test_steps_in_backward_and_tiers_have_one_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    trainer = ours(tmp_path, **fields)
    trainer.train()
    assert phases(tmp_path) == SHAPE
    if "optim" in fields:
        found = points(tmp_path)
        assert found[-2]["gradients"] == 0, "each was freed by its step"
        states = [point["optimizer"] for point in found]
        assert states[0] == 0
        assert 0 < states[4] < states[5] == states[6]
    assert nothing_is_left(trainer.model)


@pytest.mark.train
def test_measuring_changes_nothing(tmp_path: Path) -> None:
    found = []
    for callbacks in ([LowMemCallback(verbose=False)], []):
        trainer: Any = trainer_of(tmp_path, *callbacks)
        trainer.train()
        found.append(list(trainer.model.parameters()))
    assert all(map(torch.equal, *found))


@pytest.mark.train
def test_it_is_drawn_and_a_run_without_it_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, picture = tmp_path / "run", tmp_path / "step.svg"
    ours(run).train()
    assert main(["card", str(run), "--plot", str(picture)]) == 0
    drawn = picture.read_text()
    for word in ("run: memory over step 1, measured (process RSS, sampled)", "one training step, layer by layer"):
        assert word in drawn
    for word in ("(less is better)", "optimizer step", "all else: activations, temporaries", "gradients"):
        assert word in drawn
    report = json.loads((run / REPORT).read_text())
    spoilt = dict(report["trainings"][0]["timeline"][0], in_use="much")
    for timeline, said in (
        ([], "was not measured"),
        ([spoilt], "is damaged: 'in_use' in 'timeline'"),
        ("x", "is damaged"),
    ):
        report["trainings"][0]["timeline"] = timeline
        (run / REPORT).write_text(json.dumps(report))
        assert main(["card", str(run), "--plot", str(picture)]) == 1
        assert said in capsys.readouterr().err
    del report["trainings"][0]["timeline"]  # of an older version
    (run / REPORT).write_text(json.dumps(report))
    assert main(["card", str(run)]) == 0


def test_layers_are_those_of_the_outermost_lists() -> None:
    model = nn.Module()
    model.tower = nn.ModuleList([nn.Linear(2, 2)])
    layer = nn.Module()
    layer.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.text = nn.Module()
    model.text.layers = nn.ModuleList([layer])
    assert [name for name, _ in layers_of(model)] == ["tower.0", "text.layers.0"]
