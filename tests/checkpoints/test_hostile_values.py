"""Hostile values: listed names that are misused: each is refused by name, with a remedy, and none of them runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.hostile import (
    DEEPSPEED,
    OPTIMIZER,
    ORDERED,
    RANDOM,
    SCALER,
    archive,
    call,
    hooks,
    many,
    name,
    new,
    pickled,
    refused,
    storage,
    table,
    tensor,
    text,
)

ARRAY, RECONSTRUCT, TYPE = (
    name(*n) for n in (("numpy", "ndarray"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "dtype"))
)
WORDS = call(TYPE, text("u4"), b"\x89", b"\x88")
OBJECTS = call(TYPE, text("O8"), b"\x89", b"\x88")
EMPTY = call(RECONSTRUCT, ARRAY, many(b"K\x00"), b"C\x01b")
# (file, pickle, what the refusal says)
VALUES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "hooks of a tensor": (
        DEEPSPEED,
        lambda _: tensor(hooked=hooks(b"K\x00" + name("torch", "float32") + b"s")),
        "_rebuild_tensor_v2",
    ),
    "hooks that come later": (
        DEEPSPEED,
        lambda _: (
            hooks() + b"q\x00" + b"0" + tensor(hooked=b"h\x00") + b"0h\x00K\x00" + name("torch", "float32") + b"s"
        ),
        "changed after it was used",
    ),
    "a parameter of no tensor": (
        DEEPSPEED,
        lambda _: call(name("torch._utils", "_rebuild_parameter"), b"}", b"\x89", hooks()),
        "_rebuild_parameter",
    ),
    "a dict's own __setstate__": (
        DEEPSPEED,
        lambda _: call(ORDERED) + table(__setstate__=name("torch", "FloatStorage")) + b"b",
        "never has",
    ),
    "a dict's state in the optimizer": (OPTIMIZER, lambda _: call(ORDERED) + table(__class__=b"N") + b"b", "never has"),
    "a dict filled by its constructor": (DEEPSPEED, lambda _: call(ORDERED, b"]"), "OrderedDict with what"),
    "a storage beyond its record": (
        OPTIMIZER,
        lambda _: tensor(storage(count=b"J\xff\xff\xff\x7f")),
        "elements of the record data/0",
    ),
    "a storage of no record": (OPTIMIZER, lambda _: tensor(storage(key="7")), "elements of the record data/7"),
    "a storage by a path": (OPTIMIZER, lambda _: tensor(storage(key="../../etc/passwd")), "passwd"),
    "a storage of no type": (OPTIMIZER, lambda _: tensor(storage(kind="float32")), "no storage of a tensor"),
    "a module of before": (
        OPTIMIZER,
        lambda _: many(text("module"), ORDERED, text("f"), text("s")) + b"Q",
        "no storage of a tensor",
    ),
    "a function as a value": (DEEPSPEED, lambda _: table(a=name("torch._utils", "_rebuild_tensor_v2")), "as a value"),
    "a set of objects": (
        DEEPSPEED,
        lambda _: call(name("__builtin__", "set"), b"]" + call(ORDERED) + b"a"),
        "set with what",
    ),
    "bytes by another codec": (
        DEEPSPEED,
        lambda _: call(name("_codecs", "encode"), text("x"), text("rot13")),
        "encode with what",
    ),
    "an unknown attribute": (
        DEEPSPEED,
        lambda _: new(SCALER) + table(__setstate__=name("torch", "FloatStorage")) + b"b",
        "never has",
    ),
    "a scaler's dotted method": (
        DEEPSPEED,
        lambda _: name("deepspeed.runtime.fp16.loss_scaler", "LossScaler.backward"),
        "it names",
    ),
    "another of DeepSpeed's": (DEEPSPEED, lambda _: name("deepspeed.runtime.engine", "DeepSpeedEngine"), "it names"),
    "a stage's attribute": (
        DEEPSPEED,
        lambda _: call(
            name("__builtin__", "getattr"), name("deepspeed.runtime.zero.config", "ZeroStageEnum"), text("mro")
        ),
        "'mro'",
    ),
    "no stage there is": (
        DEEPSPEED,
        lambda _: call(name("deepspeed.runtime.zero.config", "ZeroStageEnum"), text("x")),
        "ZeroStageEnum with",
    ),
    "DeepSpeed's in the optimizer": (OPTIMIZER, lambda _: new(SCALER), "it names deepspeed"),
    "an array of objects": (
        RANDOM,
        lambda _: EMPTY + many(b"K\x01", many(b"K\x01"), OBJECTS, b"\x89", b"]Na") + b"b",
        "dtype with what",
    ),
    "an array's list": (
        RANDOM,
        lambda _: EMPTY + many(b"K\x01", many(b"K\x01"), WORDS, b"\x89", b"]Na") + b"b",
        "never has",
    ),
    "an array of another class": (
        RANDOM,
        lambda _: call(RECONSTRUCT, ORDERED, many(b"K\x00"), b"C\x01b"),
        "OrderedDict|_reconstruct",
    ),
    "fields of a type": (
        RANDOM,
        lambda _: (
            WORDS + many(b"K\x03", text("<"), b"N", many(text("f")), table(f=b"N"), b"K\x08", b"K\x01", b"K\x10") + b"b"
        ),
        "never has",
    ),
    "numpy's scalar": (RANDOM, lambda _: call(name("numpy._core.multiarray", "scalar"), WORDS, b"C\x01b"), "scalar"),
    "a type of fields": (RANDOM, lambda _: call(TYPE, b"]", b"\x89", b"\x88"), "dtype with what"),
}


@pytest.mark.parametrize("case", VALUES)
def test_listed_names_that_are_misused(case: str, folder: Path, canary: Path) -> None:
    file, make, says = VALUES[case]
    (folder / file).write_bytes(archive(pickled(make(b"")), [("data/0", bytes(16))]))
    refused(folder, file, says, canary)
