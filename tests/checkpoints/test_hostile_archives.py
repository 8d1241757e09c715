"""Hostile archives, shards, links and tags: each is refused by name, with a remedy, and none of them runs."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_lowmem.checkpoints import verify, write_manifest
from tests.checkpoints.hostile import (
    BYTES,
    DCP,
    DEEPSPEED,
    METADATA,
    OPTIMIZER,
    P0,
    P4,
    PLAIN,
    SHARD,
    archive,
    built,
    new,
    payload_of,
    pickled,
    refused,
    sixteen,
    stacked,
    table,
    text,
)


def two_ends(evil: bytes) -> bytes:
    """A harmless archive whose zip64 record leads to another directory, as torch's reader would take it."""
    harmless, other = archive(pickled(b"}")), archive(evil)
    place, size = struct.unpack("<LL", other[-10:-2])
    count, where = struct.unpack("<H", other[-12:-10])[0], len(harmless) - 22
    far = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, place)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, where + len(far) - 1, 1)
    return harmless[:-22] + far + locator + harmless[-22:]


def swapped(data: bytes) -> bytes:
    """The directory calls a member otherwise than the header before it."""
    place = data.rindex(b"archive/data.pkl")
    return data[:place] + b"archive/data/000" + data[place + 16 :]


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a pickle with an archive behind it": (lambda run: pickled(run) + archive(PLAIN), "zip format"),
    "the format of before 1.6": (lambda run: sixteen(run), "zip format"),
    "a tar": (lambda run: b"pickle\0" + bytes(600), "zip format"),
    "an empty file": (lambda run: b"", "cut off"),
    "an archive in the archive": (lambda run: archive(PLAIN, [("inner.zip", archive(pickled(run)))]), "inner.zip"),
    "a nested data.pkl": (lambda run: archive(PLAIN, [("inner/data.pkl", pickled(run))]), "inner/data.pkl"),
    "a member outside": (lambda run: archive(PLAIN, [("../../data.pkl", pickled(run))]), "data.pkl"),
    "a member twice": (lambda run: archive(PLAIN, [("data.pkl", pickled(run))]), "has it twice"),
    "a member in capitals": (lambda run: archive(PLAIN, [("DATA.PKL", pickled(run))]), "DATA.PKL"),
    "TorchScript": (
        lambda run: archive(PLAIN, [("constants.pkl", pickled(run)), ("code/__torch__.py", b"")]),
        "constants.pkl",
    ),
    "compressed": (lambda run: archive(PLAIN, [("data/0", bytes(10**6))], packed=True), "compressed"),
    "no data.pkl": (lambda run: archive(PLAIN).replace(b"data.pkl", b"data/123"), "directory"),
    "a prefix": (lambda run: b"PK\x03\x04" + archive(PLAIN), "directory"),
    "a comment": (lambda run: archive(PLAIN)[:-2] + b"\x02\x00xx", "end"),
    "cut off": (lambda run: archive(PLAIN)[:-9], "cut off"),
    "another name in the directory": (lambda run: swapped(archive(PLAIN)), "not where its directory says"),
    "two ends": (two_ends, "end"),
}


@pytest.mark.parametrize("file", [OPTIMIZER, DEEPSPEED, "pytorch_model.bin"])
@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case: str, file: str, folder: Path, canary: Path) -> None:
    make, says = ARCHIVES[case]
    (folder / file).write_bytes(make(payload_of(canary)))
    refused(folder, file, says, canary)


def described(path: bytes, length: int, **more: bytes) -> bytes:
    """A description of one value of plain bytes."""
    place = new(stacked(f"{DCP}.filesystem", "_StorageInfo"))
    place += table(relative_path=path, offset=b"K\x00", length=b"J" + struct.pack("<i", length), **more) + b"b"
    index = built(table(fqn=text("lr"), index=b"N"))
    value = table(state_dict_metadata=b"}" + text("lr") + new(BYTES) + b"s", storage_data=b"}" + index + place + b"s")
    return pickled(new(stacked(f"{DCP}.metadata", "Metadata")) + value + b"b", P4)


def test_values_beside_shards(folder: Path, canary: Path) -> None:
    """torch unpickles those that are no tensors without any list."""
    for made in (
        archive(pickled(payload_of(canary))),
        sixteen(payload_of(canary)),
        pickled(payload_of(canary)) + archive(PLAIN),
    ):
        (folder / SHARD).write_bytes(made)
        (folder / METADATA).write_bytes(described(text("__0_0.distcp"), len(made)))
        refused(folder, SHARD, r"at 'lr' \((it names builtins\.exec|it is not in torch's zip format)", canary)
    (folder / METADATA).write_bytes(described(text("__0_0.distcp"), len(made) + 1))
    refused(folder, SHARD, "cut off", canary)


@pytest.mark.parametrize("path", ["../optimizer.pt", "/etc/passwd", "..", ".metadata", "sub/x.distcp", "gone.distcp"])
def test_shards_elsewhere(path: str, folder: Path, canary: Path) -> None:
    (folder / METADATA).write_bytes(described(text(path), 4))
    refused(folder, METADATA, "no such file beside it", canary)


def test_shards_that_an_extension_has_changed(folder: Path, canary: Path) -> None:
    changed = described(text("__0_0.distcp"), 4, transform_descriptors=b"]" + text("stream.zstd") + b"a")
    (folder / METADATA).write_bytes(changed)
    refused(folder, METADATA, "extension", canary)


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp", "global_step4/../..", "", "global_step9", "x" * 5000])
def test_deepspeeds_tag(tag: str, folder: Path, canary: Path) -> None:
    (folder / "latest").write_text(tag)
    refused(folder, "latest", "DeepSpeed would load from there", canary)


@pytest.mark.parametrize("link", ["optimizer.pt", "shards", "global_step4", "model.safetensors", "notes.txt"])
def test_links_out_of_the_folder(link: str, folder: Path, canary: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(archive(pickled(payload_of(canary))))
    path = folder / link
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside if "." not in link else outside / "file")
    refused(folder, link, "is a link out of the checkpoint", canary)


def test_a_link_to_itself_and_one_that_leads_nowhere(folder: Path, canary: Path) -> None:
    (folder / "scaler.pt").unlink()
    for target in ("scaler.pt", "/nowhere/at/all"):
        (folder / "scaler.pt").symlink_to(target)
        refused(folder, "scaler.pt", "is a link out of the checkpoint", canary)
        (folder / "scaler.pt").unlink()


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    os.rename(folder / OPTIMIZER, folder / "kept.pt")
    (folder / OPTIMIZER).symlink_to("kept.pt")
    write_manifest(folder)
    verify(folder)


def test_what_no_trainer_reads_is_not_looked_at_and_does_not_run(folder: Path, canary: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickled(payload_of(canary), P0))
    write_manifest(folder)
    verify(folder)
    assert not canary.exists()
