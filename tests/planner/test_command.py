"""`hf-lowmem plan`: the trainer's flags in, one answer on stdout, progress on stderr, errors in a line."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hf_lowmem.cli.main import main
from hf_lowmem.runs.timeline import NARROW, phase_ticks
from tests.planner.real import small_config

# Of the model below: embeddings and head; in each of two layers q and o, k and v, the MLP, two norms; the last norm.
PARAMETERS = 2 * 512 * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 704 * 256 + 2 * 256) + 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    small_config(num_hidden_layers=2).save_pretrained(made)
    return made


def flags(model: Path, *more: str) -> list[str]:
    shape = ["--max_length", "32", "--per_device_train_batch_size", "1"]
    return ["plan", "--model", str(model), "--dtype", "bfloat16", *shape, *more]


@pytest.mark.train
def test_json_is_the_one_thing_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(folder, "--optim", "adamw_torch", "--json")) == 0
    shown = capsys.readouterr()
    made: dict[str, Any] = json.loads(shown.out)
    assert made["peak_bytes"] == sum(made["parts"].values()) > 0
    at_update = [point for point in made["timeline"] if point["phase"] == "optimizer"][-1]
    assert made["settings"]["parameters"] == PARAMETERS
    buffers = at_update["weights"] - 2 * PARAMETERS  # the rotary frequencies, fp32
    assert 0 < buffers < 1024
    assert at_update["gradients"] == 2 * PARAMETERS
    assert 4 * PARAMETERS <= at_update["states"] < 4 * PARAMETERS + 1024  # and a step count a tensor
    assert "simulating all 2 layers" in shown.err


@pytest.mark.train
def test_a_table_and_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    assert main(flags(folder / "config.json", "--optim", "lion", "--lowmem_state", "8bit", "--plot", str(picture))) == 0
    shown = capsys.readouterr().out
    assert {"weights", "states", "peak"} <= {line.split()[0] for line in shown.splitlines()}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.train
def test_a_training_run_s_yaml_is_planned_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"model_name_or_path: {folder}\ndataset_name: trl-lib/Capybara\ndtype: bfloat16\nmax_length: 32\n"
        "per_device_train_batch_size: 1\noptim: apollo_mini\nlowmem_state: 8bit\nlearning_rate: 1.0e-4\n"
    )
    assert main(["plan", "--config", str(yaml), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["optim"] == "apollo_mini"
    assert settings["lowmem"] == {"lowmem_state": "8bit"}
    assert (settings["dtype"], settings["tokens"]) == ("bfloat16", 32)


@pytest.mark.train
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_length", "None"], "max_length=None"),
        (["--load_in_4bit"], "4-bit weights are not trained"),
        (["--implementation", "magic"], "implementation='magic' is not available"),
        (["--implementation", "foreach", "--optim", "lion"], "has no effect with optim='lion'"),
        (["--world_size", "2"], "world_size=2 with parallel=None"),
        (["--torch_compile"], "torch_compile=True cannot be planned"),
        (["--lowmem_rank", "4", "--optim", "adamw"], "lowmem_rank=4"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(flags(folder, *more)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path / "nowhere"), "--max_length", "32"]) == 2
    assert "no hub id in the local cache" in capsys.readouterr().err
    odd = tmp_path / "config.json"
    odd.write_text(json.dumps({"model_type": "no_such_model"}))
    assert main(["plan", "--model", str(odd), "--max_length", "32"]) == 2
    assert "'no_such_model' is not one of transformers'" in capsys.readouterr().err


@pytest.mark.train
def test_pairs_have_their_own_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(folder, "--method", "dpo", "--loss_type", "sigmoid", "--json")) == 0
    with_reference = json.loads(capsys.readouterr().out)
    assert main(flags(folder, "--method", "dpo", "--loss_type", "asft", "--json")) == 0
    without = json.loads(capsys.readouterr().out)
    assert with_reference["parts"]["reference"] == with_reference["parts"]["weights"]
    assert "reference" not in without["parts"]
    assert with_reference["settings"]["sequences"] == 2


@pytest.mark.train
def test_a_plan_says_first_what_it_needs_and_what_it_assumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(folder), "--per_device_train_batch_size", "2", "--max_length", "32"]) == 0
    words, assumed, *_ = capsys.readouterr().out.splitlines()
    assert words.startswith("A step needs ")
    assert words.endswith("fits on a card of 8 GiB.")
    said = "2 sequences of 32 tokens, float32 weights, all parameters trained, optim=adamw_torch_fused, checkpointing"
    assert assumed == f"assumed: {said}, on cuda"
    more = ["--optim", "lion", "--lowmem_state", "8bit", "--gradient_accumulation_steps", "4", "--device", "cpu"]
    assert main(flags(folder, *more, "--gradient_checkpointing", "False")) == 0
    words, assumed, *_ = capsys.readouterr().out.splitlines()
    assert words.endswith(" of memory.")
    said = "1 sequence of 32 tokens, 4 times a step, bfloat16 weights, all parameters trained, optim=lion"
    assert assumed == f"assumed: {said}, lowmem_state=8bit, no checkpointing, on cpu"


def test_a_picture_that_cannot_be_written_is_found_before_the_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lowmem.cli.plan.plan", lambda *_, **__: pytest.fail("planned"))
    for path, words in (
        (tmp_path / "gone" / "x.png", "there is no folder"),
        (tmp_path / "x.txt", "ends in none of .png, .svg, .pdf"),
        (tmp_path, "ends in none of"),
    ):
        assert main(flags(folder, "--plot", str(path))) == 2
        assert words in capsys.readouterr().err


def test_names_of_phases_do_not_overlap() -> None:
    phases = ["forward"] * 40 + ["end of forward"] + ["backward"] * 50 + ["clipping", "optimizer", "end"]
    ticks = phase_ticks(phases)
    assert [name for _, name in ticks if name in ("forward", "backward")] == ["forward", "backward"]
    places = [place for place, _ in ticks]
    assert min(b - a for a, b in pairwise(places)) >= NARROW * (len(phases) - 1)
    assert phase_ticks(["forward"]) == [(0.0, "forward")]
