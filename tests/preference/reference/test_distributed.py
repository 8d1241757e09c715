"""Two processes give the losses of one, whatever the reference is."""

import json
from typing import Any

import pytest

from tests.dist.imported import run_module
from tests.preference.reference.runs import data
from tests.preference.reference.worker import RUNS, main

pytestmark = [pytest.mark.dist, pytest.mark.train]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """What each process found, of a run of one, which is this process, and a run of two."""
    base = tmp_path_factory.mktemp("distributed")
    tokenizer.save_pretrained(base / "tokenizer")
    data(12).save_to_disk(base / "rows")
    for world in ("1", "2"):
        (base / world).mkdir()
    main(base / "1", 4)
    done = run_module("tests.dist.start", ["2", "tests.preference.reference.worker", str(base / "2"), "4"])
    files = {"1": ["found-0.json"], "2": ["found-0.json", "found-1.json"]}
    # gloo may complain when the processes end, after everything has passed: the files say what counts.
    assert all((base / "2" / name).exists() for name in files["2"]), done.stderr[-3000:]
    return {world: [json.loads((base / world / name).read_text()) for name in names] for world, names in files.items()}


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_give_the_losses_of_one(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    (one,), two = found["1"], found["2"]
    assert one[name]["world"] == 1
    assert len(one[name]["losses"]) == 6
    for rank in two:
        assert rank[name]["world"] == 2
        # The mean of two means instead of one, of values below 8, in each of six steps of AdamW at 1e-3.
        assert rank[name]["losses"] == pytest.approx(one[name]["losses"], abs=2e-4)
        assert rank[name]["eval"] == pytest.approx(one[name]["eval"], abs=2e-4)


def test_the_reference_s_way_does_not_matter(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in [*found["1"], *found["2"]]:
        for way in ("precomputed", "from files"):
            assert rank[way]["losses"] == pytest.approx(rank["full"]["losses"], abs=2e-5)


def test_every_rank_has_the_same_table(found: dict[str, list[dict[str, Any]]]) -> None:
    tables = [rank["iterable"]["keys"] for rank in [*found["1"], *found["2"]]]
    assert len(tables[0]) == 12
    assert tables[0] == tables[1] == tables[2]
