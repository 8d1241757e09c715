"""Names that the pickles of a checkpoint may hold: exact lists, one for each kind of file.

    TENSORS    torch.save of tensors and plain values, for a reader that would run anything: every argument is checked
    GUARDED    the same for files that torch.load(weights_only=True) reads; torch checks them once more, so this list is
               torch's own, and what the process has registered with torch.serialization.add_safe_globals
    RANDOM     rng_state.pth, which has numpy's generator in it
    SHARDS     `.metadata` of torch.distributed.checkpoint, which torch unpickles without any list
    DEEPSPEED  DeepSpeed's files of ZeRO-1 and ZeRO-2, which DeepSpeed unpickles without any list

A state of an object is checked as well: an attribute that is called `__setstate__` would be called.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_lowmem.checkpoints.opcodes import Known, Made, Name

_T, _U = "torch", "torch._utils"
ORDERED = Name("collections", "OrderedDict")
SIZE = Name(_T, "Size")
_ENCODE = Name("_codecs", "encode")
_DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip
DTYPES = frozenset(Name(_T, name) for name in _DTYPES)
_STORAGES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
}  # fmt: skip
STORAGES = {Name(_T, f"{name}Storage"): size for name, size in _STORAGES.items()}
STORAGES[Name("torch.storage", "UntypedStorage")] = 1
_REBUILT = {Name(_U, f"_rebuild_{name}") for name in ("tensor_v2", "tensor_v3", "parameter")}


def is_made(value: Any, *kinds: str | Name) -> bool:
    """Whether a value is a container or an object of one of some kinds."""
    return isinstance(value, Made) and value.kind in kinds


def is_int(value: Any) -> bool:
    """Whether a value is a whole number that is not negative, and no bool."""
    return type(value) is int and value >= 0


def numbers(value: Any) -> list[int] | None:
    """The numbers of a torch.Size or a tuple, None where it is neither or holds more than that."""
    inner = value.args[0] if is_made(value, SIZE) else value
    return list(inner.items) if is_made(inner, "tuple") and all(map(is_int, inner.items)) else None


def _no_hooks(value: Any) -> bool:
    return is_made(value, ORDERED) and not value.items and value.state is None


def _tensor(args: list[Any]) -> bool:
    """(storage, offset, size, stride, requires_grad, backward hooks[, dtype][, conj and neg])."""
    if not 6 <= len(args) <= 8 or not is_made(args[0], "storage") or not is_int(args[1]):
        return False
    rest = all(v in DTYPES if isinstance(v, Name) else is_made(v, "dict") for v in args[6:])
    shaped = numbers(args[2]) is not None and numbers(args[3]) is not None
    return shaped and isinstance(args[4], bool) and _no_hooks(args[5]) and rest


def _parameter(args: list[Any]) -> bool:
    return len(args) == 3 and is_made(args[0], *_REBUILT) and isinstance(args[1], bool) and _no_hooks(args[2])


def _strings(args: list[Any]) -> bool:
    return all(isinstance(value, str) for value in args)


def _device(args: list[Any]) -> bool:
    return bool(args) and isinstance(args[0], str) and all(map(is_int, args[1:]))


def _metadata_alone(state: Any) -> bool:
    """Whether a state is that of a state_dict: `_metadata`, the versions of its modules, and nothing else."""
    return is_made(state, "dict") and all(key == "_metadata" and is_made(v, "dict", ORDERED) for key, v in state.items)


def _anything(_: Any) -> bool:
    return True


def _nothing(args: list[Any]) -> bool:
    return not args


TENSORS = Known(
    values=DTYPES | set(STORAGES),
    calls={
        ORDERED: _nothing,
        SIZE: lambda args: len(args) == 1 and numbers(args[0]) is not None,
        Name(_T, "device"): _device,
        Name(_U, "_rebuild_tensor_v2"): _tensor,
        Name(_U, "_rebuild_tensor_v3"): _tensor,
        Name(_U, "_rebuild_parameter"): _parameter,
        _ENCODE: lambda args: len(args) == 2 and _strings(args) and args[1] == "latin1",
        **{Name(m, "set"): lambda args: len(args) == 1 and _plain_list(args[0]) for m in ("builtins", "__builtin__")},
    },
    states={ORDERED: _metadata_alone},
    filled=frozenset({ORDERED}),
    storages=STORAGES,
)


def _plain_list(value: Any) -> bool:
    return is_made(value, "list") and all(isinstance(v, str | int | float | bytes) for v in value.items)


_MORE_OF_TORCH = {
    Name("collections", "Counter"), Name("torch.serialization", "_get_layout"), Name(_T, "Tensor"),
    Name("torch.nn.parameter", "Parameter"), Name("torch._tensor", "_rebuild_from_type_v2"),
    *(Name(m, n) for m in ("builtins", "__builtin__") for n in ("bytearray", "complex")),
    *(
        Name(_U, f"_rebuild_{n}")
        for n in (
            "tensor", "parameter_with_state", "qtensor", "sparse_tensor", "meta_tensor_no_storage", "nested_tensor",
            "wrapper_subclass", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor",
        )
    ),
    *(Name(_T, f"per_{n}") for n in (
        "tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric", "channel_affine_float_qparams",
    )),
}  # fmt: skip


def guarded() -> Known:
    """Names that torch.load(weights_only=True) accepts now: its own list, and those registered in this process."""
    import torch

    registered: set[Name] = set()
    for entry in torch.serialization.get_safe_globals():
        path = entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        module, _, name = path.rpartition(".")
        registered.add(Name(module, name))
    free = _MORE_OF_TORCH | registered
    calls = {**dict.fromkeys(free, _anything), **TENSORS.calls}
    states = {**dict.fromkeys(registered, _anything), **TENSORS.states}
    return replace(
        TENSORS, values=TENSORS.values | set(calls), calls=calls, new=dict.fromkeys(free, _anything), states=states
    )


_ARRAY, _DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
_RECONSTRUCT = {Name(f"numpy.{m}.multiarray", "_reconstruct") for m in ("core", "_core")}


def _number_type(args: list[Any]) -> bool:
    """Whether the arguments of numpy's dtype name a type of numbers (bool, int, uint, float), never of objects."""
    return bool(args) and isinstance(args[0], str) and re.fullmatch(r"[biuf][1248]", args[0]) is not None


def _type_state(state: Any) -> bool:
    """(3, byte order, None, None, None, -1, -1, 0): no fields, no metadata."""
    if not is_made(state, "tuple") or len(state.items) != 8:
        return False
    order, nothing, rest = state.items[1], state.items[2:5], state.items[5:]
    return order in ("<", ">", "|", "=") and nothing == [None] * 3 and rest == [-1, -1, 0]


def _array_state(state: Any) -> bool:
    """(1, shape, type of numbers, Fortran's order, bytes)."""
    if not is_made(state, "tuple") or len(state.items) != 5:
        return False
    version, shape, kind, order, data = state.items
    raw = isinstance(data, bytes) or is_made(data, _ENCODE)
    return version == 1 and numbers(shape) is not None and is_made(kind, _DTYPE) and isinstance(order, bool) and raw


RANDOM = replace(
    TENSORS,
    values=TENSORS.values | {_ARRAY},
    calls={
        **TENSORS.calls,
        **{name: lambda args: len(args) == 3 and args[0] == _ARRAY for name in _RECONSTRUCT},
        _DTYPE: _number_type,
    },
    states={**TENSORS.states, _DTYPE: _type_state, **dict.fromkeys(_RECONSTRUCT, _array_state)},
)

_DCP = "torch.distributed.checkpoint"
METADATA = Name(f"{_DCP}.metadata", "Metadata")
INDEX = Name(f"{_DCP}.metadata", "MetadataIndex")
SLICE = Name(f"{_DCP}.filesystem", "_StorageInfo")
TENSOR_SHARDS = Name(f"{_DCP}.metadata", "TensorStorageMetadata")
BYTES_SHARDS = Name(f"{_DCP}.metadata", "BytesStorageMetadata")
_CHUNK = Name(f"{_DCP}.metadata", "ChunkStorageMetadata")
_PROPERTIES = Name(f"{_DCP}.metadata", "TensorProperties")
_SAVED = Name(f"{_DCP}.metadata", "StorageMeta")
_FORMAT = Name(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING")
_LAYOUT = Name("torch.serialization", "_get_layout")
_PATHS = {Name(m, n) for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath")}
_FIELDS: dict[Name, dict[str, Callable[[Any], bool]]] = {
    METADATA: {
        "state_dict_metadata": lambda v: is_made(v, "dict"),
        "planner_data": lambda v: v is None or is_made(v, "dict"),
        "storage_data": lambda v: is_made(v, "dict"),
        "storage_meta": lambda v: v is None or is_made(v, _SAVED),
        "version": lambda v: v is None or isinstance(v, str),
    },
    TENSOR_SHARDS: {
        "properties": lambda v: is_made(v, _PROPERTIES),
        "size": lambda v: numbers(v) is not None,
        "chunks": lambda v: is_made(v, "list"),
    },
    _CHUNK: dict.fromkeys(("offsets", "sizes"), lambda v: numbers(v) is not None),
    INDEX: {
        "fqn": lambda v: isinstance(v, str),
        "offset": lambda v: v is None or numbers(v) is not None,
        "index": lambda v: v is None or is_int(v),
    },
    SLICE: {
        "relative_path": lambda v: isinstance(v, str),
        "offset": is_int,
        "length": is_int,
        "transform_descriptors": lambda v: v is None or is_made(v, "list", "tuple"),
    },
    _SAVED: {
        "checkpoint_id": lambda v: v is None or isinstance(v, str) or is_made(v, *_PATHS),
        **dict.fromkeys(("save_id", "load_id"), lambda v: v is None or isinstance(v, str)),
        "modules": lambda v: is_made(v, "list") and _strings(v.items),
    },
}


def _fields_of(cls: Name) -> Callable[[Any], bool]:
    fields = _FIELDS[cls]
    return lambda state: is_made(state, "dict") and all(k in fields and fields[k](v) for k, v in state.items)


def _properties(state: Any) -> bool:
    """(dtype, layout, requires_grad, memory format, pinned)."""
    if not is_made(state, "tuple") or len(state.items) != 5:
        return False
    dtype, layout, grad, memory, pinned = state.items
    flags = isinstance(grad, bool) and isinstance(pinned, bool)
    return dtype in DTYPES and is_made(layout, _LAYOUT) and is_made(memory, _FORMAT) and flags


SHARDS = Known(
    values=DTYPES,
    calls={
        SIZE: TENSORS.calls[SIZE],
        _LAYOUT: lambda args: args in (["torch.strided"], ["torch.sparse_coo"], ["torch.sparse_csr"]),
        _FORMAT: lambda args: len(args) == 1 and args[0] in (0, 1, 2),
        **dict.fromkeys(_PATHS, _strings),
    },
    new=dict.fromkeys({*_FIELDS, BYTES_SHARDS, _PROPERTIES}, _nothing),
    states={**{cls: _fields_of(cls) for cls in _FIELDS}, _PROPERTIES: _properties},
    members={_FORMAT: {"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"}},
    keys=frozenset({INDEX}),
)

_SCALERS = {Name("deepspeed.runtime.fp16.loss_scaler", name) for name in ("LossScaler", "DynamicLossScaler")}
_STAGE = Name("deepspeed.runtime.zero.config", "ZeroStageEnum")
_FRAGMENT = Name("deepspeed.utils.tensor_fragment", "fragment_address")


def _attributes(state: Any) -> bool:
    """Plain values and dtypes under names that Python itself gives no meaning."""
    plain = (bool, int, float, str, type(None))
    return is_made(state, "dict") and all(
        isinstance(k, str) and not k.startswith("_") and (isinstance(v, plain) or v in DTYPES) for k, v in state.items
    )


DEEPSPEED = replace(
    TENSORS,
    calls={**TENSORS.calls, _STAGE: lambda args: len(args) == 1 and args[0] in (0, 1, 2, 3)},
    new=dict.fromkeys({*_SCALERS, _FRAGMENT}, _nothing),
    states={**TENSORS.states, **dict.fromkeys({*_SCALERS, _FRAGMENT}, _attributes)},
    members={_STAGE: {"disabled", "optimizer_states", "gradients", "weights"}},
)
