"""DPO's frozen reference model, in less memory: what each loss needs, and the ways of having it.

DPO reads two numbers a pair from its reference, and loads a whole second model for them. The ways out, as values of
the field `lowmem_reference`, with what is in memory *while training* beside the policy:

| value | in memory | its numbers |
|---|---|---|
| `none` | nothing | for losses that need none: asft, orpo, simpo, cpo, and TRL's sft |
| `adapter` | nothing: the policy with its adapter switched off (PEFT alone) | exact; a forward pass a step |
| `precomputed` | two floats a pair (and an 8-byte key for an iterable dataset) | exact; one pass before training |
| `quantized` | 4.13 bits a linear weight, and the embeddings (bitsandbytes nf4) | biased: `quantize_linears` |
| `full` | the model | exact; a forward pass a step |

`auto` is the first of `none`, `adapter` and `precomputed` that will do, and `full` where `sync_ref_model` or images ask
for one. The default is what TRL does: `adapter` with PEFT, else `full`.

Why TRL's own switch `precompute_ref_log_probs` is not the whole answer: it needs a map-style dataset, and it keeps a
reference that was passed in. Why the quantised reference is not the default way to save: its numbers are wrong by a
little, in the same direction at every step, while `precomputed` is exact and smaller. It is for data that are new at
each step, which nobody can compute beforehand.
"""

import contextlib
import copy
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from trl.trainer import dpo_trainer

from hf_lowmem.losses.collate import pair_keys
from hf_lowmem.specs import check_choice

REFERENCES = ("auto", "none", "adapter", "precomputed", "quantized", "full")

BLOCK = 64  # weights that share a scale in bitsandbytes' nf4

NO_REFERENCE_LOSSES = ("sft",)  # of TRL's; it reads the chosen answers alone

# Fields of DPOConfig that speak of a reference model.
REFERENCE_FIELDS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)


def check_reference(args: Any, asking: list[str]) -> None:
    """Raise where `lowmem_reference` contradicts another field; `asking` names the losses that need a reference."""
    asked = args.lowmem_reference
    if asked is None:
        return
    check_choice("lowmem_reference", asked, REFERENCES)
    if not asking:
        if asked not in ("auto", "none"):
            raise ValueError(
                f"lowmem_reference={asked!r} has no effect with loss_type={args.loss_type!r}, which needs no reference "
                "model. Leave it unset."
            )
        return
    if asked == "none":
        raise ValueError(
            f"lowmem_reference='none', but loss_type={asking[0]!r} is defined by a reference model. Set "
            "lowmem_reference='auto' for the way that takes least memory, or a loss that needs none."
        )
    if args.precompute_ref_log_probs and asked not in ("auto", "precomputed"):
        raise ValueError(
            f"precompute_ref_log_probs=True contradicts lowmem_reference={asked!r}. Leave precompute_ref_log_probs "
            "unset, or set lowmem_reference='precomputed'."
        )
    if args.sync_ref_model and asked not in ("auto", "full"):
        raise ValueError(
            f"sync_ref_model=True needs a reference model whose weights can be updated, and lowmem_reference={asked!r} "
            "has none. Set lowmem_reference='full', or leave sync_ref_model unset."
        )
    for engine in ("fsdp", "deepspeed"):
        if asked == "quantized" and getattr(args, engine, None):
            raise ValueError(
                f"{engine}={getattr(args, engine)!r} cannot shard a model of 4-bit weights, which "
                "lowmem_reference='quantized' asks for. Set lowmem_reference='precomputed'."
            )


def resolve_reference(args: Any, asking: list[str], *, peft: bool, passed: bool, images: bool) -> str:
    """Which of `none`, `adapter`, `precomputed`, `quantized` and `full` it is, now that the model is known.

    Args:
        args: the config.
        asking: names of the losses that need a reference.
        peft: whether the policy is, or becomes, a PEFT model.
        passed: whether a `ref_model` was passed.
        images: whether the dataset has images, for which nothing can be precomputed.

    Raises:
        ValueError: where a `ref_model` would be ignored, or there is no way to what was asked for.
    """
    asked = getattr(args, "lowmem_reference", None)
    if not asking:
        if passed:
            raise ValueError(
                f"ref_model was passed, but loss_type={args.loss_type!r} needs no reference model and would ignore it. "
                "Drop ref_model."
            )
        return "none"
    own = "adapter" if peft and not passed else "full"
    if args.precompute_ref_log_probs:
        own = "precomputed"
    if asked is None:
        return own
    if asked == "auto":
        if own != "full" or args.sync_ref_model or images:
            return own
        return "precomputed"
    if asked == "adapter" and (not peft or passed):
        reason = "ref_model was passed" if passed else "the model has no adapter that could be switched off"
        raise ValueError(
            f"lowmem_reference='adapter', but {reason}. "
            + ("Drop ref_model." if passed else "Pass a peft_config, or set lowmem_reference='precomputed'.")
        )
    if asked in ("full", "quantized") and peft and not passed:
        raise ValueError(
            f"lowmem_reference={asked!r} beside an adapter would load a second copy of weights that are there: the "
            "policy without its adapter is the reference. Set lowmem_reference='adapter', or pass another ref_model."
        )
    return asked


@contextlib.contextmanager
def without_reference(policy_is_loaded: bool) -> Iterator[None]:
    """While DPOTrainer is constructed, let its request for a reference model come back empty.

    TRL has no switch for that. `precompute_ref_log_probs=True` comes near, but it hashes every weight, and under FSDP
    it loads the model all the same. So `create_model_from_path` answers None once the policy exists; TRL guards each
    later use of `ref_model` against None. If a future TRL asks in another way, the check in the trainer tells.
    """
    load = dpo_trainer.create_model_from_path
    loaded = policy_is_loaded

    def only_the_policy(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        if loaded:
            return None
        loaded = True
        return load(*args, **kwargs)

    with mock.patch.object(dpo_trainer, "create_model_from_path", only_the_policy):
        yield


def check_none_loaded(trainer: Any, had_adapters: set[str]) -> None:
    """Raise if TRL did load a reference; drop its frozen copy ("ref") of an adapter that was trained before."""
    if trainer.ref_model is not None:
        raise RuntimeError(
            f"TRL loaded a reference model although loss_type={trainer.args.loss_type!r} needs none. This version of "
            "trl is not supported by hf_lowmem; please report it with the version."
        )
    if "ref" in set(getattr(trainer.model, "peft_config", ())) - had_adapters:
        trainer.model.delete_adapter("ref")


def free_reference(trainer: Any) -> None:
    """Let go of a reference that was passed in. Its owner may still hold it, but no longer on the device."""
    reference, trainer.ref_model = trainer.ref_model, None
    trainer.accelerator._models = [m for m in trainer.accelerator._models if m is not reference]
    reference.to("cpu")


# --- quantized -------------------------------------------------------------------------------------------------------


def quantized_reference(model: Any, ref_model: Any, args: Any) -> Any:
    """The 4-bit reference: of `ref_model` (in place), else of the model at a path, else of a model in memory.

    A model in memory is copied layer by layer, so that at no time a second full one exists.
    """
    if ref_model is not None:
        return quantize_linears(ref_model, args.device)
    if not isinstance(model, str):
        return quantize_linears(_borrowing_copy(model), args.device, borrowed={id(p) for p in model.parameters()})
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    dtype = kwargs.get("dtype", "float32")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=None if dtype in (None, "auto") else dtype,
    )
    device = {"": args.device.type if args.device.index is None else args.device.index}
    loaded = dpo_trainer.create_model_from_path(model, **kwargs | {"quantization_config": config, "device_map": device})
    return loaded.requires_grad_(False)


def _borrowing_copy(model: nn.Module) -> Any:
    """A copy of `model` whose parameters are still the model's own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def quantize_linears(model: Any, device: torch.device, borrowed: set[int] | None = None) -> Any:
    """Replace each linear layer of `model` but its head by bitsandbytes' 4-bit one, in place; freeze it on `device`.

    nf4 with double quantisation. The head and the embeddings stay as they are: TRL's fused head reads `lm_head.weight`.
    So does a layer whose rows are no whole number of blocks of 64: bitsandbytes' CPU code fails on it.

    The bias, measured on SmolLM2-135M with 24 pairs of answers of 48 tokens, beside the same model in fp32: both log-
    probabilities fall by 0.27 nats a token, not equally, so that the difference of the two sums is off by 7.0 nats
    (mean absolute; -1.9 in the mean). At beta 0.1 the argument of DPO's sigmoid starts 0.7 away from 0. Embeddings and
    norms included, 513 MiB become 159. A small model, whose published weights had been through 4 bits before, is a hard
    case; measure yours, and prefer `precomputed` wherever the data can be read beforehand.

    Args:
        model: what is changed and returned.
        device: where bitsandbytes quantises.
        borrowed: ids of parameters that belong to another model, and are cloned where they stay.

    Raises:
        ValueError: where no layer is left.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    found = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and m.in_features % BLOCK == 0
    ]
    if not found:
        raise ValueError(
            f"lowmem_reference='quantized': {type(model).__name__} has no nn.Linear layer that could be quantised. Set "
            "lowmem_reference='precomputed'."
        )
    for name, linear in found:
        small: Any = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, device="meta"
        )
        make: Any = Params4bit
        weight = make(
            linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
        )
        small.weight = weight.to(device)
        small.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, small)
    owned: dict[int, nn.Parameter] = {}  # by the lender's id, so that tied weights stay tied
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in (borrowed or ()):
                module._parameters[name] = owned.setdefault(id(p), nn.Parameter(p.detach().clone()))
    return model.requires_grad_(False).to(device).eval()


# --- precomputed -----------------------------------------------------------------------------------------------------


class ReferenceLogps:
    """Reference log-probabilities by pair, for datasets to which no column can be added: see `read_stream`.

    Fields, sorted by key: `keys` (N,) int64, and `values` (N, 2) fp32, of the chosen and the rejected answer in nats.
    They stay on the host. The file is keyed by the reference's weights, so that a restart reads it and a changed model
    does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0, 2)

    @classmethod
    def of_model(cls, args: Any, model_hash: str) -> "ReferenceLogps":
        """The table of one reference in `output_dir`, with what an earlier run left there, equal on every rank."""
        identity = hashlib.sha256(f"{model_hash} ld_alpha={args.ld_alpha}".encode()).hexdigest()
        table = cls(Path(args.output_dir) / f"reference_logps_{identity[:16]}.safetensors")
        found = [load_file(table.path) if table.path.exists() else None]  # rank 0's: the folder may be its own
        broadcast_object_list(found, from_process=0)
        if found[0] is not None:
            table.keys, table.values = found[0]["keys"], found[0]["values"]
        return table

    def find(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Positions of `keys` in the table, (B,), and which of them are there, (B,) bool."""
        wanted = torch.tensor(keys, dtype=torch.int64)
        if len(self.keys) == 0:
            return torch.zeros_like(wanted), torch.zeros(len(keys), dtype=torch.bool)
        at = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return at, self.keys[at] == wanted

    def of(self, keys: list[int], device: torch.device) -> dict[str, Tensor]:
        """What TRL's precomputed columns would have brought: (B,) each.

        Raises:
            ValueError: for a pair that the pass before training has not seen.
        """
        at, found = self.find(keys)
        if not found.all():
            raise ValueError(
                "lowmem_reference='precomputed': the dataset gives a pair in training that it did not give in the pass "
                "before. An iterable dataset must give the same examples each time it is read. Use a map-style "
                "dataset, or lowmem_reference='quantized'."
            )
        chosen, rejected = self.values[at].to(device).unbind(1)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def add(self, batches: Iterable[dict[str, Any]], compute: Any) -> int:
        """Add the pairs of `batches` that are not there; `compute` gives (chosen, rejected), (B,) each, of a batch.

        Every rank passes its own batches, and all have the same table afterwards.

        Returns:
            the number of batches that this rank has computed.
        """
        rows: dict[int, tuple[float, float]] = {}
        computed = 0
        for batch in batches:
            keys = pair_keys(batch)
            known = self.find(keys)[1].tolist()
            if all(there or key in rows for key, there in zip(keys, known, strict=True)):
                continue
            values = zip(*(x.float().tolist() for x in compute(batch)), strict=True)
            rows.update((k, v) for k, v, there in zip(keys, values, known, strict=True) if not there)
            computed += 1
        merged = dict(gather_object(list(rows.items())))
        if merged:
            keys = torch.cat([self.keys, torch.tensor(list(merged), dtype=torch.int64)])
            self.keys, order = keys.sort()
            self.values = torch.cat([self.values, torch.tensor(list(merged.values()))])[order]
        return computed

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        save_file({"keys": self.keys, "values": self.values}, unfinished)
        os.replace(unfinished, self.path)


def read_stream(trainer: Any, dataset: Any, table: ReferenceLogps) -> None:
    """Fill `table` with the pairs of a dataset, by the very batches that training or evaluation will read.

    Of an iterable one that is as many as training takes in its first epoch; of another all.

    Raises:
        ValueError: for settings under which other pairs may come in training, or the model is sharded.
    """
    for setting, value in (
        ("fsdp", trainer.is_fsdp_enabled),
        ("deepspeed", trainer.is_deepspeed_enabled),
        ("dataloader_drop_last", trainer.args.dataloader_drop_last),
        ("precompute_ref_batch_size", trainer.args.precompute_ref_batch_size),
    ):
        if value:
            raise ValueError(
                f"{setting}={value!r} is not supported with lowmem_reference='precomputed' for an iterable dataset, or "
                "with several processes one in memory, which is read by the batches of training. Use a dataset that "
                "was loaded from files, or leave it unset."
            )
    loader, count = trainer.get_eval_dataloader(dataset), None
    if dataset is trainer.train_dataset:
        loader = trainer.get_train_dataloader()
        if isinstance(dataset, IterableDataset):
            count = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    model = trainer.ref_model or trainer.model
    with torch.random.fork_rng():  # reading data draws a seed
        table.add(itertools.islice(loader, count), lambda batch: trainer.compute_ref_log_probs(model, batch))
    if trainer.accelerator.is_main_process:
        table.save()
