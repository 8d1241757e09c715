"""Pickles and archives, put together opcode by opcode: what no library writes and somebody might.

Each case of the corpus replaces one file of a sound checkpoint, of which the manifest is written anew: whoever makes
such a file can make the manifest that agrees with it. `canary` is a file that the payload would make.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from hf_lowmem.checkpoints import BadCheckpoint, last_complete, verify, write_manifest

P0, P2, P4 = b"", b"\x80\x02", b"\x80\x04"
DCP = "torch.distributed.checkpoint"
METADATA, OPTIMIZER, RANDOM = "shards/.metadata", "optimizer.pt", "rng_state.pth"
DEEPSPEED, SHARD = "global_step4/mp_rank_00_model_states.pt", "shards/__0_0.distcp"


def name(module: str, attribute: str) -> bytes:
    """GLOBAL, as protocols 0 to 3 have it."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def stacked(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL, as protocols 4 and 5 have it."""
    return text(module) + text(attribute) + b"\x93"


def many(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(called: bytes, *args: bytes) -> bytes:
    return called + many(*args) + b"R"


def new(cls: bytes, *args: bytes) -> bytes:
    return cls + many(*args) + b"\x81"


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def run(code: str) -> bytes:
    """What runs `code` wherever it is unpickled."""
    return call(name("builtins", "exec"), text(code))


def pickled(body: bytes, protocol: bytes = P2) -> bytes:
    return protocol + body + b"."


def archive(
    data: bytes, members: Iterable[tuple[str, bytes]] = (), *, folder: str = "archive", packed: bool = False
) -> bytes:
    """A zip as torch.save makes it, around a pickle; with more members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        for inner, content in [("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), *members]:
            made.writestr(f"{folder}/{inner}", content)
    return file.getvalue()


def storage(key: str = "0", count: bytes = b"K\x04", kind: str = "FloatStorage") -> bytes:
    """A tensor's storage, by its persistent id."""
    return many(text("storage"), name("torch", kind), text(key), text("cpu"), count) + b"Q"


def hooks(filled: bytes = b"") -> bytes:
    return call(name("collections", "OrderedDict")) + filled


def tensor(stored: bytes | None = None, hooked: bytes | None = None) -> bytes:
    one = many(b"K\x01")
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), stored or storage(), b"K\x00", one, one, b"\x89", hooked or hooks()
    )


FORMAT = stacked(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING")
INDEX = stacked(f"{DCP}.metadata", "MetadataIndex")
BYTES = stacked(f"{DCP}.metadata", "BytesStorageMetadata")
SCALER = name("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
ORDERED = name("collections", "OrderedDict")
PLAIN = pickled(b"}")


def sixteen(payload: bytes) -> bytes:
    """A pickle as torch's format of before 1.6 begins."""
    return pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickled(payload)


def built(state: bytes, cls: bytes = INDEX) -> bytes:
    return new(cls) + state + b"b"


def payload_of(canary: Path) -> bytes:
    return run(f"open({str(canary)!r}, 'w').close()")


def refused(folder: Path, file: str, says: str, canary: Path) -> None:
    write_manifest(folder)
    with pytest.raises(BadCheckpoint, match=says) as caught:
        verify(folder)
    said = str(caught.value)
    assert str(folder / file) in said, "the file is named"
    assert any(remedy in said for remedy in ("Take another", "take another", "cp -rL")), "there is a remedy"
    found, (why,) = last_complete(folder.parent)
    assert found is None
    assert why == said
    (folder / "lowmem_manifest.json").unlink()  # as plain transformers would have left it
    with pytest.raises(BadCheckpoint, match=Path(file).name.replace(".", r"\.")):
        verify(folder)
    assert not canary.exists(), "code of the file has run"
