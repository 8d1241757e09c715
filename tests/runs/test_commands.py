"""`hf-lowmem card` and `hf-lowmem compare`: what they write and print, and one line where they cannot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_lowmem.cli import main as cli
from hf_lowmem.cli.cards import plan_of_run
from hf_lowmem.runs.compare import compare, names_of
from hf_lowmem.runs.report import REPORT, read_report, write_report
from tests.runs.cards import PLAN, dpo, made_up, plain, sft

OTHER: dict[str, Any] = {
    "run": "other",
    "settings": {"optim": "adamw_torch", "learning_rate": 0.01, "bf16": True},
    "trainings": [
        {
            "from_step": 0,
            "to_step": 9,
            "finished": True,
            "memory": {"weights": 1024, "peak": 8192, "peak_added": 99, "peak_source": "process RSS, sampled"},
            "speed": {"tokens_per_second": 99.0},
        }
    ],
}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    runs = tmp_path / "made-up", tmp_path / "other"
    for run, report in zip(runs, (made_up(), made_up(**OTHER)), strict=True):
        write_report(run, report)
    return runs


def test_card_writes_the_template_filled_in(two: tuple[Path, Path], capsys: Any) -> None:
    assert cli.main(["card", str(two[0])]) == 0
    path = two[0] / "README.md"
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "org/Tiny"
    assert header["datasets"] == ["tiny"] or header["datasets"] == "tiny"
    for expected in (
        "| `optim` | apollo_mini |",
        "| weights | 1.00 KiB |",
        "| peak (cuda allocator) | 4.00 KiB |",
        "| gradients | not measured |",
        "| tokens/s | 123.5 |",
        "1,000 of its 2,000 parameters trained, stored as bfloat16, on 2 processes.",
        "a GPU. torch 2.13.0.",
    ):
        assert expected in text
    assert "{" not in text
    assert read_report(two[0])["card_frame"] is not None


def test_card_elsewhere_leaves_the_run_alone(two: tuple[Path, Path], tmp_path: Path) -> None:
    before = (two[0] / REPORT).read_bytes()
    (two[0] / "README.md").write_text("# mine")
    assert cli.main(["card", str(two[0]), "--output", str(tmp_path / "card.md")]) == 0
    assert "| `optim` | apollo_mini |" in (tmp_path / "card.md").read_text()
    assert (two[0] / REPORT).read_bytes() == before
    assert (two[0] / "README.md").read_text() == "# mine"


def test_card_with_a_plan_from_a_file(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    assert cli.main(["card", str(two[0]), "--plan", str(tmp_path / "plan.json")]) == 0
    assert "| peak (cuda allocator) | 5.00 KiB | 4.00 KiB |" in (two[0] / "README.md").read_text()
    assert cli.main(["card", str(two[0])]) == 0
    assert "| part | predicted | measured |" in (two[0] / "README.md").read_text(), "the report keeps it"


@pytest.mark.train
def test_a_run_is_planned_with_its_own_settings(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    class Made:
        def to_dict(self) -> dict[str, Any]:
            return PLAN

    def plan(model: Any, args: Any, **kwargs: Any) -> Made:
        seen.update(kwargs, args=args, config=json.loads((Path(model) / "config.json").read_text()))
        return Made()

    monkeypatch.setattr("hf_lowmem.planner.plan", plan)
    dpo(tmp_path, tokenizer).train()
    report = read_report(tmp_path)
    report["settings"]["lowmem_budget"] = "24GiB"
    write_report(tmp_path, report)
    assert cli.main(["card", str(tmp_path), "--plan"]) == 0
    args = seen["args"]
    assert args.lowmem_budget is None, "nothing is searched for again"
    assert (args.optim, args.lowmem_state, args.loss_type) == ("apollo_mini", "int8", ["asft"])
    assert seen["config"]["hidden_size"] == 64
    assert (seen["dtype"], seen["device"], seen["world_size"]) == ("float32", "cpu", 1)
    assert seen["peft_config"].r == 2
    assert set(seen["peft_config"].target_modules) == {"q_proj", "v_proj"}
    assert "predicted" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_plan_of_a_run_is_what_was_measured(tmp_path: Path, tokenizer: Any) -> None:
    sft(tmp_path, tokenizer, max_length=12).train()  # as long as each of its rows
    report = read_report(tmp_path)
    made, measured = plan_of_run(report), report["trainings"][-1]["memory"]
    assert made["parts"]["states"] == pytest.approx(measured["optimizer"], rel=0.01)
    assert max(p.get("gradients", 0) for p in made["timeline"]) == pytest.approx(measured["gradients"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": "LowMemTrainingArguments"}, "LowMemTrainingArguments, not LowMemSFTConfig"),
        ({"config": None}, "not recorded"),
        ({"model": {"quantized": True, "config": {}}}, "quantised"),
        ({"model": {}}, "no config of the model"),
        ({"model": {"config": {"model_type": "nonsense"}}, "settings": {}}, "--plan:"),
    ],
)
def test_a_run_that_cannot_be_planned(tmp_path: Path, capsys: Any, changes: Any, words: str) -> None:
    write_report(tmp_path, made_up(**changes))
    assert cli.main(["card", str(tmp_path), "--plan"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "--plan plan.json" in error
    assert not (tmp_path / "README.md").exists()


STATE = {"global_step": 1, "log_history": [{"step": 1, "epoch": 0.5, "loss": 2.0}]}
# (name of a file, what is in it, words of the error)
BAD: list[tuple[str, Any, str]] = [
    ("nothing", "", "is not a run: it has neither lowmem_report.json nor trainer_state.json"),
    (REPORT, "{", "is damaged"),
    (REPORT, b"\xff\xfe\x00", "is damaged"),
    (REPORT, b"[" * 100_000, "is damaged"),
    ("trainer_state.json", b'{"a":' * 100_000, "is damaged"),
    (REPORT, [], "is not a report of hf_lowmem"),
    (REPORT, {"hello": 1}, "is not a report of hf_lowmem"),
    (REPORT, made_up(format=4), "has format 4, and this version of hf_lowmem reads 3. Upgrade"),
    (REPORT, made_up(extra=1), "has keys that no report has: 'extra'"),
    (REPORT, {k: v for k, v in made_up().items() if k != "results"}, "'results' is missing"),
    (REPORT, made_up(settings=[]), "'settings' is []"),
    (REPORT, made_up(results={"train_loss": "low"}), "'train_loss' in 'results' is 'low', no number"),
    (REPORT, made_up(trainings=[{}]), "'trainings' holds {}"),
    (REPORT, made_up(trainings=[{"memory": {}, "speed": {}}]), "'from_step' in 'trainings' is None"),
    (REPORT, made_up(history=[{"loss": 1.0}]), "'history' holds"),
    (REPORT, made_up(model={"parameters": "many"}), "'parameters' in 'model' is 'many'"),
    (REPORT, made_up(predicted={}), "'predicted' is no plan"),
    ("trainer_state.json", "{}", "is not the state of a trainer"),
    ("trainer_state.json", STATE | {"log_history": [{"loss": 1}]}, "is not the state of a trainer"),
    ("trainer_state.json", STATE | {"log_history": [{"step": 1, "lowmem/saved": {}}]}, "no number"),
]


@pytest.mark.parametrize("command", ["card", "compare"])
@pytest.mark.parametrize(("name", "content", "words"), BAD, ids=[f"{name}: {words}" for name, _, words in BAD])
def test_what_is_no_run(tmp_path: Path, capsys: Any, command: str, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else _text(content).encode())
    assert cli.main([command, str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert error.startswith(f"hf-lowmem {command}: {tmp_path}")
    assert words in error
    assert out == ""
    assert [p.name for p in tmp_path.iterdir()] == [name]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


@pytest.mark.parametrize("command", ["card", "compare"])
def test_what_is_no_folder(tmp_path: Path, capsys: Any, command: str) -> None:
    (tmp_path / "file").write_text("x")
    for path, words in (
        (tmp_path / "file", "is a file: give the run's folder"),
        (tmp_path / "gone", "there is no run"),
    ):
        assert cli.main([command, str(path)]) == 1
        error = capsys.readouterr().err
        assert str(path) in error
        assert words in error


def test_a_users_card_is_refused_with_a_way_out(two: tuple[Path, Path], capsys: Any) -> None:
    (two[0] / "README.md").write_text("# mine")
    assert cli.main(["card", str(two[0])]) == 1
    error = capsys.readouterr().err
    assert str(two[0] / "README.md") in error
    assert "--output FILE" in error
    assert (two[0] / "README.md").read_text() == "# mine"


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"timeline": 1}'])
def test_a_file_that_is_no_plan(two: tuple[Path, Path], tmp_path: Path, capsys: Any, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert cli.main(["card", str(two[0]), "--plan", str(tmp_path / "plan.json")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "plan.json") in error
    assert "`hf-lowmem plan ... --json`" in error


def test_compare_tells_differences_and_keeps_peaks_apart(two: tuple[Path, Path], capsys: Any) -> None:
    assert cli.main(["compare", *map(str, two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | made-up | other |"
    for line in (
        "| `optim` | apollo_mini | adamw_torch |",
        "| `bf16` | default | True |",
        "| weights | 1.00 KiB | 1.00 KiB |",
        "| saved for backward | 2.00 KiB | not measured |",
        "| peak (cuda allocator) | 4.00 KiB | not measured |",
        "| peak (process RSS, sampled) | not measured | 8.00 KiB |",
        "| tokens/s | 123.5 | 99 |",
        "| train loss, last | 1.5 | 1.5 |",
    ):
        assert line in lines
    assert not any("learning_rate" in line for line in lines), "it does not differ"
    assert all(line.count("|") == 4 for line in lines)


def test_compare_as_json(two: tuple[Path, Path], capsys: Any) -> None:
    assert cli.main(["compare", *map(str, two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(compare(dict(zip(("made-up", "other"), map(read_report, two), strict=True)))))
    assert found["differing"]["optim"] == {"made-up": "apollo_mini", "other": "adamw_torch"}
    assert found["runs"]["other"]["memory"]["peak"] == 8192
    assert found["runs"]["other"]["memory"]["saved"] is None


def test_a_run_without_settings_differs_in_none(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    compared = compare({"a": made_up(), "b": read_report(tmp_path)})
    assert compared["differing"] == {}
    assert compared["runs"]["b"]["results"]["last_loss"] == 2.0


@pytest.mark.train
def test_real_runs_beside_each_other(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    sft(a, tokenizer, max_steps=1).train()
    plain(b, optim="adamw_torch", lowmem_state=None).train()
    assert cli.main(["compare", str(a), str(b), "--plot", str(tmp_path / "both.png")]) == 0
    out = capsys.readouterr().out
    assert "| `lowmem_state` | int8 | default |" in out
    assert "| trainer | LowMemSFTTrainer | LowMemTrainer |" in out
    memory = [read_report(run)["trainings"][0]["memory"] for run in (a, b)]
    assert memory[0]["optimizer"] < memory[1]["optimizer"]
    from matplotlib.image import imread

    image = imread(tmp_path / "both.png")
    assert image.shape[0] > 500
    assert image.shape[1] > 1000


def test_plot_without_matplotlib(two: tuple[Path, Path], monkeypatch: Any, capsys: Any) -> None:
    for name in [n for n in sys.modules if n == "hf_lowmem.runs.plot" or n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["compare", *map(str, two), "--plot", "x.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"]
    assert names_of(paths) == ["x/run", "y/run", "z"]
    assert names_of([tmp_path / "x"]) == ["x"]


@pytest.mark.train
@pytest.mark.parametrize("format", [1, 2])
def test_a_report_of_an_older_version_is_read(tmp_path: Path, format: int) -> None:
    """Format 1 has the plan under another name, and none before 3 a word of the output head."""
    plan = {"peak_bytes": 5, "parts": {"weights": 3}, "device": "cuda"}
    now = made_up(predicted=plan)
    then = {key: value for key, value in now.items() if key != "head"} | {"format": format}
    if format == 1:
        then["foretold"] = then.pop("predicted")
    (tmp_path / REPORT).write_text(json.dumps(then))
    assert read_report(tmp_path) == now


def test_a_state_is_read_with_the_keys_of_now_and_of_before(tmp_path: Path) -> None:
    """In GiB under the names of the loggers; older ones in bytes."""
    now = {"lowmem/saved_gib": 3 / 2**30, "lowmem/peak_rss_gib": 7.0, "lowmem/peak_rss_added_gib": 0.5}
    then = {"lowmem/saved": 3, "lowmem/peak_rss": 7 * 2**30, "lowmem/peak_rss_added": 2**29}
    for i, row in enumerate((now, then)):
        run = tmp_path / str(i)
        run.mkdir()
        (run / "trainer_state.json").write_text(json.dumps(STATE | {"log_history": [{"step": 1, **row}]}))
        assert read_report(run)["trainings"][0]["memory"] == {
            "saved": 3,
            "peak": 7 * 2**30,
            "peak_added": 2**29,
            "peak_source": "process RSS, sampled",
        }


@pytest.mark.train
def test_help_is_fast_and_names_the_commands() -> None:
    script = (
        "import sys\nfrom hf_lowmem.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "card" in done.stdout
    assert "compare" in done.stdout
    assert not {"torch", "transformers", "yaml", "huggingface_hub"} & set(done.stdout.splitlines()[-1].split())
