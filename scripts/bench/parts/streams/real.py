"""One real step of a long sequence on the CPU, beside its plan: bytes that torch gave out, and of the process.

A step is trained in a process of its own, under the allocator's trace, which counts every byte.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_lowmem import LowMemSFTConfig
from parts.record import ROOT, Row

# A wide MLP, as it is what a long sequence has of bytes; narrow attention, as it is what it has of time.
MODEL: Row = {
    "hidden_size": 32,
    "intermediate_size": 12288,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 4096,
}
TOY: Row = MODEL | {"intermediate_size": 512, "vocab_size": 128}


def stepped(settings: Row, shape: Row, tokens: int) -> Row:
    """Train one step, and say what it took."""
    sys.path.insert(0, str(ROOT))  # tests/planner has the way of weighing a real step
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig

    from tests.planner.real import peak_of, trainer_of

    torch.set_num_threads(1)
    config, args = LlamaConfig(**shape, max_position_embeddings=tokens), arguments(settings, tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        trainer = trainer_of(config, args, torch.float32, callbacks=[])
        begin = torch.zeros(7, dtype=torch.int16)  # 14 bytes: where training begins in the trace
        before = time.process_time()
        trainer.train()
        seconds = time.process_time() - before
        del begin
    return {
        "peak_bytes": peak_of(trace),
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds": round(seconds, 1),
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def arguments(settings: Row, tokens: int) -> LowMemSFTConfig:
    return LowMemSFTConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        optim="sgd",
        max_length=tokens,
        per_device_train_batch_size=1,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def planned(settings: Row, shape: Row, tokens: int) -> Row:
    """What the planner predicts of that step on a CPU."""
    from transformers import LlamaConfig

    from hf_lowmem.planner import plan

    config = LlamaConfig(**shape, max_position_embeddings=tokens)
    made = plan(config, arguments(settings, tokens), dtype="float32", device="cpu")
    return {"planned_bytes": made.peak_bytes, "parts": made.parts, "peak_in": f"{made.phase}, {made.module}"}


def apart(settings: Row, shape: Row, tokens: int) -> Row:
    """`stepped` in a process of its own."""
    given = json.dumps([settings, shape, tokens])
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "parts.streams.real", given],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(stepped(*json.loads(sys.argv[1]))))
