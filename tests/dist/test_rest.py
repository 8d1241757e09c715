"""`lowmem_weights="int8_sr"` under FSDP2: shards of codes, which are what is gathered."""

from pathlib import Path

import pytest

from hf_lowmem.optim import OPTIMIZERS
from tests.dist.launch import launch, launch_jobs

WORKER = "tests.dist.rest_worker"
FORMS = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]
pytestmark = [pytest.mark.dist, pytest.mark.train]


def test_shards_of_codes(tmp_path: Path) -> None:
    """One process's bits; a byte a weight kept and sent; who reads one is told; files give codes back."""
    jobs = [["equals", "adamw"], ["memory"], ["guard"], ["settings"], ["files", str(tmp_path)]]
    assert [len(passed) for passed in launch_jobs(2, jobs, module=WORKER)] == [2, 2, 2, 2, 2]


@pytest.mark.slow
def test_every_method_has_one_process_s_loss() -> None:
    launch(2, "equals", *(name for name in OPTIMIZERS if name not in ("soap", "muon")), module=WORKER)


@pytest.mark.slow
def test_a_number_of_processes_to_keep_weights_whole_is_refused() -> None:
    launch(4, "number", module=WORKER)


@pytest.mark.slow
def test_trainers_and_loops_resume_to_the_bit(tmp_path: Path) -> None:
    jobs = [["trainer", str(tmp_path), *FORMS], ["loop", str(tmp_path), *FORMS]]
    assert [passed[:-1] for passed in launch_jobs(2, jobs, module=WORKER)] == [FORMS, FORMS]
