"""One process or many: joining a torchrun job, sharding modules (FSDP2), and values that all ranks agree on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from duovsr.errors import UsageError
from duovsr.model.transformer import Transformer

# A block also returns the keys and values it would carry to the next chunk, as views; training drops them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)

Module = TypeVar("Module", bound=nn.Module)
_joins = count()
_TOLD_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE


@dataclass(frozen=True)
class World:
    """This process among the job's. `mesh` is None in a job of one."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the job that torchrun describes in the environment, or stand alone. `device`: auto, cpu or cuda."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device was found", hint="use `--set device=cpu`")
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield World(0, 1, torch.device(device))
        return
    if missing := [name for name in _TOLD_BY_TORCHRUN if name not in os.environ]:
        hint = "start it by torchrun, or unset WORLD_SIZE"
        raise UsageError(f"WORLD_SIZE is set, and {', '.join(missing)} is not", hint=hint)
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    # Checkpoints are gathered on the host in the background, so that the CPU needs its group too.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo"
    # Keys of their own for every restart, and every stage of a recipe: on torchrun's store the addresses of processes
    # that are gone are still there, and making a second group would wait for them.
    store, rank, size = next(rendezvous("env://"))
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{next(_joins)}"
    store = PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        yield World(dist.get_rank(), dist.get_world_size(), place, mesh)
    finally:
        dist.destroy_process_group()


def place(module: Module, world: World, dtype: str = "float32") -> Module:
    """Move a module to this process's device and, in a job of many, shard it: each transformer block, then the rest.

    `dtype`: of the gathered copies; the shards, the gradients' sums and the optimiser stay float32.
    """
    module.to(world.device)
    if world.mesh is None:
        return module
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP shards no channels-last ones
    gathered = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    # Inputs keep their type: bfloat16 would round the timestep.
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in module.modules():
        if isinstance(part, Transformer):
            for block in part.blocks:
                fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(module, mesh=world.mesh, mp_policy=policy)
    for method in ("encode", "decode"):
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)
    return module


def set_trained(module: nn.Module, trained: bool) -> None:
    """`requires_grad_` between two updates. After a forward without gradient a sharded module's own parameters are
    still the gathered copies, which it would reach in place of the shards."""
    if isinstance(module, FSDPModule):
        module.reshard()
    module.requires_grad_(trained)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    value = value.detach().clone()
    if world.mesh is not None:
        dist.all_reduce(value)
        value /= world.size
    return value


def wait_for_all(world: World) -> None:
    if world.mesh is not None:
        dist.barrier()


@contextmanager
def first_alone(world: World) -> Iterator[bool]:
    """Whether this rank does the work inside. The others wait at the end, for days if need be: in a group of its own,
    as a usual one gives up after minutes."""
    group = None if world.mesh is None else dist.new_group(backend="gloo", timeout=timedelta(days=30))
    yield world.first
    if group is not None:
        dist.barrier(group)


def any_rank(flag: bool, world: World) -> bool:
    if world.mesh is None:
        return flag
    value = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())
