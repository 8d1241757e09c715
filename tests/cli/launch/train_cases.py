"""What `hf-lowmem launch` starts on each process: `train_cases.py BASE FOLDER CASE,... --flag`; see test_trainers.py.

It writes what it was started with to `said-RANK.json`, trains once as the launcher's file says, and then, without its
section, every case; what came out of a case is `CASE.pt`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.distributed import is_sharded
from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from hf_lowmem.training import section
from tests.cli.launch.cases import STEPS, TOTAL_BATCH, Case, fresh_engine, host_fields, make, texts, train
from tests.conftest import tiny_llama
from tests.dist import fsdp_on_cpu
from tests.dist.net import equal_on_all

WORLD = 2


def check_engine(made: Any, fsdp: bool) -> None:
    """What was asked for is what runs: accelerate may do something else without a word."""
    assert made.accelerator.num_processes == dist.get_world_size() == WORLD
    expected = DistributedType.FSDP if fsdp else DistributedType.MULTI_CPU
    assert made.accelerator.distributed_type == expected, made.accelerator.distributed_type
    if not fsdp:
        assert isinstance(made.model_wrapped, torch.nn.parallel.DistributedDataParallel), type(made.model_wrapped)
        return
    assert all(is_sharded(p) for p in made.model.parameters())
    moments = [v for s in made.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    assert moments
    assert all(is_sharded(v) for v in moments)


def twice(construct: Any, folder: Path, fsdp: bool) -> dict[str, Any]:
    """A run, and the same one again from its checkpoint in the middle: equal bits, on all processes."""
    fresh_engine()
    made = construct()
    whole = train(made)
    check_engine(made, fsdp)
    assert len(whole["losses"]) == STEPS
    assert equal_on_all(whole["weights"].values()), "replicas differ"
    fresh_engine()
    again = construct()
    resumed = train(again, folder / f"checkpoint-{STEPS // 2}")
    assert whole["losses"][-STEPS // 2 :] == resumed["losses"][-STEPS // 2 :]
    assert all(torch.equal(whole["weights"][n], w) for n, w in resumed["weights"].items())
    return whole


def run_case(case: Case, base: Path, folder: Path, tokenizer: Any, fsdp: bool) -> dict[str, Any]:
    def construct(**fields: Any) -> Any:
        loads = mock.Mock(side_effect=LlamaForCausalLM.from_pretrained)
        with mock.patch.object(LlamaForCausalLM, "from_pretrained", loads):
            made = make(case, base, folder / case.name, tokenizer, TOTAL_BATCH // WORLD, **fields)
        assert (made.activations is not None) == (case.tier != "none")
        if case.kind in PREFERENCE_LOSSES:
            assert made.ref_model is None
            assert loads.call_count == 1, "the policy alone is loaded"
        return made

    whole = twice(construct, folder / case.name, fsdp)
    if fsdp and case.kind == "plugin":
        fresh_engine()
        stepped = train(construct(lowmem_step_in_backward=True))
        assert all(torch.equal(whole["weights"][n], w) for n, w in stepped["weights"].items())
    return whole


def run_as_the_file_says(folder: Path, tokenizer: Any, fsdp: bool) -> None:
    """bf16 weights, and every field from the section."""
    asked = section.from_env()

    def construct() -> Any:
        args = LowMemSFTConfig(**host_fields(folder / "shipped", TOTAL_BATCH // WORLD))
        assert {name: getattr(args, name) for name in asked} == asked
        model = tiny_llama(dtype=torch.bfloat16, num_hidden_layers=2)
        rows = Dataset.from_dict({"input_ids": texts()})
        return LowMemSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)

    found = twice(construct, folder / "shipped", fsdp)
    ends = found["weights"]
    assert all(w.isfinite().all() and not torch.equal(w, found["start"][n]) for n, w in ends.items() if w.ndim == 2)


def main(base: Path, folder: Path, names: list[str]) -> None:
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp:
        fsdp_on_cpu.allow()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "tokenizer")
    run_as_the_file_says(folder, tokenizer, fsdp)
    said = {"world": dist.get_world_size(), "section": section.from_env(), "arguments": sys.argv[4:]}
    (folder / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))
    del os.environ[section.VARIABLE]
    for name in names:
        found = run_case(Case.named(name), base, folder, tokenizer, fsdp)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
    dist.barrier()
    dist.destroy_process_group()
