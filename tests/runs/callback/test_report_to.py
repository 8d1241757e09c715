"""What TensorBoard, W&B and trackio are handed: the same keys, under `report_to`.

Their packages are not needed: transformers' own callbacks run, over modules with the few calls that they make. Where a
package is installed, a slow test lets it write.
"""

import contextvars
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import integration_utils

from hf_lowmem import LowMemCallback, LowMemTrainer, LowMemTrainingArguments
from tests.runs.callback.runs import data, llama

Row = dict[str, float]
PARTS = ("weights", "trainable", "gradients", "optimizer", "saved", "peak_rss", "peak_rss_added")


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(contents)
    return made


def tensorboard(rows: list[Row]) -> dict[str, ModuleType]:
    class SummaryWriter:
        def __init__(self, log_dir: str) -> None: ...

        def add_text(self, *args: Any) -> None: ...

        def add_scalar(self, key: str, value: float, step: int) -> None:
            rows.append({key: value})

        def flush(self) -> None: ...

        close = flush

    return {"tensorboardX": module("tensorboardX", SummaryWriter=SummaryWriter)}


def wandb(rows: list[Row]) -> dict[str, ModuleType]:
    class Config(dict[str, Any]):
        def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
            super().update(values)

    run = SimpleNamespace(_label=lambda **_: None, summary={})
    made = module("wandb", run=run, config=Config(), define_metric=lambda *_, **__: None, log=rows.append)
    return {
        "wandb": made,
        "wandb.sdk": module("wandb.sdk"),
        "wandb.sdk.lib": module("wandb.sdk.lib"),
        "wandb.sdk.lib.config_util": module("wandb.sdk.lib.config_util", ConfigError=ValueError),
    }


def trackio(rows: list[Row]) -> dict[str, ModuleType]:
    nowhere = contextvars.ContextVar[str | None]("space", default=None)
    made = module(
        "trackio",
        init=lambda **_: None,
        config=wandb([])["wandb"].config,
        context_vars=SimpleNamespace(current_space_id=nowhere),
        log=lambda row, **_: rows.append(row),
        log_system=lambda *_, **__: None,
        finish=lambda: None,
        __version__="0.20",
    )
    return {"trackio": made}


def train(tmp_path: Path, report_to: str) -> Any:
    args = LowMemTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        save_strategy="no",
        max_steps=2,
        logging_steps=1,
        optim="apollo_mini",
        per_device_train_batch_size=2,
        report_to=report_to,
        disable_tqdm=True,
    )
    trainer = LowMemTrainer(llama(), args, train_dataset=data(4), callbacks=[LowMemCallback(verbose=False)])  # type: ignore[arg-type]
    trainer.train()
    return trainer


@pytest.mark.train
@pytest.mark.parametrize("fake", [tensorboard, wandb, trackio], ids=lambda fake: fake.__name__)
def test_a_logger_gets_every_part_once_measured(tmp_path: Path, monkeypatch: Any, fake: Any) -> None:
    rows: list[Row] = []
    for name, made in fake(rows).items():
        monkeypatch.setitem(sys.modules, name, made)
    if fake is tensorboard:
        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # so that the other package is taken
    trainer = train(tmp_path, fake.__name__)
    seen = {key for row in rows for key in row}
    assert {f"train/lowmem/{name}_gib" for name in PARTS} <= seen
    assert not [key for key in seen if key.startswith("train/memory")]
    history = {key for row in trainer.state.log_history for key in row if key.startswith("lowmem/")}
    assert {f"train/{key}" for key in history} == {key for key in seen if "lowmem/" in key}
    values = [value for row in rows for key, value in row.items() if "lowmem/" in key]
    assert all(isinstance(value, float) for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_real_logger_writes(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    (tmp_path / "logs").mkdir()
    pytest.importorskip(name)  # which reads its folder from there
    train(tmp_path / "run", name)
    written = b"".join(path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert b"lowmem/weights_gib" in written
