"""Reference log-probabilities, computed in one pass before training and looked up by pair."""

import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_lowmem.memory.progress import counted
from hf_lowmem.preference.collate import pair_keys

__all__ = ["ReferenceLogps", "ReferenceRecord", "read_stream"]

logger = logging.getLogger(__name__)


class ReferenceLogps:
    """Reference log-probabilities by pair, for datasets to which no column can be added: see `read_stream`.

    Fields, sorted by key: `keys` (N,) int64, and `values` (N, 2) fp32, of the chosen and the rejected answer in nats.
    They stay on the host. The file is named by the reference's identity (see identity.py), so that a restart
    reads it and whatever would change a number does not.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.keys = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0, 2)

    @classmethod
    def of_reference(cls, folder: str | None, identity: str | None) -> "ReferenceLogps":
        """The table of one reference, with what an earlier run left in `folder`, equal on every rank; without an
        identity, one that has no file."""
        path = None
        if identity is not None and folder is not None:
            path = Path(folder) / f"reference_logps_{identity[:16]}.safetensors"
        table = cls(path)
        found = [table.read()]  # rank 0's: the folder may be its own
        broadcast_object_list(found, from_process=0)
        if found[0] is not None:
            table.keys, table.values = found[0]
        return table

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the file; None where there is none that can be used."""
        if self.path is None or not self.path.exists():
            return None
        try:
            found = load_file(self.path)
            keys, values = found["keys"], found["values"]
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read, so it is computed again: %s", self.path, error)
            return None
        kinds = keys.dtype, values.dtype, tuple(values.shape)
        if kinds != (torch.int64, torch.float32, (len(keys), 2)) or (len(keys) > 1 and not (keys.diff() > 0).all()):
            logger.warning("%s is no table of log-probabilities, so it is computed again.", self.path)
            return None
        return keys, values

    def find(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Positions of `keys` in the table, (B,), and which of them are there, (B,) bool."""
        wanted = torch.tensor(keys, dtype=torch.int64)
        if len(self.keys) == 0:
            return torch.zeros_like(wanted), torch.zeros(len(keys), dtype=torch.bool)
        at = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return at, self.keys[at] == wanted

    def of(self, keys: list[int], device: torch.device) -> dict[str, Tensor]:
        """Reference log-probabilities of a batch under the names of TRL's precomputed columns, (B,) each.

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
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        save_file({"keys": self.keys, "values": self.values}, unfinished)
        os.replace(unfinished, self.path)


class ReferenceRecord(TrainerCallback, ExportableState):
    """Writes into each checkpoint which weights the reference has, so that a resumed run cannot take others."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def state(self) -> dict[str, Any]:
        return {"args": {"digest": self.digest}, "attributes": {}}

    @staticmethod
    def check(saved: dict[str, Any], digest: str | None) -> None:
        """Raise if a checkpoint's record, `saved`, is of another reference than the one with `digest`."""
        before = saved.get("args", {}).get("digest")
        if None not in (before, digest) and before != digest:
            raise ValueError(
                "resume_from_checkpoint with lowmem_reference='precomputed': the run was started with another "
                "reference than this one, so its loss would change. Pass the model that the run was started from (the "
                "checkpoint's weights are put in by themselves), or start another run from the checkpoint."
            )


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
    shown = trainer.accelerator.is_main_process and not trainer.args.disable_tqdm
    read = counted(itertools.islice(loader, count), "reference log-probabilities", total=count, shown=shown)
    with torch.random.fork_rng():  # reading data draws a seed
        table.add(read, lambda batch: trainer.compute_ref_log_probs(model, batch))
    if trainer.accelerator.is_main_process:
        table.save()
