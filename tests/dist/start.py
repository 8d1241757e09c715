"""`python -m tests.dist.start PROCESSES MODULE WORDS...`: what torchrun does, with the imports made once.

torch, transformers and TRL take seconds to import, and torchrun does it in itself and in each of its processes. Here
one process imports them and forks, before anything has been computed. The variables are torchrun's. The store at which
processes meet is made after the fork, by the parent, at a port that is free, as torchrun's agent does it.
"""

import os
import runpy
import sys
from datetime import timedelta

from tests.dist.imported import preload

SECONDS = 3600


def child(rank: int, processes: int, port: int, module: str, words: list[str]) -> None:
    count = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (count | store | {"TORCHELASTIC_RESTART_COUNT": 0}).items()})
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(processes: int, module: str, words: list[str]) -> int:
    """The number of processes that ended otherwise than well. Where one does, the others are ended."""
    ports = [os.pipe() for _ in range(processes)]
    ranks: dict[int, int] = {}
    for rank, (reads, _) in enumerate(ports):
        pid = os.fork()
        if pid == 0:
            port = int.from_bytes(os.read(reads, 4), "big")
            child(rank, processes, port, module, words)  # an exception's traceback and exit status are Python's own
            sys.exit(0)
        ranks[pid] = rank

    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    for _, writes in ports:
        os.write(writes, store.port.to_bytes(4, "big"))
    failed = 0
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status:
            failed += 1
            for other in ranks:
                os.kill(other, 15)
    return failed


def main() -> int:
    preload()
    return start(int(sys.argv[1]), sys.argv[2], sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
