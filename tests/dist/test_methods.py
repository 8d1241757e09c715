"""Every optimizer under DDP and FSDP2 on two gloo processes: one process's result, equal replicas, bad gradients."""

import itertools

import pytest

from hf_lowmem.optim import OPTIMIZERS
from tests.dist.launch import launch

SHARDABLE = [name for name in OPTIMIZERS if name != "soap"]  # which is refused by name
CODECS = ("fp32", "int8", "fp8_expand")
pytestmark = pytest.mark.dist


def check(kinds: str, names: list[str], codecs: tuple[str, ...]) -> None:
    passed = launch(2, "equals", kinds, ",".join(names), ",".join(codecs))
    wanted = {" ".join(case) for case in itertools.product(kinds.split(","), names, codecs)}
    assert wanted <= {" ".join(line.split()[:3]) for line in passed}


def test_one_of_each_kind_is_one_process() -> None:
    check("fsdp2", ["adamw", "lamb", "natural_galore"], ("fp32", "fp8_expand"))


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_method_under_fsdp2_is_one_process(codec: str) -> None:
    check("fsdp2", SHARDABLE, (codec,))


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_method_under_ddp_is_one_process(codec: str) -> None:
    check("ddp", list(OPTIMIZERS), (codec,))


def test_replicas_stay_equal() -> None:
    launch(2, "replicas", "ddp,fsdp2", "adamw,galore", "bf16_sr", "50")


def test_shards_round_each_for_itself_and_are_compressed_as_the_whole_would_be() -> None:
    assert launch(2, "shards") == ["independent", "thresholds", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", SHARDABLE)
def test_replicas_are_equal_after_a_thousand_steps(kind: str, name: str) -> None:
    launch(2, "replicas", kind, name, "bf16_sr", "1000")


def test_what_cannot_be_cut_is_refused_and_bad_gradients_are_left_out_by_all() -> None:
    launch(2, "refused")
    launch(2, "bad", "adamw,apollo,galore")


def test_step_in_backward_under_fsdp2() -> None:
    launch(2, "backward", "adamw,apollo,galore")
