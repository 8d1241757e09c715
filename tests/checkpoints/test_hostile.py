"""Hostile descriptions of shards, and names in each file: refused by name, with a remedy, and none of them runs."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_lowmem.checkpoints import BadCheckpoint, verify
from tests.checkpoints.hostile import (
    BYTES,
    DCP,
    DEEPSPEED,
    FORMAT,
    INDEX,
    METADATA,
    OPTIMIZER,
    P4,
    RANDOM,
    archive,
    built,
    call,
    many,
    name,
    new,
    payload_of,
    pickled,
    refused,
    stacked,
    table,
    text,
)

INDEXED = table(fqn=text("w"))
# Of the description of shards: (pickle after the protocol, what the refusal says).
SHARDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "dotted, stacked": (lambda _: call(stacked(f"{DCP}.filesystem", "os.mkdir"), text("x")), r"filesystem\.os\.mkdir"),
    "dotted, global": (lambda _: call(name(f"{DCP}.filesystem", "os.mkdir"), text("x")), r"filesystem\.os\.mkdir"),
    "dotted member": (lambda _: stacked(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING.__class__"), "__class__"),
    "a module of a listed module": (lambda _: stacked(f"{DCP}.filesystem", "os"), r"filesystem\.os"),
    "a name of another line": (lambda _: name(f"{DCP}.metadata Metadata", "x"), "it names"),
    "exec": (lambda run: run, r"builtins\.exec"),
    "exec that is dropped": (lambda run: run + b"0N", r"builtins\.exec"),
    "exec that is only named": (lambda _: name("builtins", "exec"), r"builtins\.exec"),
    "INST": (lambda _: b"(" + text("true") + b"ios\nsystem\n", "INST"),
    "OBJ": (lambda _: b"(" + FORMAT + b"K\x00o", "OBJ"),
    "a computed module": (
        lambda _: call(stacked("pathlib", "PosixPath"), text("os")) + text("mkdir") + b"\x93",
        "computes",
    ),
    "a name of bytes": (lambda _: text("os") + b"C\x06system" + b"\x93", "computes"),
    "a name of a list": (lambda _: text("os") + b"]" + text("system") + b"a\x93", "computes"),
    "a name of Python 2": (lambda _: text("os") + b"U\x06system" + b"\x93", "SHORT_BINSTRING"),
    "EXT1": (lambda _: b"\x82\x01", "EXT1"),
    "EXT2": (lambda _: b"\x83\x01\x00", "EXT2"),
    "EXT4": (lambda _: b"\x84\x01\x00\x00\x00", "EXT4"),
    "a listed class is called": (lambda _: call(stacked(f"{DCP}.metadata", "Metadata"), b"}"), "it calls .*Metadata"),
    "a path of an object": (
        lambda _: call(stacked("pathlib", "PosixPath"), new(BYTES)),
        r"it calls pathlib\.PosixPath",
    ),
    "an enum of an object": (lambda _: call(FORMAT, new(BYTES)), "it calls .*_MEM_FORMAT"),
    "an object is called": (lambda _: new(BYTES) + many() + b"R", "it calls an object"),
    "called with a list": (lambda _: FORMAT + b"]" + b"R", "it calls"),
    "chained getattr": (
        lambda _: call(name("builtins", "getattr"), call(name("builtins", "getattr"), FORMAT, text("mro")), text("x")),
        "mro",
    ),
    "getattr of a class": (
        lambda _: call(name("builtins", "getattr"), stacked(f"{DCP}.metadata", "Metadata"), text("__init__")),
        "__init__",
    ),
    "getattr of an object": (lambda _: call(name("builtins", "getattr"), new(BYTES), text("x")), "computed"),
    "getattr of a computed name": (
        lambda _: call(name("builtins", "getattr"), FORMAT, call(stacked("pathlib", "PosixPath"), text("a"))),
        "computed",
    ),
    "__setstate__ in a state": (
        lambda _: built(table(fqn=text("w"), __setstate__=FORMAT)),
        "a state that it never has",
    ),
    "__class__ in a state": (lambda _: built(table(__class__=FORMAT)), "a state that it never has"),
    "a state of slots": (lambda _: built(many(b"N", table(__class__=FORMAT))), "a state that it never has"),
    "a state set twice": (lambda _: built(INDEXED) + INDEXED + b"b", "twice"),
    "a class's state": (lambda _: FORMAT + table(x=b"N") + b"b", "it sets the state of"),
    "a path's state": (
        lambda _: call(stacked("pathlib", "PosixPath"), text("a")) + table(_str=b"N") + b"b",
        "sets the state",
    ),
    "a state that changes later": (
        lambda _: new(INDEX) + INDEXED + b"\x94bh\x00" + text("index") + b"N" + b"s",
        "after it was",
    ),
    "an instance of arguments": (lambda _: new(INDEX, text("w")), "makes an instance"),
    "an instance of an enum": (lambda _: new(FORMAT), "makes an instance"),
    "NEWOBJ_EX": (lambda _: INDEX + many() + b"}" + b"\x92", "NEWOBJ_EX"),
    "copyreg._reconstructor": (
        lambda _: call(name("copyreg", "_reconstructor"), INDEX, name("builtins", "object"), b"N"),
        r"copyreg\._reconstructor",
    ),
    "copyreg.__newobj__": (lambda _: call(name("copyreg", "__newobj__"), INDEX), r"copyreg\.__newobj__"),
    "a memo filled twice": (lambda _: FORMAT + b"q\x00" + b"0Nq\x00" + b"0h\x00", "out of order"),
    "a memo filled far away": (lambda _: FORMAT + b"r\xf0\xff\xff\xff", "out of order"),
    "a memo that is empty": (lambda _: b"h\x07", "no entry 7"),
    "DUP": (lambda _: FORMAT + b"2", "DUP"),
    "PERSID": (lambda _: b"Pos.system\n", "PERSID"),
    "BINPERSID": (lambda _: many(text("storage"), FORMAT, text("0"), text("cpu"), b"K\x01") + b"Q", "no storage"),
    "items of an object": (lambda _: new(BYTES) + text("a") + b"N" + b"s", "sets items of"),
    "an object is appended to": (lambda _: new(BYTES) + b"N" + b"a", "appends to"),
    "an object as a key": (lambda _: b"}" + new(BYTES) + b"N" + b"s", "as a key"),
    "nested ten thousand deep": (lambda _: b")" + b"\x85" * 10_000, "deep"),
    "lists nested deep": (lambda _: b"]" * 10_000 + b"a" * 9_999, "deep"),
    "a length beyond the file": (lambda _: b"\x8d" + b"\xff" * 7 + b"\x7f", "cut off"),
    "bytes beyond the file": (lambda _: b"B\xff\xff\xff\x7fabc", "cut off"),
    "another protocol half-way": (lambda _: b"\x80\x02N", "protocol 2"),
    "no protocol there is": (lambda _: b"\x80\x63N", "protocol 99"),
    "a second pickle behind it": (lambda run: b"N." + P4 + run, "left over"),
    "two values": (lambda _: b"NN", "left over"),
    "a buffer from outside": (lambda _: b"\x97", "NEXT_BUFFER"),
    "no description": (lambda _: b"N", "something else than"),
}


def test_the_payload_runs_where_it_is_unpickled(canary: Path) -> None:
    pickle.loads(pickled(payload_of(canary)))
    assert canary.exists()


@pytest.mark.parametrize("case", SHARDS)
def test_descriptions_of_shards(case: str, folder: Path, canary: Path) -> None:
    make, says = SHARDS[case]
    (folder / METADATA).write_bytes(pickled(make(payload_of(canary)), P4))
    refused(folder, METADATA, says, canary)


@pytest.mark.parametrize("protocol", range(6))
def test_each_protocol(protocol: int, folder: Path, canary: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(canary)!r}, 'w')",)

    for file, data in (
        (METADATA, pickle.dumps(Evil(), protocol)),
        (OPTIMIZER, archive(pickle.dumps(Evil(), protocol))),
    ):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(data)
        refused(folder, file, r"builtin(s|__)\.exec", canary)
        (folder / file).write_bytes(before)


def test_a_local_description_of_shards(folder: Path, canary: Path) -> None:
    (folder / "shards" / "__3.metadata").write_bytes(pickled(payload_of(canary)))
    refused(folder, "shards/__3.metadata", "exec", canary)


@pytest.mark.parametrize("cut", [1, 40, 400, 900])
def test_a_description_that_is_cut_off(cut: int, folder: Path, canary: Path) -> None:
    data = (folder / METADATA).read_bytes()
    (folder / METADATA).write_bytes(data[:-cut])
    refused(folder, METADATA, "cut off|left over", canary)


NAMED = (
    "os system", "posix system", "subprocess Popen", "builtins eval", "builtins __import__", "builtins getattr",
    "operator attrgetter", "functools partial", "types FunctionType", "importlib import_module", "torch load",
    "torch.hub load", "torch.serialization load", "torch._utils _import_dotted_name", "numpy load", "codecs encode",
    "copyreg add_extension", "torch os.system", "torcstorage UntypedStorage.from_file", "_codecs decode",
    "collections OrderedDict.fromkeys", "transformers Trainer", "torch.jit load", "pickle loads",
    "numpy._core.multiarray _reconstruct",
)  # fmt: skip


@pytest.mark.parametrize("file", [OPTIMIZER, "scheduler.pt", "scaler.pt", RANDOM, "pytorch_model.bin", DEEPSPEED])
def test_names_that_no_file_needs(file: str, folder: Path, canary: Path) -> None:
    """In each file that a resume unpickles."""
    (folder / file).write_bytes(archive(pickled(table(a=payload_of(canary)))))
    refused(folder, file, r"holds more than tensors.*builtins\.exec", canary)
    for listed in NAMED:
        if file == RANDOM and listed.startswith("numpy._core"):
            continue
        (folder / file).write_bytes(archive(pickled(table(a=name(*listed.split(" "))))))
        with pytest.raises(BadCheckpoint, match=rf"{Path(file).name} .*it (names|keeps) {listed.replace(' ', '.')}"):
            verify(folder)
    assert not canary.exists()


def test_the_lists_hold_no_name_that_unpickling_would_change() -> None:
    """Python and torch rename what old files name; a listed name must mean itself."""
    import _compat_pickle

    from hf_lowmem.checkpoints import known

    for kind in (known.TENSORS, known.RANDOM, known.SHARDS, known.DEEPSPEED, known.guarded()):
        for listed in kind.names():
            assert "." not in listed.name, listed
            if listed.module != "__builtin__":  # protocol 2's name of builtins
                assert listed not in _compat_pickle.NAME_MAPPING
                assert listed.module not in _compat_pickle.IMPORT_MAPPING
