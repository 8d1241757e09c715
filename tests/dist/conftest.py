"""What a default run looks at, in two processes that are started once for all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.launch import launch, launch_jobs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="session")
def passed(folder: Path) -> Callable[[str], list[str]]:
    """What a job printed, by its name."""
    jobs = {
        "equals": ["fsdp2", "adamw,lamb,natural_galore,scale,muon,galore+adam_mini,adamw+cautious", "fp32,fp8_expand"],
        "replicas": ["ddp,fsdp2", "adamw,galore", "bf16_sr", "20"],
        "shards": [],
        "refused": [],
        "bad": ["adamw,apollo,galore"],
        "backward": ["adamw,apollo,galore,apollo_mini+scale"],
        "resume": ["adamw,natural_galore,galore+adam_mini", "int8,fp8_expand", str(folder / "resume")],
        "reshard-save": ["adamw,apollo,natural_galore", "8bit", str(folder / "reshard")],
        "convert": ["adamw,apollo,natural_galore", "fp32,int8"],
        "foreign": [],
    }
    found = dict(zip(jobs, launch_jobs(2, [(task, *words) for task, words in jobs.items()]), strict=True))
    return found.__getitem__


@pytest.fixture(scope="session")
def trained(folder: Path) -> list[str]:
    """What the processes printed in which trainers trained."""
    return launch(2, str(folder / "trainer"), module="tests.dist.trainer_worker")
