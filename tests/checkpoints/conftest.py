"""A sound checkpoint with a file of each kind, to be spoilt."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_lowmem.checkpoints import verify, write_manifest
from tests.checkpoints.hostile import DEEPSPEED, OPTIMIZER, RANDOM


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("run") / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)
    torch.save(torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]).state_dict(), folder / "scheduler.pt")
    torch.save({"scale": 2.0**16, "_growth_tracker": 0}, folder / "scaler.pt")
    random = np.random.get_state()  # noqa: NPY002 - transformers saves this one
    torch.save({"numpy": random, "cpu": torch.get_rng_state()}, folder / RANDOM)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save({"module": model.state_dict(), "ds_version": "0.17"}, folder / DEEPSPEED)
    (folder / "latest").write_text("global_step4")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    dcp.save({"w": torch.ones(3), "lr": [0.1, (1, 2)]}, checkpoint_id=folder / "shards", no_dist=True)
    write_manifest(folder)
    verify(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint-4"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"
