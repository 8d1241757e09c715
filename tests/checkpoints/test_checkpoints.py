"""What a checkpoint must be to be loaded: whole, unchanged, and without objects that only code could rebuild."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.checkpoints import MANIFEST, BadCheckpoint, last_complete, set_aside, verify, write_manifest
from tests.conftest import tiny_llama
from tests.training.test_trainers import token_data

pytestmark = pytest.mark.train


def trainer(folder: Path, **settings: Any) -> LowMemTrainer:
    asked: dict[str, Any] = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 6, "save_steps": 2,
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "optim": "adamw", "lowmem_state": "8bit",
    } | settings  # fmt: skip
    return LowMemTrainer(tiny_llama(), args=LowMemTrainingArguments(str(folder), **asked), train_dataset=token_data(20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def carry_code(path: Path) -> None:
    torch.save({"state": Code()}, path)


def remove_manifest(path: Path) -> None:
    (path.parent / MANIFEST).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (flip, "not what was saved"),
    "cut": (cut, "bytes, and had"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_is_offered(name: str, damage: str, run: Path) -> None:
    do, message = DAMAGE[damage]
    do(run / "checkpoint-6" / name)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert str(run / "checkpoint-6" / name) in str(caught.value)
    assert f"The last complete checkpoint is {run / 'checkpoint-4'}." in str(caught.value)
    found, passed = last_complete(run)
    assert found == run / "checkpoint-4"
    assert len(passed) == 1
    assert name in passed[0]


@pytest.mark.parametrize("marked", [True, False], ids=["with a manifest", "without"])
def test_a_file_that_carries_code_is_refused_even_with_a_right_checksum(marked: bool, run: Path) -> None:
    folder = run / "checkpoint-6"
    carry_code(folder / "optimizer.pt")
    (folder / MANIFEST).unlink()
    if marked:
        write_manifest(folder)
    with pytest.raises(BadCheckpoint, match=r"optimizer\.pt holds more than tensors and plain values \(.*system"):
        verify(folder)


def test_a_foreign_file_is_refused(run: Path) -> None:
    folder = run / "checkpoint-6"
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"pytorch_model\.bin was added after the checkpoint was saved"):
        verify(folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "README.md").write_text("a card that somebody added")
    verify(folder)


def test_shards_that_carry_code_are_refused(run: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = run / "checkpoint-6"
    dcp.save({"a": torch.ones(3, dtype=torch.bfloat16), "step": 3}, checkpoint_id=folder / "shards", no_dist=True)
    write_manifest(folder)
    verify(folder)
    (folder / "shards" / ".metadata").write_bytes(pickle.dumps(Code()))
    write_manifest(folder)
    with pytest.raises(BadCheckpoint, match=r"\.metadata is not the description of shards.*system"):
        verify(folder)


class ByGetattr(pickle.Pickler):
    """Pickles the members of enums as some versions of Python do; `asked` stands in for what they ask for."""

    asked: tuple[Any, ...] | None = None

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, self.asked or (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def by_getattr(described: Any, *asked: Any) -> bytes:
    file = io.BytesIO()
    pickler = ByGetattr(file)
    pickler.asked = asked or None
    pickler.dump(described)
    return file.getvalue()


def test_members_of_enums_may_be_asked_for_by_getattr_and_nothing_else(run: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

    folder = run / "checkpoint-6"
    dcp.save({"a": torch.ones(3), "step": 3}, checkpoint_id=folder / "shards", no_dist=True)
    metadata = folder / "shards" / ".metadata"
    described = pickle.loads(metadata.read_bytes())
    metadata.write_bytes(by_getattr(described))
    assert b"getattr" in metadata.read_bytes()
    write_manifest(folder)
    verify(folder)
    for asked in ((StorageMeta, "__init__"), (_MEM_FORMAT_ENCODING, "mro"), (_MEM_FORMAT_ENCODING, "__class__")):
        metadata.write_bytes(by_getattr(described, *asked))
        write_manifest(folder)
        with pytest.raises(BadCheckpoint, match=rf"\.metadata is not the description of shards.*{asked[1]}"):
            verify(folder)


def test_a_save_that_was_not_finished_is_skipped_and_named(run: Path) -> None:
    remove_manifest(run / "checkpoint-6" / "x")
    found, passed = last_complete(run)
    assert found == run / "checkpoint-4"
    assert passed == [f"{run / 'checkpoint-6'} is incomplete: its save was not finished (it has no {MANIFEST})."]
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    verify(run / "checkpoint-6")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_without_any_manifest_each_file_is_held_to_its_own_format(name: str, run: Path) -> None:
    """As plain transformers leaves a run: whole files are taken, a cut one is named."""
    for path in run.glob(f"checkpoint-*/{MANIFEST}"):
        path.unlink()
    assert last_complete(run)[0] == run / "checkpoint-6"
    cut(run / "checkpoint-6" / name)
    with pytest.raises(BadCheckpoint, match=name):
        verify(run / "checkpoint-6")
    assert last_complete(run)[0] == run / "checkpoint-4"


def test_true_without_a_checkpoint_says_so_and_auto_starts_afresh(run: Path, tmp_path: Path) -> None:
    for path in run.glob("checkpoint-*"):
        cut(path / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"there is no complete checkpoint in .*\n- .*checkpoint-6.*\n- .*checkpoint-4"
    ):
        trainer(run).train(resume_from_checkpoint=True)
    fresh = trainer(tmp_path / "new", max_steps=1)
    fresh.train(resume_from_checkpoint="auto")
    assert fresh.state.global_step == 1


def test_a_complete_checkpoint_is_not_overwritten_in_place(run: Path) -> None:
    """A second save of step 6 that is killed half-way leaves the first one to resume from."""
    folder = run / "checkpoint-6"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    set_aside(folder)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    found, _ = last_complete(run)
    assert found == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_older_checkpoint_goes_only_when_the_new_one_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_lowmem import checkpoints

    seen: list[set[str]] = []
    write = checkpoints.write_manifest

    def watched(folder: Any, **facts: Any) -> None:
        seen.append({p.parent.name for p in tmp_path.glob(f"checkpoint-*/{MANIFEST}")})
        write(folder, **facts)

    monkeypatch.setattr(checkpoints, "write_manifest", watched)
    trainer(tmp_path, save_total_limit=1).train()
    assert seen == [set(), {"checkpoint-2"}, {"checkpoint-4"}]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    facts = json.loads((tmp_path / "checkpoint-6" / MANIFEST).read_text())
    assert facts["step"] == 6
    assert facts["processes"] == 1


def test_a_manifest_that_is_damaged_is_named(run: Path) -> None:
    (run / "checkpoint-6" / MANIFEST).write_text("{}")
    with pytest.raises(BadCheckpoint, match=f"{MANIFEST} is damaged"):
        verify(run / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match="checkpoint-8"):
        verify(run / "checkpoint-8")
