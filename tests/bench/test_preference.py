"""The benchmark of preference losses runs, every part of it, at toy size and without a download."""

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import preference
from parts.preference import collapse, cosmosqa, qa, sums
from parts.record import Rows, of_part, read_rows

pytestmark = pytest.mark.train

PARTS = ("memory", "time", "sharing", "collapse", "cosmosqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with every part, its report made."""
    folder = tmp_path_factory.mktemp("bench")
    flags = [flag for part in (*PARTS, "report") for flag in ("--part", part)]
    record = ["--record", str(folder / "preference.jsonl"), "--cache", str(folder / "cache")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert preference.main(["--smoke", *record, *flags]) == 0
    (folder / "report.txt").write_text(out.getvalue())
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    return read_rows(folder / "preference.jsonl")


@pytest.mark.slow
def test_every_part_is_recorded_and_reported(folder: Path, rows: Rows) -> None:
    assert {row["part"] for row in rows} == set(PARTS)
    assert all(row["commit"] and row["device"] and row["versions"] and row["command"] for row in rows)
    report = (folder / "report.txt").read_text()
    for heading in ("Peak of forward and backward", "Time of a step", "Prompts shared", "Addition", "CosmosQA"):
        assert heading in report
    assert {path.name for path in folder.glob("*.png")} == {
        f"preference_{part}.png" for part in ("memory", "collapse", "cosmosqa")
    }


@pytest.mark.slow
def test_no_logits_and_no_reference_are_weighed_with_ours(rows: Rows) -> None:
    weighed = {row["way"]: row for row in of_part(rows, "memory")}
    size, vocabulary = weighed["TRL ORPO"]["size"], weighed["TRL ORPO"]["vocabulary"]
    tokens = 2 * size["pairs"] * (size["prompt"] + size["answer"])
    logits = 2 * tokens * vocabulary  # bytes, bf16
    ours = weighed["hf_lowmem ORPO"]
    assert weighed["TRL ORPO"]["peak"] - ours["peak"] > 2 * logits
    assert ours["peak"] - ours["parts"]["weights"] < logits  # a head's fp32 gradient and one tile of 32,768 entries
    assert weighed["TRL DPO"]["peak"] - weighed["hf_lowmem DPO"]["peak"] == pytest.approx(
        weighed["TRL DPO"]["parts"]["reference"], rel=0.01
    )
    assert all(sum(row["parts"].values()) == row["peak"] for row in weighed.values())


@pytest.mark.slow
def test_shared_prompts_cost_the_tokens_that_they_should(rows: Rows) -> None:
    (row,) = of_part(rows, "sharing")
    prompt, answer = row["size"]["prompt"], row["size"]["answer"]
    assert prompt == 4 * answer
    assert row["tokens_ratio"] == (prompt + 2 * answer) / (2 * prompt + 2 * answer)


@pytest.mark.slow
def test_every_method_has_the_same_start_budget_and_rates(rows: Rows) -> None:
    collapse = of_part(rows, "collapse")
    runs = {(row["method"], row["rate"]) for row in collapse if row["method"] != "start"}
    methods, rates = {method for method, _ in runs}, {rate for _, rate in runs}
    assert {"SFT", "DPO", "DPO+SFT", "ASFT", "ORPO", "SimPO", "CPO"} <= methods
    assert len(runs) == len(methods) * len(rates)
    assert len({json.dumps(row["size"]) for row in collapse}) == 1
    questions = of_part(rows, "cosmosqa")
    for stage in ("tune", "score"):
        found = [row["method"] for row in questions if row["stage"] == stage and row["method"] != "start"]
        assert sorted(found) == sorted({"SFT", "DPO", "ASFT", "ORPO", "SimPO"})


@pytest.mark.slow
def test_only_missing_runs_are_made(folder: Path, rows: Rows) -> None:
    """A run that is missing in the record is made, with the same numbers; no other is."""
    for part, module in (("collapse", collapse), ("cosmosqa", cosmosqa)):
        old = of_part(rows, part)
        lost = old.pop()
        (made,) = module.rows(True, old, folder / "cache")
        again = {name for name in made if "seconds" not in name}
        assert {"method", "rate", "seed"} < again
        assert {n: made[n] for n in again} == {n: lost[n] for n in again}
        assert list(module.rows(True, [*old, made], folder / "cache")) == []


def test_sums_are_disjoint_and_marked_to_the_last_character() -> None:
    parts = sums.split([100, 50, 20], 0)
    assert [len(part) for part in parts] == [100, 50, 20]
    assert len({s for part in parts for s in part}) == 170
    assert sums.split([100, 50, 20], 0) == parts != sums.split([100, 50, 20], 1)
    with pytest.raises(ValueError, match="there are 8100 sums"):
        sums.split([8000, 200], 0)
    eos, nine, two, plus = 1, 12, 5, 13
    assert sums.VOCABULARY[nine] + sums.VOCABULARY[two] + sums.VOCABULARY[plus] == "92+"
    assert sums.decode(torch.tensor([[nine, two, eos, nine], [nine, two, nine, two], [0, 2, eos, eos]])) == [
        "92",
        "9292",
        "??",
    ]


def test_log_probabilities_of_sums_are_the_models() -> None:
    """Against a sum over the model's own distribution, one token after another."""
    model = sums.build_model(16, 1, 0)
    found, lengths = sums.completion_logps(model, ["17+25=", "50+60="], ["42", "110"])
    assert lengths.tolist() == [3, 4]
    for text, total in zip(("17+25=42", "50+60=110"), found, strict=True):
        ids = [*sums.encode([text])[0].tolist(), sums.EOS]
        expected = 0.0
        for i in range(6, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double()
            expected += logits.log_softmax(-1)[ids[i]].item()
        # fp32 logits of about 1 and a logsumexp over 15 of them: a few 1e-7 a token.
        assert total.item() == pytest.approx(expected, abs=5e-6)


def test_a_margin_counts_as_grown_only_beside_the_start() -> None:
    before = {"chosen": torch.tensor([-1.0, -1.0]), "rejected": torch.tensor([-2.0, -2.0])}
    lengths = {"chosen_len": torch.tensor([2, 2]), "rejected_len": torch.tensor([4, 1])}
    after = {"chosen": torch.tensor([-3.0, -0.5]), "rejected": torch.tensor([-5.0, -1.0])} | lengths
    found = collapse.compared(after, before | lengths)
    assert found["margin_accuracy"] == 0.5  # -3 + 1 > -5 + 2, but -0.5 + 1 < -1 + 2
    assert found["pair_accuracy"] == 0.5  # -1.5 < -1.25, -0.25 > -1
    assert found["chosen"] == -0.875
    assert found["rejected"] == -1.125


def test_questions_are_read_from_the_task_file(tmp_path: Path) -> None:

    def example(story: str, right: str, *wrong: str) -> dict[str, Any]:
        asked = f"Context: {story} \nQuestion: Why ? \nCorrect Answer: {right}"
        return {"input": asked, "target": list(wrong)}

    examples = [
        example("A b .", "Yes .", "No ."),
        example("A b .", "Of course .", "Never ."),  # the same story
        example("C d .", "Same .", "Same ."),
        example("E f g h i j k l .", "Yes .", "No ."),  # too long
        example("M .", "Yes yes yes yes yes yes yes yes .", "No ."),  # its answer is
    ]
    path = tmp_path / qa.FILE
    path.write_text(json.dumps({"examples": examples}))

    def words(texts: list[str]) -> dict[str, list[list[str]]]:
        return {"input_ids": [text.split() for text in texts]}

    assert qa.read(path, words, prompt_tokens=7, answer_tokens=4) == [
        qa.Question("A b .\nQuestion: Why ?\nAnswer:", " Yes .", " No .")
    ]
    assert qa.fetch(tmp_path) == path  # what is there is not downloaded


def test_without_a_network_the_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def offline(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 1, stdout="", stderr="WARNING: retrying\nERROR: no such index")

    monkeypatch.setattr(qa.subprocess, "run", offline)
    with pytest.raises(RuntimeError, match=r"bigbench==1\.0\.0 \(358 MB of PyPI\).*ERROR: no such index.*--cache"):
        qa.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_overlap_of_words() -> None:
    overlap, words = cosmosqa.overlap, cosmosqa.words
    assert words(" The man ; he 's ill .") == ["the", "man", "he", "s", "ill"]
    assert overlap("the man is ill", "The man was ill .") == 0.75
    assert overlap("", "ill") == overlap("well", "ill") == 0.0
