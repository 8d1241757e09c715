"""Products in 8 bits on two processes: FSDP2 codes what it has gathered."""

import pytest

from tests.dist.launch import launch


@pytest.mark.slow
@pytest.mark.dist
def test_gradients_are_those_of_one_process() -> None:
    passed = launch(2, module="tests.dist.products_worker", seconds=600)
    assert passed[-1] == "all"
    assert set(passed[:-1]) == {
        f"{kind} {tier} {recipe}"
        for kind in ("ddp", "fsdp2")
        for tier in (None, "fp8")
        for recipe in ("fp8_row", "int8_row")
    } | {"ddp adapters", "fsdp2 adapters"}
