"""The files of a checkpoint that would be unpickled on resuming, checked without unpickling anything.

    *.pt, *.pth, *.bin            torch.save; Trainer, accelerate and PEFT load them with weights_only=True
    rng_state*.pth                the same with numpy's random state
    .metadata, __N.metadata       torch.distributed.checkpoint's description of its shards: pickle.load
    *.distcp                      its shards, each a torch.save: tensors with, all other values without weights_only
    global_step*/**.pt, latest    DeepSpeed's own, without weights_only; `latest` names the folder

`training_args.bin` is not looked at: no trainer reads it on resuming. Nor is anything else, such as a `.pkl` of the
user's. Between the check and the load a file can be exchanged by whoever may write to the folder.
"""

import os
import re
from pathlib import Path
from typing import Any

from hf_lowmem.checkpoints import known
from hf_lowmem.checkpoints.archives import Window, check_sums, records
from hf_lowmem.checkpoints.known import is_made
from hf_lowmem.checkpoints.opcodes import Known, Made, Refused, read

MANIFEST = "lowmem_manifest.json"
PICKLED = (".pt", ".pth", ".bin")
# What resuming reads, by suffix. Other files (a card, a tokenizer's text) may be added to a checkpoint by anybody.
LOADED = (*PICKLED, ".safetensors", ".distcp")
_NEVER_LOADED = ("training_args.bin",)
_SHARDS = re.compile(r"(__\d+)?\.metadata")
_RANDOM = re.compile(r"rng_state(_\d+)?\.pth")
_TAG = re.compile(r"global_step\d+")
_REMEDY = (
    "Take another checkpoint; or, if you trust whoever made this one, load the file yourself and save what it holds "
    "again as tensors and plain values."
)


class BadCheckpoint(ValueError):
    """A checkpoint that must not be loaded; the message names the file and the reason."""


def files_of(root: Path) -> list[Path]:
    """All files of a checkpoint but its manifest."""
    return sorted(
        path for path in root.rglob("*") if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".partial")
    )


def check_links(root: Path) -> None:
    """Refuse links that lead out of the checkpoint: what they lead to is not what was saved.

    Raises:
        BadCheckpoint: naming the link.
    """
    whole = root.resolve()
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and not _inside(path, whole):
            raise BadCheckpoint(
                f"{path} is a link out of the checkpoint, to {os.readlink(path)}: another file than the one that was "
                f"saved might be loaded. Make it a folder of its own: cp -rL {root} COPY."
            )


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself
        return False


def check_pickles(root: Path) -> None:
    """Refuse each file that holds more than tensors and plain values, or that cannot be read to the end.

    Raises:
        BadCheckpoint: naming the file, and what it holds.
    """
    _check_tag(root)
    plain: Known | None = None  # torch's own list, which needs torch
    for path in files_of(root):
        if _SHARDS.fullmatch(path.name):
            _check_shards(path)
        elif path.suffix in PICKLED and path.name not in _NEVER_LOADED:
            inside = path.relative_to(root)
            if _TAG.fullmatch(inside.parts[0]) and len(inside.parts) > 1:
                kind = known.DEEPSPEED
            elif _RANDOM.fullmatch(path.name):
                kind = known.RANDOM
            else:
                kind = plain = plain or known.guarded()
            try:
                with path.open("rb") as file:
                    check_archive(Window(file, 0, path.stat().st_size), kind)
            except Refused as error:
                raise BadCheckpoint(
                    f"{path} holds more than tensors and plain values ({error}); loading it could run code, and it was "
                    f"not made by a trainer of hf_lowmem. {_REMEDY}"
                ) from error


def check_archive(window: Window, kind: Known) -> None:
    """Raise Refused unless a part of a file is what torch.save makes of values of a kind."""
    found = records(window)
    place = found["data.pkl"]
    read(window.at(place.start, place.size), kind, {name: record.size for name, record in found.items()})


def check_whole(path: Path) -> None:
    """Raise Refused where an archive of torch is damaged, as its own checksums tell."""
    with path.open("rb") as file:
        window = Window(file, 0, path.stat().st_size)
        check_sums(window, records(window))


def _check_tag(root: Path) -> None:
    """DeepSpeed loads from the folder that `latest` names, wherever that is."""
    path = root / "latest"
    if not path.is_file():
        return
    with path.open("rb") as file:
        tag = file.read(256).decode("utf-8", "backslashreplace").strip()
    if _TAG.fullmatch(tag) is None or not (root / tag).is_dir():
        raise BadCheckpoint(
            f"{path} names the folder {tag!r}, and DeepSpeed would load from there. A checkpoint's own is "
            "global_stepN, inside of it. Write that one's name into the file, or take another checkpoint."
        )


def _check_shards(path: Path) -> None:
    try:
        slices = _slices(read(path.read_bytes(), known.SHARDS))
    except Refused as error:
        raise BadCheckpoint(
            f"{path} is not the description of shards that torch writes ({error}); loading it could run code. {_REMEDY}"
        ) from error
    for name, places in slices.items():
        shard = path.parent / name
        if "/" in name or "\\" in name or name.startswith(".") or not shard.is_file():
            raise BadCheckpoint(
                f"{path} says that shards are in {name!r}, and there is no such file beside it. Take another "
                "checkpoint."
            )
        size = shard.stat().st_size
        with shard.open("rb") as file:
            for fqn, start, length in places:
                try:
                    if start + length > size:
                        raise Refused("it is cut off")
                    check_archive(Window(file, start, length), known.TENSORS)
                except Refused as error:
                    raise BadCheckpoint(
                        f"{shard} holds more than tensors and plain values at {fqn!r} ({error}); loading it could run "
                        f"code. {_REMEDY}"
                    ) from error


def _slices(made: Any) -> dict[str, list[tuple[str, int, int]]]:
    """(name, first byte, bytes) of each value, by file. Raises Refused where a description is not sound all through."""
    fields = _state(made, known.METADATA)
    described, planned = fields.get("state_dict_metadata"), fields.get("planner_data")
    if not isinstance(described, Made) or not isinstance(stored := fields.get("storage_data"), Made):
        raise Refused("it describes nothing")
    for name, value in described.items:
        if not isinstance(name, str) or not is_made(value, known.TENSOR_SHARDS, known.BYTES_SHARDS):
            raise Refused("it describes something else than tensors and bytes")
    for name, value in planned.items if isinstance(planned, Made) else ():
        steps = value.items if is_made(value, "tuple") else [None]
        if not isinstance(name, str) or not all(isinstance(step, str | int) for step in steps):
            raise Refused("its plan holds more than paths")
    found: dict[str, list[tuple[str, int, int]]] = {}
    for index, place in stored.items:
        fqn, where = _state(index, known.INDEX)["fqn"], _state(place, known.SLICE)
        if (changed := where.get("transform_descriptors")) is not None and changed.items:
            raise Refused(f"{fqn!r} is compressed by an extension, and cannot be read without running it")
        found.setdefault(where["relative_path"], []).append((fqn, where["offset"], where["length"]))
    return found


def _state(made: Any, kind: known.Name) -> dict[str, Any]:
    needed = {known.METADATA: set(), known.INDEX: {"fqn"}, known.SLICE: {"relative_path", "offset", "length"}}[kind]
    if not is_made(made, kind) or not isinstance(made.state, Made) or not needed <= {k for k, _ in made.state.items}:
        raise Refused(f"it has {'an incomplete' if is_made(made, kind) else 'something else than a'} {kind}")
    return dict(made.state.items)
