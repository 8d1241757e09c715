"""SFT, DPO and a plugin's loop under `hf-lowmem launch`: two processes, DDP and FSDP2, train as one process does.

A launch costs more than the trainings in it, so each starts the processes once, for many cases: see train_cases.py. By
default FSDP2's file runs, with every kind of trainer and every tier, in processes that are forked where torchrun would
start them (forked.py); DDP's and the whole product are slow and start them with torchrun, and DDP without this launcher
trains in tests/preference/reference/test_distributed.py.
FSDP2 on a CPU takes a patch of accelerate, tests/dist/fsdp_on_cpu.py, inside the processes.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_lowmem.training import section
from tests.cli.launch.cases import (
    KINDS,
    PRODUCT,
    STEPS,
    TIERS,
    TOTAL_BATCH,
    Case,
    fresh_engine,
    make,
    prepare,
    save_rows,
    train,
)
from tests.cli.launch.test_launch import ROOT, run
from tests.dist.net import apart

FILES = {"ddp": "cpu.yaml", "fsdp2": "fsdp2.yaml"}
CASES = ["sft-fp8-full", "sigmoid-exact-full", "asft-checkpoint_fp8-lora", "plugin-none-full"]
# Of a weight, as a part of the way that it went. A forward and a backward pass through two layers of seven linear ones
# and the head are 45 matrix products in a row, each a sum of up to 128 terms, which in another order is off by
# sqrt(128) roundings of 2**-24; and there are four steps.
SUMMATION = STEPS * 45 * math.sqrt(128) * 2.0**-24

pytestmark = [pytest.mark.dist, pytest.mark.train]
Alone = Callable[[Case], dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    prepare(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def alone(base: Path, tokenizer: Any) -> Alone:
    """What one process, this one, makes of a case."""
    folder = base / "alone"
    folder.mkdir()

    @functools.cache
    def trained(case: Case) -> dict[str, Any]:
        save_rows(folder, case)
        fresh_engine()
        try:
            return train(make(case, base, folder / case.name, tokenizer, TOTAL_BATCH))
        finally:
            fresh_engine()

    return trained


def launched(base: Path, label: str, file: Path, cases: list[Case], forked: bool = False) -> Path:
    """The folder of what two processes made of the cases."""
    folder = base / label
    folder.mkdir()
    for case in cases:
        save_rows(folder, case)
    names = ",".join(case.name for case in cases)
    script = [
        str(ROOT / "tests" / "cli" / "launch" / "train_cases.py"),
        str(base),
        str(folder),
        names,
        "--flag",
        "of it",
    ]
    done = run("--config_file", str(file), "--main_process_port", "0", *script, forked=forked)
    # gloo may complain when the processes end, after everything has passed: the files say what counts.
    missing = [case.name for case in cases if not (folder / f"{case.name}.pt").exists()]
    assert not missing, (missing, done.stderr[-6000:])
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    asked = yaml.safe_load(file.read_text())[section.KEY]
    assert asked
    assert said == [{"world": 2, "section": asked, "arguments": ["--flag", "of it"]}] * 2
    return folder


def check(case: Case, folder: Path, alone: Alone) -> None:
    ours, theirs = torch.load(folder / f"{case.name}.pt", weights_only=True), alone(case)
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert all(torch.equal(w, theirs["start"][n]) for n, w in ours["start"].items())
    distance = apart(ours["weights"], theirs["weights"], theirs["start"])
    allowed = dict.fromkeys(distance, SUMMATION)
    if "fp8" in case.tier:
        # A value between two codes may be tipped to the other one: one more draw of the error that the tier has anyway.
        exact = alone(Case(case.kind, "exact", case.lora))
        own = apart(theirs["weights"], exact["weights"], theirs["start"])
        assert max(own.values()) > SUMMATION
        allowed = {n: SUMMATION + e for n, e in own.items()}
    assert all(d <= allowed[n] for n, d in distance.items()), distance
    # A mean of log-probabilities, moved from its first value to its last by weights that are that far apart.
    moved = max(theirs["losses"]) - min(theirs["losses"])
    bound = SUMMATION * max(theirs["losses"]) + max(allowed.values()) * moved
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0, abs=bound)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_launched_processes_train_as_one(engine: str, base: Path, alone: Alone) -> None:
    """The section of the file is in each process, too, and decides where nothing else is set."""
    cases = [Case.named(name) for name in CASES]
    folder = launched(base, engine, ROOT / "integrations" / "accelerate" / FILES[engine], cases, engine == "fsdp2")
    for case in cases:
        check(case, folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml", "fsdp2.yaml FULL_STATE_DICT"])
def test_every_trainer_with_every_tier_trains_as_one(file: str, base: Path, tmp_path: Path, alone: Alone) -> None:
    name, _, form = file.partition(" ")
    content = yaml.safe_load((ROOT / "integrations" / "accelerate" / name).read_text())
    if form:
        content["fsdp_config"]["fsdp_state_dict_type"] = form
    written = tmp_path / name
    written.write_text(yaml.safe_dump(content))
    folder = launched(base, file.replace(" ", "-"), written, PRODUCT)
    for case in PRODUCT:
        check(case, folder, alone)


def test_the_default_cases_cover_what_there_is() -> None:
    chosen = [Case.named(name) for name in CASES]
    assert {c.kind for c in chosen} == set(KINDS)
    assert {c.tier for c in chosen} == set(TIERS)
    assert {c.lora for c in chosen} == {False, True}
    assert set(chosen) <= set(PRODUCT)
