"""Every optimizer under DDP and FSDP2 on two gloo processes: one process's result, equal replicas, bad gradients."""

import itertools
from collections.abc import Callable

import pytest

from hf_lowmem.optim import OPTIMIZERS
from tests.dist.launch import launch

SHARDABLE = [name for name in OPTIMIZERS if name != "soap"]  # which is refused by name
OTHER_RULES = ["apollo_mini+scale", "galore+adam_mini", "scale+adam_mini", "scale+sinkgd"]  # of embedding and head
CAUTIOUS = [f"{name}+cautious" for name in ("adamw", "lion", "apollo", "galore", "fira", "natural_galore")]
CODECS = ("fp32", "int8", "fp8_expand")
pytestmark = [pytest.mark.dist, pytest.mark.train]
Passed = Callable[[str], list[str]]


def check(passed: list[str], kind: str, names: list[str], codecs: tuple[str, ...]) -> None:
    wanted = {" ".join(case) for case in itertools.product([kind], names, codecs)}
    assert wanted <= {" ".join(line.split()[:3]) for line in passed}


def equals(kind: str, names: list[str], codec: str) -> None:
    check(launch(2, "equals", kind, ",".join(names), codec), kind, names, (codec,))


def test_one_of_each_kind_is_one_process(passed: Passed) -> None:
    check(
        passed("equals"),
        "fsdp2",
        ["adamw", "lamb", "natural_galore", "scale", "muon", "galore+adam_mini", "adamw+cautious"],
        ("fp32", "fp8_expand"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_method_under_fsdp2_is_one_process(codec: str) -> None:
    equals("fsdp2", SHARDABLE + OTHER_RULES + CAUTIOUS, codec)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_method_under_ddp_is_one_process(codec: str) -> None:
    equals("ddp", [*OPTIMIZERS, *OTHER_RULES, *CAUTIOUS], codec)


def test_replicas_stay_equal(passed: Passed) -> None:
    assert len(passed("replicas")) == 2 * 2 + 1


def test_shards_round_each_for_itself_and_are_compressed_as_the_whole_would_be(passed: Passed) -> None:
    assert passed("shards") == ["independent", "thresholds", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", SHARDABLE)
def test_replicas_are_equal_after_a_thousand_steps(kind: str, name: str) -> None:
    launch(2, "replicas", kind, name, "bf16_sr", "1000")


def test_what_cannot_be_cut_is_refused_and_bad_gradients_are_left_out_by_all(passed: Passed) -> None:
    assert passed("refused") == ["refused soap", "refused svd", "all"]
    assert passed("bad") == ["bad adamw", "bad apollo", "bad galore", "all"]


def test_step_in_backward_under_fsdp2(passed: Passed) -> None:
    assert [line.split()[1] for line in passed("backward")[:-1]] == ["adamw", "apollo", "galore", "apollo_mini+scale"]
