"""Each process of test_distributed.py, started alone or by tests.dist.start with FOLDER and TOTAL_BATCH."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.preference.reference.runs import data, policy, trainer
from tests.training.test_trainers import losses

RUNS: dict[str, dict[str, Any]] = {
    "asft": {"loss_type": "asft"},
    "full": {"reference": True, "lowmem_reference": "full"},
    "precomputed": {"reference": True, "lowmem_reference": "precomputed"},
    "from files": {"reference": True, "lowmem_reference": "precomputed", "files": True},
    "iterable": {"reference": True, "lowmem_reference": "precomputed", "stream": True},
    "mixture": {"loss_type": ["orpo", "sigmoid"], "lowmem_reference": "auto"},
}


def main(folder: Path, total_batch: int) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, asked in RUNS.items():
        fields = dict(asked)
        reference = policy(1) if fields.pop("reference", False) else None
        rows: Any = data(12)
        if fields.pop("files", False):
            rows = load_from_disk(str(folder.parent / "rows"))
        elif fields.pop("stream", False):
            rows = rows.to_iterable_dataset()
        model = policy()
        model.save_pretrained(folder / f"model-{rank}")
        made = trainer(
            folder / name, tokenizer, model=str(folder / f"model-{rank}"), ref_model=reference, train=rows, evals=rows,
            per_device_train_batch_size=total_batch // world, per_device_eval_batch_size=total_batch // world,
            max_steps=6, learning_rate=1e-3, **fields,
        )  # fmt: skip
        made.train()
        found[name] = {"losses": losses(made), "eval": made.evaluate()["eval_loss"], "world": made.args.world_size}
        if made.reference_logps is not None:
            table = made.reference_logps
            found[name]["keys"] = table.keys.tolist()
            saved = load_file(table.path)
            assert torch.equal(saved["keys"], table.keys)
            assert torch.equal(saved["values"], table.values)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
