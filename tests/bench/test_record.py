"""Records are read and written in one place, and each row says where it comes from."""

from pathlib import Path

import pytest

from parts.record import PACKAGES, append_row, of_part, provenance, read_rows, write_rows


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.jsonl"
    assert read_rows(path) == []
    rows = [{"part": "a", "loss": 0.1 + 0.2, "way": "×"}, {"part": "b", "loss": None}]
    write_rows(path, rows)
    append_row(path, {"part": "a", "loss": 1e-300})
    assert read_rows(path) == [*rows, {"part": "a", "loss": 1e-300}]
    assert of_part(read_rows(path), "a") == [rows[0], {"part": "a", "loss": 1e-300}]
    write_rows(path, rows[:1])
    assert read_rows(path) == rows[:1]


def test_a_number_that_is_not_finite_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    append_row(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(path, {"loss": float("nan")})
    assert read_rows(path) == [{"loss": 1.0}]


def test_a_row_says_where_it_comes_from() -> None:
    found = provenance()
    assert list(found) == ["device", "versions", "commit"]
    assert set(PACKAGES) < set(found["versions"])
    assert found["device"]
    assert set(provenance(("torch",))["versions"]) - {"cuda"} == {"python", "hf-lowmem", "torch"}
