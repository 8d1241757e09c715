"""Every README shows what the records say, in tables that are made from them; and stays short enough to be read."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hf_lowmem
from hf_lowmem.codecs import CODECS, PAIRS
from hf_lowmem.kernels import KERNELS
from hf_lowmem.optim import OPTIMIZERS, ZEROTH
from hf_lowmem.specs import TIERS
from tests.readmes import READMES, RECORDS, ROOT, inline_code

FRONT = READMES["README.md"]
SECTIONS = [
    "Install",
    "Ten lines",
    "Which setting?",
    "Memory",
    "What there is",
    "Other ways in",
    "What you can rely on",
    "Limits",
    "Contributing, citation, license",
]
# Which tables stand where: none may be lost, none stands twice.
TABLES = {
    "README.md": ["which", "memory", "long_line"],
    "hf_lowmem/activations/README.md": ["activations", "long_sequences", "long_auto", "long_real"],
    "hf_lowmem/kernels/README.md": ["cpu_layers", "targets"],
    "hf_lowmem/matmul/README.md": ["products_error", "products_loss", "products_long", "products_cost", "sample"],
    "hf_lowmem/optim/README.md": [
        "codecs", "long_run", "long_steps", "update_errors", "quality", "states", "speed", "weight_stores",
    ],
    "hf_lowmem/optim/zeroth/README.md": ["zeroth_offload", "zeroth"],
    "hf_lowmem/planner/README.md": ["plan_vs_cpu", "plan_table", "plan_fields", "budget"],
    "hf_lowmem/preference/README.md": ["preference_memory", "preference_time", "collapse"],
    "hf_lowmem/training/README.md": ["presets", "wire"],
    "hf_lowmem/weights/README.md": ["weights", "weights_peers", "weights_drift"],
    "scripts/README.md": ["growth", "merged", "adapters"],
    "scripts/bench/README.md": [
        "demo", "demo_smallest", "bases", "embeddings", "arithmetic", "accumulation", "accumulation_loss",
    ],
}  # fmt: skip


@pytest.fixture
def made() -> Any:
    """The module that makes the tables."""
    return importlib.import_module("_readme")


@pytest.fixture
def optim_tables(made: Any) -> Any:
    return importlib.import_module("_readme_optim")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDS / name).read_text().splitlines()]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("name", READMES)
def test_every_table_is_its_record(made: Any, name: str) -> None:
    assert made.rewritten(READMES[name]) == READMES[name], "python scripts/bench/_readme.py --write"
    assert [match[2] for match in made.MARKED.finditer(READMES[name])] == TABLES.get(name, [])


def test_every_table_stands_somewhere(made: Any) -> None:
    assert {str(path.relative_to(ROOT)) for path in made.readmes()} == set(READMES)
    assert sorted(made.TABLES) == sorted(table for tables in TABLES.values() for table in tables)


def test_a_changed_table_is_found_and_made_anew(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "README.md"
    text = "before\n\n<!-- table: targets -->\n| old |\n<!-- end -->\n\nafter\n"
    path.write_text(text)
    monkeypatch.setattr(made, "ROOT", tmp_path)
    monkeypatch.setattr(made, "readmes", lambda: [path])
    assert made.main([]) == 1
    assert "README.md: differs from the records" in capsys.readouterr().out
    assert path.read_text() == text
    assert made.main(["--write"]) == 0
    new = path.read_text()
    assert new.startswith("before\n\n<!-- table: targets -->\n| target |")
    assert new.endswith("|\n<!-- end -->\n\nafter\n")
    assert "| old |" not in new
    assert made.main([]) == 0
    with pytest.raises(KeyError, match="no_such"):
        made.rewritten("<!-- table: no_such -->\n<!-- end -->")


def test_the_front_page_can_be_read() -> None:
    assert len(FRONT.splitlines()) <= 160
    assert re.findall(r"^## (.*)$", FRONT, flags=re.MULTILINE) == SECTIONS
    status = FRONT.split("## ")[0]
    assert "Nothing has been measured on a CUDA device yet" in " ".join(status.split())
    assert not (RECORDS / "gpu.jsonl").exists(), "then the status line is no longer true"


def test_no_room_s_page_is_too_long_and_no_row_too_wide() -> None:
    for name, text in READMES.items():
        assert len(text.splitlines()) <= 200, name
        assert [line for line in text.splitlines() if line.startswith("|") and len(line) > 160] == [], name


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    for name, text in READMES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
            assert path.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{name}: {target}"


def test_every_file_that_is_named_exists() -> None:
    for name, text in READMES.items():
        for span in inline_code(text):
            for path in re.findall(r"(?<![\w/.])(?:hf_lowmem|tests|scripts|integrations|model_cards)/[\w./-]*", span):
                assert (ROOT / path).exists() or "NAME" in path, f"{name}: {path}"


def test_the_tables_that_contributing_names_are_there() -> None:
    rows = re.findall(
        r"^\| a .*\| `(\w+)` in `([\w./]+)` \| `([\w./]+)` \|$", READMES[".github/CONTRIBUTING.md"], re.MULTILINE
    )
    assert [table for table, _, _ in rows] == ["OPTIMIZERS", "CODECS", "PREFERENCE_LOSSES", "RULES", "KERNELS"]
    for table, file, suite in rows:
        (found,) = [path for path in ROOT.glob("hf_lowmem/**/*.py") if str(path).endswith(f"/{file}")]
        assert re.search(rf"^{table}\b.*=", found.read_text(), re.MULTILINE), file
        assert table in (ROOT / suite).read_text(), suite
    assert "OPTIMIZERS" in (ROOT / "tests/contracts/test_optimizers.py").read_text()


def test_every_method_codec_tier_kernel_and_field_is_named() -> None:
    fields = [f.name for f in dataclasses.fields(hf_lowmem.LowMemDPOConfig)]
    ours = [f.name for f in dataclasses.fields(hf_lowmem.LowMemArguments)]
    ours += [name for name in fields if name.startswith("lowmem_")]
    for room, names in {
        "training": {*ours, *OPTIMIZERS, "loss_type", "beta"},
        "optim": {*OPTIMIZERS, *CODECS, *PAIRS},
        "optim/zeroth": ZEROTH,
        "activations": TIERS,
        "kernels": {kernel.triton.split(".")[2] for kernel in KERNELS.values()},
        "preference": ("asft", "orpo", "simpo", "cpo"),
    }.items():
        text = READMES[f"hf_lowmem/{room}/README.md"]
        for name in names:
            assert f"`{name}`" in text or f"`{name}," in text, (room, name)


def test_the_table_of_states_is_what_was_predicted() -> None:
    rows = {row["setting"]: row for row in records("states.jsonl")}
    shown = re.findall(
        r"^\| `([a-z0-9_]+-[a-z0-9_-]+)` \| (\d\.\d\d) \|", READMES["hf_lowmem/optim/README.md"], re.MULTILINE
    )
    assert {name for name, _ in shown} >= {"torch-adamw", "adamw-int8", "adamw-fp8_expand", "apollo_mini-int8"}
    for name, figure in shown:
        row = rows[name]
        assert figure == f"{row['bytes_per_parameter']:.2f}"
        if row["bytes_per_parameter_foretold"] is not None:
            assert row["bytes_per_parameter"] == pytest.approx(row["bytes_per_parameter_foretold"], rel=1e-9)


def test_the_promised_bytes_are_kept() -> None:
    rows = {row["setting"]: row for row in records("states.jsonl")}
    for setting, most in {
        "adamw-fp32": 8.0,
        "adamw-int8": 2.05,
        "adamw-fp8_expand": 2.15,
        "apollo_mini-int8": 0.6,
    }.items():
        assert rows[setting]["bytes_per_parameter"] <= most


def test_the_recommended_pair_errs_less_than_range_expansion_for_both() -> None:
    rows = [row for row in records("codecs.jsonl") if row["kind"] == "pair"]
    both, ours = (
        [r["relative_rms_error"] for r in rows if (r["m"], r["v"]) == pair]
        for pair in (("fp8_expand", "fp8_expand"), PAIRS["8bit"])
    )
    assert all(a < b for a, b in zip(ours, both, strict=True))


def test_a_new_basis_by_subspace_is_ten_times_faster_than_by_svd() -> None:
    refresh = {row["setting"]: row for row in records("optimizers_speed.jsonl") if row["measured"] == "refresh"}
    assert refresh["galore svd"]["refresh_seconds"] >= 10 * refresh["galore subspace"]["refresh_seconds"]


def test_every_budget_s_answer_fits_when_planned_again() -> None:
    for name, models in (("budget.jsonl", {"8b", None}), ("budget_1b.jsonl", {"1b"})):
        rows = records(name)
        assert {row.get("model") for row in rows} <= models
        assert {row["budget"] for row in rows} == {"16GiB", "24GiB", "48GiB", "80GiB"}
        assert all(row["fits"] for row in rows if row["chosen"] is not None)


def test_the_five_rows_of_the_front_page_fit_their_cards() -> None:
    table = FRONT.split("<!-- table: which -->")[1].split("<!-- end -->")[0]
    rows = [cells(line) for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [(row[0], row[1]) for row in rows] == [
        ("16 GiB", "8B"),
        ("24 GiB", "1B"),
        ("24 GiB", "8B"),
        ("48 GiB", "8B"),
        ("80 GiB", "8B"),
    ]
    for row in rows:
        assert float(row[-1].removesuffix(" GiB")) <= float(row[0].removesuffix(" GiB"))
        assert all(cell in OPTIMIZERS for cell in [row[3].strip("`")] if cell != "HuggingFace's")


def test_what_the_records_promise(made: Any, optim_tables: Any) -> None:
    """Codecs within 0.5 % of fp32 state, `subspace` within 0.3 % of `svd`, bf16 stores within 0.3 % of fp32 masters."""
    scored = made.scores()
    for comparison in optim_tables.report.comparisons():
        for setting, reference in comparison.rows:
            if setting.weights == "keep" or setting.name == reference.name:
                continue
            assert made.difference(scored, setting, reference)[0] <= comparison.limit, setting.name
    losses = [row for row in records("activations.jsonl") if row["part"] == "loss"]
    for tier in TIERS:
        ours, theirs = ([r["heldout_loss"] for r in losses if r["way"] == way] for way in (tier, "HuggingFace"))
        assert len(ours) == len(theirs) == 3
        assert sum(ours) <= 1.003 * sum(theirs), tier


@pytest.fixture
def empty(optim_tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records in which nothing is, and which the tables are made from."""
    monkeypatch.setattr(optim_tables, "RECORDS", tmp_path)
    return tmp_path


def test_long_runs_that_are_not_recorded_say_so(optim_tables: Any, empty: Path) -> None:
    assert optim_tables.long_run() == optim_tables.long_steps() == ["Not measured yet."]
    (line,) = optim_tables.long_line()
    assert line.count("not measured yet") == 2


def test_a_record_of_a_long_run_is_shown(optim_tables: Any, empty: Path) -> None:
    """Of all kinds of gradients the one that is farthest from fp32; settings that lack a beta have an empty cell."""

    def row(setting: str, beta2: float, kind: str, update: list[float], end: float) -> dict[str, Any]:
        return {
            "setting": setting, "beta2": beta2, "gradients": kind, "steps": 20000, "window": 10000,
            "update": update, "second_moment": [1.0, end],
        }  # fmt: skip

    rows = [
        row("8bit", 0.999, "stationary", [0.999, 1.001], 1.0),
        row("8bit", 0.999, "falling", [1.0, 0.996], 1.002),
        row("8bit", 0.95, "stationary", [1.0, 1.0], 1.0),
        row("torchao AdamW8bit", 0.999, "stationary", [0.9, 0.5], 4.0),
    ]
    (empty / "long_run.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    head, _, *table = optim_tables.long_run()
    assert head.startswith("20,000 steps.")
    assert [cells(line) for line in table] == [
        ["states", "beta2 0.999", "beta2 0.95"],
        ["---", "---", "---"],
        ["`8bit`", "0.996 / 1.002", "1.000 / 1.000"],
        ["torchao AdamW8bit", "0.500 / 4.000", ""],
    ]
    assert "stays within 0.4 % of fp32 states' for 20,000 steps" in optim_tables.long_line()[0]


def test_records_of_many_steps_are_shown(optim_tables: Any, empty: Path) -> None:
    """Seed by seed beside fp32 states; a seed without its reference does not count, a run without a loss diverged."""
    schedule, size = optim_tables.schedule, optim_tables.LONG

    def add(seed: int, loss: float | None, **setting: Any) -> None:
        made = optim_tables.Setting("adamw", **setting)
        config = schedule.Task(made, 3e-3, seed).config(size)
        schedule.Record(empty / "optimizers.jsonl").add(
            config | {"setting": made.name, "heldout_loss": loss, "train_loss": loss}
        )

    add(0, 5.0)
    add(0, 5.05, state="8bit")
    add(1, 5.05, state="8bit")
    assert optim_tables.long_steps()[-1] == "| `8bit` | +1.00 (1 seed) | +1.00 (1 seed) |"
    add(1, 5.0)
    add(1, 5.1, control=True)
    head, _, *table = optim_tables.long_steps()
    assert head == "5,000 steps, against fp32 states."
    assert table[2:] == [
        "| `8bit` | +1.00 ± 0.00 (2 seeds) | +1.00 ± 0.00 (2 seeds) |",
        "| control | +2.00 (1 seed) | +2.00 (1 seed) |",
    ]
    assert "against fp32 states: +1.00 ± 0.00 % (2 seeds)" in optim_tables.long_line()[0]
    add(2, 5.0)
    add(2, None, state="8bit")
    assert optim_tables.long_steps()[-2] == "| `8bit` | diverged | diverged |"
    assert "fp32 states: diverged" in optim_tables.long_line()[0]
