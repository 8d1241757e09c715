"""What a default run looks at, in two processes that are started once for all of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.launch import launch_jobs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="session")
def passed(folder: Path) -> Callable[[str], list[str]]:
    """What a job printed, by its name."""
    jobs = {
        "equals": ["fsdp2", "adamw,lamb,natural_galore", "fp32,fp8_expand"],
        "replicas": ["ddp,fsdp2", "adamw,galore", "bf16_sr", "20"],
        "shards": [],
        "refused": [],
        "bad": ["adamw,apollo,galore"],
        "backward": ["adamw,apollo,galore"],
        "resume": ["adamw,natural_galore", "int8,fp8_expand", str(folder / "resume")],
        "reshard-save": ["adamw,apollo,natural_galore", "8bit", str(folder / "reshard")],
        "convert": ["adamw,apollo,natural_galore", "fp32,int8"],
        "foreign": [],
    }
    found = dict(zip(jobs, launch_jobs(2, [(task, *words) for task, words in jobs.items()]), strict=True))
    return found.__getitem__
