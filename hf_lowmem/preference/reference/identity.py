"""Identity of a reference: one hash of all that its log-probabilities depend on; equal hash, equal values.

A table that was computed before is read only under an equal hash. It covers the reference's weights, its config and
adapters, the collator (which cuts and pads), the fields that vary the numbers, the precision, and the versions of the
libraries that compute them. The examples themselves are keyed beside it: by TRL through the fingerprint of a prepared
dataset, which covers tokenizer and template; in our table by the collated tokens.

What cannot be hashed (weights that are partitioned, on the meta device, or of an unknown kind of tensor; a collator
that cannot be pickled) has no identity: it is computed anew, and never read.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["NotHashable", "digest_of", "first_digest_of", "identity_of"]

FROZEN = "ref"  # TRL's name for its frozen copy of an adapter that was trained before
# Fields of the config that vary a reference's numbers, beside the collator's.
FIELDS = (
    "ld_alpha",
    "max_length",
    "truncation_mode",
    "pad_to_multiple_of",
    "padding_free",
    "fp16",
    "bf16",
    "tf32",
    "use_liger_kernel",
    "torch_compile",
    "lowmem_share_prompt",
    "lowmem_pack_tokens",
    "lowmem_matmul",  # codes of a frozen base, which the reference is then
)
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "hf_lowmem")


class NotHashable(ValueError):
    """Something that decides the numbers cannot be read, so that a change of it would not be seen."""


def digest_of(model: nn.Module) -> str | None:
    """SHA-256 over names, dtypes, shapes and bytes of what a reference computes with; None where some cannot be read.

    Of a PEFT model these are the base and the adapter "ref", if there is one; not the adapters that are trained.
    """
    trained = set(getattr(model, "peft_config", ())) - {FROZEN} if is_peft_model(model) else set[str]()
    digest = hashlib.sha256()
    try:
        for name, value in _values(model):
            if trained.isdisjoint(name.split(".")):
                _feed(digest, name, value)
    except NotHashable:
        return None
    return digest.hexdigest()


def first_digest_of(model: nn.Module) -> str | None:
    """`digest_of` on process 0, on every process: the others may have zeros where transformers loads weights for it."""
    found = [digest_of(model)]
    broadcast_object_list(found, from_process=0)
    return found[0]


def _values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise NotHashable("weights are partitioned")
    state = model.state_dict()
    yield from sorted(state.items())
    yield from sorted((name, b) for name, b in model.named_buffers() if name not in state)


def _feed(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):  # a module's extra state
        if value is not None and not isinstance(value, bytes | str | int | float | bool):
            raise NotHashable(name)
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    if is_traceable_wrapper_subclass(value):
        if hasattr(value, "placements"):  # a DTensor: the other shards are elsewhere
            raise NotHashable(name)
        inner, context = value.__tensor_flatten__()
        digest.update(repr(context).encode())
        for part in inner:
            _feed(digest, part, getattr(value, part))
        return
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain and not type(value).__module__.startswith("bitsandbytes."):  # whose scales are in the state, too
        raise NotHashable(name)
    if value.is_meta or value.layout is not torch.strided:
        raise NotHashable(name)
    flat = value.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def identity_of(trainer: Any, digest: str | None, collator: Any) -> str | None:
    """The hash of all but the examples; None where something cannot be hashed.

    Args:
        trainer: a DPOTrainer whose models exist.
        digest: of the reference's weights, by `digest_of`.
        collator: the innermost one, which makes the tokens of a batch.
    """
    if digest is None:
        return None
    model, args = trainer.ref_model if trainer.ref_model is not None else trainer.model, trainer.args
    try:
        collated = Hasher.hash(collator)
    except Exception:  # whatever pickling a stranger's object may raise
        return None
    adapters = getattr(model, "peft_config", {}) if is_peft_model(model) else {}
    facts = {
        "weights": digest,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _config(model.config),
        "attention": getattr(model.config, "_attn_implementation", None),
        "adapters": {name: _plain(adapters[name].to_dict()) for name in sorted(adapters)},
        "collator": collated,
        "fields": {name: getattr(args, name, None) for name in FIELDS},
        "precision": [
            trainer.accelerator.mixed_precision,
            trainer.accelerator.device.type,
            torch.get_float32_matmul_precision(),
        ],
        "versions": {name: _version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(_plain(facts), sort_keys=True).encode()).hexdigest()


def _config(config: Any) -> dict[str, Any]:
    """A config without what says where it came from."""
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}


def _plain(value: Any) -> Any:
    """A value that JSON writes in one way only: sets in order, keys as texts, all else as Python writes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
