"""`lowmem_budget` under torchrun: one search, one choice for all."""

import pytest


@pytest.mark.train
@pytest.mark.dist
def test_all_processes_train_with_what_one_of_them_found(trained: list[str]) -> None:
    assert "budget" in trained
