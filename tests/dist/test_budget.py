"""`lowmem_budget` under torchrun: one search, one choice for all."""

import pytest

from tests.dist.launch import launch


@pytest.mark.train
@pytest.mark.dist
def test_all_processes_train_with_what_one_of_them_found() -> None:
    assert launch(2, module="tests.dist.budget_worker") == ["all"]
