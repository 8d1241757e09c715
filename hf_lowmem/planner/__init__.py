"""The weight of a training step before it runs.

```python
from hf_lowmem.planner import plan

args = LowMemSFTConfig("out", max_length=2048, per_device_train_batch_size=1, optim="apollo_mini")
print(plan("path/to/config.json", args, dtype="bfloat16"))
```

    simulate    plan(): the question, and the answer as a Plan
    step        the real trainer, taking two steps on fake tensors
    live        the log of every storage: when it is born, when it dies
    parts       what each storage is, and the bytes of each part over time
    outline     the step as a list of moments; deep models from shallow ones
    parallel    several processes, as a formula
    accelerator how fake CPU tensors stand for a GPU's
    methods     SFT: which trainer, what batch
    models      configs, and models without weights
"""

from hf_lowmem.planner.live import CannotSimulate
from hf_lowmem.planner.simulate import Plan, Point, plan

__all__ = ["CannotSimulate", "Plan", "Point", "plan"]
