"""`hf-lowmem compare --against baseline`: the same few steps with and without our fields."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hf_lowmem.cli import against
from hf_lowmem.cli.main import main
from hf_lowmem.cli.train import train
from hf_lowmem.cli.wrong import WrongCommand
from hf_lowmem.runs.report import read_report
from hf_lowmem.training import section
from hf_lowmem.training.dpo import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer
from tests.test_scripts import as_text, model_and_data

__all__ = ["model_and_data"]  # a fixture

FIELDS = ["--optim", "adamw", "--lowmem_state", "8bit", "--lowmem_activations", "checkpoint_fp8"]


def here(method: str, flags: list[str], environment: dict[str, str]) -> None:
    """What `hf_lowmem.cli.trial` does, in this process."""
    pair = (LowMemDPOConfig, LowMemDPOTrainer) if method == "dpo" else (LowMemSFTConfig, LowMemSFTTrainer)
    with mock.patch.dict(os.environ, environment, clear=True):
        assert train(*pair, arguments=flags, command="x", save=False) == 0


@pytest.fixture
def flags(model_and_data: tuple[str, str]) -> list[str]:
    model, data = model_and_data
    shape = ["--use_cpu", "--max_length", "32", "--per_device_train_batch_size", "2"]
    return ["--model_name_or_path", model, "--dataset_name", data, *shape, "--steps", "2"]


@pytest.mark.train
def test_two_runs_differ_in_our_fields_alone(
    flags: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against, "_train", here)
    as_text(flags[3])
    out = tmp_path / "both"
    long = ["--max_steps", "500"]  # as the user's own command has it
    assert main(["compare", "--against", "baseline", *flags, *long, *FIELDS, "--output_dir", str(out)]) == 0
    shown, told = capsys.readouterr()
    assert "--max_steps is not looked at here: each run takes --steps, 2." in told
    said = next(line for line in shown.splitlines() if line.startswith("With hf_lowmem beside the baseline: peak "))
    assert re.search(r"optimizer state \S+ KiB beside \S+ KiB \(-\d+ %\)", said)
    assert re.search(r"last loss \d\.\d+ beside \d\.\d+", said)
    ours, theirs = read_report(out / "hf_lowmem"), read_report(out / "baseline")
    differing = {
        k for k in ours["settings"] | theirs["settings"] if ours["settings"].get(k) != theirs["settings"].get(k)
    }
    assert differing == {
        "optim",
        "lowmem_state",
        "lowmem_activations",
        "gradient_checkpointing",
        "activation_checkpointing",
    }
    assert theirs["settings"]["optim"] == "adamw_torch_fused"
    assert [r["trainings"][0]["to_step"] for r in (ours, theirs)] == [2, 2]
    first = [r["history"][0]["loss"] for r in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], rel=1e-6), "the same model and the same data"
    assert not list(out.rglob("*.safetensors")), "no model is saved"


@pytest.mark.train
@pytest.mark.parametrize("optim", ["adamw_torch", "lion"])
def test_the_baseline_takes_no_field_of_ours_from_the_environment(
    flags: list[str], optim: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """What the variable says of the run itself counts in both."""
    ours = {"lowmem_activations": "fp8", "optim": optim, "learning_rate": 3e-4}
    monkeypatch.setenv(
        section.VARIABLE, json.dumps(ours | ({"optim_args": "cautious=true"} if optim == "lion" else {}))
    )
    monkeypatch.setattr(against, "_train", here)
    as_text(flags[3])
    out = tmp_path / "both"
    assert main(["compare", "--against", "baseline", *flags, "--output_dir", str(out)]) == 0
    with_ours, without = (read_report(out / name)["settings"] for name in ("hf_lowmem", "baseline"))
    assert {name: with_ours[name] for name in ours} == ours
    assert [name for name in without if name.startswith("lowmem")] == []
    assert without["learning_rate"] == 3e-4
    assert without["optim"] == ("adamw_torch" if optim == "adamw_torch" else "adamw_torch_fused")


@pytest.mark.train
def test_pairs_and_json_and_nothing_left(
    flags: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(
        against, "_train", lambda method, words, env: [made.append(Path(words[-1])), here(method, words, env)]
    )
    words = ["compare", "--against=baseline", "--method", "dpo", *flags, "--loss_type", "asft", "--lowmem", "light"]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown[shown.index('{\n "runs"') :])
    assert set(found["runs"]) == {"hf_lowmem", "baseline"}
    assert len(made) == 2
    assert not any(folder.exists() for folder in made)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optim", "adamw_torch"], "no field of hf_lowmem is set"),
        (["--lowmem", "light", "--steps", "0"], "--steps 0"),
        (["--lowmem", "light", "--lowmem_rnk", "3"], "did you mean --lowmem_rank?"),
        (["--lowmem", "light", "--against", "nothing"], "invalid choice: 'nothing'"),
        (["--lowmem", "light", "--plot", "gone/x.png"], "there is no folder gone"),
    ],
)
def test_what_cannot_be_compared(more: list[str], words: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(against, "_train", lambda *_: pytest.fail("trained"))
    assert main(["compare", "--against", "baseline", "--model_name_or_path", "m", "--dataset_name", "d", *more]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(2, WrongCommand, "^hf-lowmem sft: x$"), (1, ChildProcessError, "status 1:\nprogress\nhf-lowmem sft: x$")],
)
def test_a_run_that_fails_says_why(status: int, error: type[Exception], words: str, monkeypatch: Any) -> None:
    done = subprocess.CompletedProcess([], status, "", "progress\nhf-lowmem sft: x\n")
    monkeypatch.setattr(against.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error, match=words):
        against._train("sft", [], {})


@pytest.mark.slow
def test_a_run_has_a_process_of_its_own() -> None:
    with pytest.raises(WrongCommand, match="hf-lowmem sft: model_name_or_path is not set"):
        against._train("sft", ["--output_dir", "x", "--use_cpu"], os.environ)
