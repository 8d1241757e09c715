"""`python -m tests.cli.launch.forked ...` is `hf-lowmem launch ...` with processes that are forked, not torchrun's own.

Up to torchrun all is the command's own, and so is what each process runs. torchrun itself imports torch, transformers
and TRL anew in every process, which takes longer than the trainings: see tests/dist/start.py.
"""

import sys
from typing import Any

import torch.distributed.run

from hf_lowmem.cli.main import main
from tests.dist.imported import preload
from tests.dist.start import start


def fork(options: Any) -> None:
    """In torchrun's place."""
    assert options.module, "hf_lowmem.cli.worker is a module"
    failed = start(int(options.nproc_per_node), options.training_script, options.training_script_args)
    assert not failed, f"{failed} processes failed"


if __name__ == "__main__":
    preload()
    torch.distributed.run.run = fork
    sys.exit(main(["launch", *sys.argv[1:]]))
