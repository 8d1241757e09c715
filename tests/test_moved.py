"""Files of 0.1 name modules of 0.1: they are read all the same."""

import io
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import trl

from hf_lowmem import LowMemDPOConfig, LowMemSFTConfig, LowMemTrainingArguments, with_lowmem
from hf_lowmem.moved import MOVED


def as_of_0_1(value: Any, now: str, then: str) -> bytes:
    """A pickle of `value` that names the old module; protocol 2 writes names as lines of text."""
    text = pickle.dumps(value, protocol=2)
    old = text.replace(f"c{now}\n".encode(), f"c{then}\n".encode())
    assert old != text
    return old


@pytest.mark.parametrize(
    ("make", "now", "then"),
    [
        (LowMemTrainingArguments, "hf_lowmem.training.arguments", "hf_lowmem.arguments"),
        (LowMemSFTConfig, "hf_lowmem.training.sft", "hf_lowmem.sft"),
        (LowMemSFTConfig, "hf_lowmem.training.sft", "hf_lowmem.arguments"),
        (LowMemDPOConfig, "hf_lowmem.training.dpo_config", "hf_lowmem.dpo_config"),
        (LowMemDPOConfig, "hf_lowmem.training.dpo_config", "hf_lowmem.dpo"),
        (LowMemDPOConfig, "hf_lowmem.training.dpo_config", "hf_lowmem.arguments"),
        (with_lowmem(trl.RewardConfig), "hf_lowmem.training.wrap", "hf_lowmem.wrap"),
        (with_lowmem(trl.RewardConfig), "hf_lowmem.training.wrap", "hf_lowmem.arguments"),
    ],
)
def test_arguments_of_0_1_are_read(make: Any, now: str, then: str, tmp_path: Path) -> None:
    args = make(str(tmp_path), optim="apollo_mini", lowmem_state="int8", use_cpu=True, bf16=False, report_to="none")
    found = pickle.load(io.BytesIO(as_of_0_1(args, now, then)))
    assert type(found) is make
    assert found.to_dict() == args.to_dict()


def test_the_modules_of_0_1_have_what_they_had_and_no_more() -> None:
    from hf_lowmem.sft import LowMemSFTConfig as old  # type: ignore[import-not-found]

    assert old is LowMemSFTConfig
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        from hf_lowmem.arguments import nothing_of_that_name  # type: ignore[import-not-found] # noqa: F401


def test_every_module_of_0_1_is_found() -> None:
    for name in MOVED:
        import_module(f"hf_lowmem.{name}")
    assert import_module("hf_lowmem.losses").simpo is import_module("hf_lowmem.preference.losses").simpo
    assert import_module("hf_lowmem.losses.asft").asft is import_module("hf_lowmem.preference.losses.asft").asft
    assert import_module("hf_lowmem.cards.record").SKIPPED == "lowmem/skipped"


@pytest.mark.parametrize("name", ["hf_lowmem.never_was", "hf_lowmem.losses.never_was", "hf_lowmem.training.sft.x"])
def test_no_other_module_is_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module(name)
