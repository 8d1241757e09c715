"""Several processes: ranks whose shared batches have other shapes than each other's, and collators in workers."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hf_lowmem.preference.sharing import share_prompts, without_sharing
from hf_lowmem.preference.sharing.layout import SOURCE
from tests.preference.sharing.families import batch, both, examples, gradients, tiny
from tests.preference.sharing.test_exact import assert_close

pytestmark = pytest.mark.train

BUDGETS = (24, 64)


def half(rank: int, world: int = 2) -> dict[str, Any]:
    """Each rank's batch: other pairs, and another budget, so that the numbers of rows differ."""
    return batch(BUDGETS[rank], examples()[rank::world])


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = tiny("llama")
    share_prompts(model)
    parallel: Any = DistributedDataParallel(model)
    for _ in range(2):  # the second forward pass raises if the first one's gradients were not all reduced
        found = gradients(parallel, half(rank))
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may otherwise end a forked process noisily, after all is done


def test_ranks_with_other_numbers_of_rows_average_their_gradients(tmp_path: Path) -> None:
    shapes = {half(rank)[SOURCE].shape[0] for rank in range(2)}
    assert len(shapes) == 2
    # A fork spares a second import of transformers and trl. Of a torch with CUDA no fork can run a backward pass.
    context: Any = multiprocessing.get_context("fork" if torch.version.cuda is None else "spawn")
    ranks = [context.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.is_alive():
            process.terminate()
    assert [process.exitcode for process in ranks] == [0, 0]
    plain = [gradients(both("llama", half(rank))[0], without_sharing(half(rank))) for rank in range(2)]
    expected = {f"module.{name}": (plain[0][name] + plain[1][name]) / 2 for name in plain[0]}
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_dataloader_workers_make_the_same_batches(workers: int) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from hf_lowmem.preference.sharing import SharedPairs

    collator = SharedPairs(DataCollatorForPreference(pad_token_id=0), 33)
    loader: Any = DataLoader(examples(), batch_size=5, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
    (found,) = list(loader)
    expected = batch(33)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
