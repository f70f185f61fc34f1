"""A patched network under DDP (two processes) and FSDP2 (one), against a plain process; see test_patched_ranks.py.

Prints a JSON object that maps a case to the largest relative difference of its gradients, and the gates' share of them.
"""

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from scalelong_fast import apply_scalelong
from scalelong_fast.integrations.patching.deferred import always_defer


class Up(nn.Module):
    """Decoder block in the manner of diffusers."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 2 * width), nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, h: Tensor, res_hidden_states_tuple: tuple[Tensor, ...]) -> Tensor:
        return self.conv(F.silu(self.norm(torch.cat([h, res_hidden_states_tuple[-1]], dim=1))))


class Network(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(3))
        self.up = nn.ModuleList(Up(width) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        skips: tuple[Tensor, ...] = ()
        for layer in self.down:
            h = layer(h).relu()
            skips += (h,)
        for block in self.up:
            skips = skips[:-1]
            h = block(h, skips)
        return h


def network() -> nn.Module:
    torch.manual_seed(0)
    return apply_scalelong(Network(), init="paper", example_inputs=(torch.zeros(1, 3, 8, 8),))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).square().mean().backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def compare(model: nn.Module, batch: Tensor) -> dict[str, float]:
    expected = gradients(network(), images())
    found = gradients(model, batch)
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    # Hidden units of so small gates may be dead: the last bias always learns.
    gates = [grad for name, grad in found.items() if name.startswith("scalelong.") and name.endswith("up.bias")]
    return {
        "difference": max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale,
        "gates": sum(float(grad.abs().max()) > 0 for grad in gates) / len(gates),
    }


def ddp(rank: int, world: int) -> dict:
    cases = {}
    batch = images().chunk(world)[rank]
    for name, options in (("ddp", {}), ("ddp, graph kept", {"static_graph": True})):
        cases[name] = compare(DistributedDataParallel(network(), **options), batch)
    with always_defer():
        cases["ddp, deferred"] = compare(DistributedDataParallel(network()), batch)
    return cases


def fsdp(rank: int, world: int) -> dict:
    cases = {}
    mesh = dist.init_device_mesh("cpu", (1,))
    for name, parts in (("fsdp", lambda m: [*m.up, m]), ("fsdp, gates apart", lambda m: [m.scalelong, *m.up, m])):
        model = network()
        for part in parts(model):
            fully_shard(part, mesh=mesh)
        cases[name] = compare(model, images())
        with always_defer():
            cases[f"{name}, deferred"] = compare(model, images())
    copied = copy.deepcopy(network())
    fully_shard(copied, mesh=mesh)
    cases["fsdp of a copy"] = compare(copied, images())
    return cases


def start(work: Callable[[int, int], dict], world: int, folder: Path) -> list[int]:
    """Fork ``world`` processes, which spares them the imports; rank 0 leaves what it found in ``folder``."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                name = work.__name__
                dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=world)
                found = work(rank, world)
                if rank == 0:
                    (folder / f"{name}.json").write_text(json.dumps(found))
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    children = start(ddp, 2, folder) + start(fsdp, 1, folder)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = {}
    for path in folder.glob("*.json"):
        results.update(json.loads(path.read_text()))
    print(json.dumps(results))
    sys.exit(max(codes, key=abs))
