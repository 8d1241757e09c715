"""Products in 8 bits under DDP and FSDP2: the gradients of one process, bit for bit, as every process has its batch."""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lowmem.activations import convert
from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.distributed import full
from hf_lowmem.matmul import OwnedProducts
from hf_lowmem.matmul.spec import MatmulSpec
from tests.conftest import tiny_llama


def gradients(kind: str, tier: str | None, recipe: str) -> list[torch.Tensor]:
    model = tiny_llama().train()
    OwnedProducts(linears_of_layers(model), MatmulSpec(recipe=recipe, least=0))
    if tier is not None:
        convert(model, tier)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    run = DistributedDataParallel(model) if kind == "ddp" else model
    ids = torch.arange(48).view(2, 24)
    run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [full(p.grad) for p in model.parameters() if p.grad is not None]


def of_adapters(kind: str) -> list[torch.Tensor]:
    """Gradients of adapters on a model of which codes alone are kept: those of process 0, on all processes."""
    model = tiny_llama(seed=0 if kind == "alone" else dist.get_rank())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    linears, spec = linears_of_layers(adapted), MatmulSpec(recipe="fp8_row", least=0)
    whole = "frozen, and FSDP2 reads it" if kind == "fsdp2" else None
    for p in adapted.parameters():  # what is not coded is as DDP and FSDP2 want it: the same on all processes
        if kind == "fsdp2":
            dist.broadcast(p.data, 0)
    OwnedProducts(linears, spec, None if kind == "alone" else adapted, whole=whole)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in adapted.get_submodule("base_model.model.model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(adapted, mesh=mesh)
    run = DistributedDataParallel(adapted.train()) if kind == "ddp" else adapted.train()
    ids = torch.arange(48).view(2, 24)
    run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [full(p.grad) for p in adapted.parameters() if p.grad is not None]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for recipe in ("fp8_row", "int8_row"):
        for tier in (None, "fp8"):
            want = gradients("alone", tier, recipe)
            for kind in ("ddp", "fsdp2"):
                got = gradients(kind, tier, recipe)
                assert all(map(torch.equal, got, want)), (kind, tier, recipe)
                if dist.get_rank() == 0:
                    print(f"passed {kind} {tier} {recipe}")
    want = of_adapters("alone")
    for kind in ("ddp", "fsdp2"):
        assert all(map(torch.equal, of_adapters(kind), want)), kind
        if dist.get_rank() == 0:
            print(f"passed {kind} adapters")
    if dist.get_rank() == 0:
        print("passed all")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
