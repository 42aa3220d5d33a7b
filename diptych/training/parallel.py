"""Data parallelism over several processes, and sharding of the model (PyTorch's FSDP2).

Every process works on its own rows. Gradients are *summed*, because losses are already divided by the global count; the
split of a step changes rounding only. ``spread`` shards a model as the recipe's ``EngineConfig`` says. A single process
neither communicates nor shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from diptych.machine.processes import place, processes_per_machine
from diptych.models.protocol import Trainable
from diptych.training.recipe import EngineConfig


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every parameter the sum of its gradients over all processes, as if each had reached it. What FSDP shards it
    has added up already."""
    whole = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if not isinstance(p, DTensor):
            whole.append(p)
    if not dist.is_initialized() or not whole:
        return
    flat = torch.cat([p.grad.flatten() for p in whole])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for p, g in zip(whole, flat.split([p.numel() for p in whole]), strict=True):
        p.grad = g.view_as(p)


# ---- sharding -------------------------------------------------------------------------------------------------------


def sharded(engine: EngineConfig) -> bool:
    """Whether parameters are spread over the processes that there are."""
    return engine.shard != "none" and place()[1] > 1


def mesh(engine: EngineConfig, device: str) -> DeviceMesh:
    """The processes as FSDP sees them: one line, or (``hybrid``) machines of equally many.

    Raises ``ValueError`` where they do not divide."""
    kind, size, local = device.partition(":")[0], place()[1], processes_per_machine()
    if engine.shard == "full":
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % local:
        raise ValueError(
            f"hybrid sharding needs equally many processes on every machine; {size} do not divide by {local}"
        )
    return init_device_mesh(kind, (size // local, local), mesh_dim_names=("replicate", "shard"))


def spread(model: Trainable, engine: EngineConfig, precision: str, device: str, trained: Set[nn.Parameter]) -> None:
    """Prepares a model (on the meta device too) for training as ``engine`` says, in place.

    Every block is recomputed separately and, except for transformers' layers, compiled separately. With sharding, the
    blocks of ``trunk`` are gathered one at a time. Other parameters that a stage trains (``trained``) are gathered
    together at the start of the forward pass. Parameters outside the trunk that no stage trains are replicated. In bf16
    the gathered blocks are bf16; the optimizer's shards and the sums of gradients stay float32."""
    if engine.compile and engine.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"unknown back end {engine.compile!r} of torch.compile; choose from {', '.join(known)}")
    for block in model.blocks():
        # the trace of a layer of transformers has its number, the row's shape and the gradient in it: of use only once
        if engine.compile and not type(block).__module__.startswith("transformers."):
            block.forward = torch.compile(block.forward, backend=engine.compile)  # type: ignore[method-assign]
        if engine.recompute != "none":
            block.forward = recomputed(block.forward, engine.recompute)  # type: ignore[method-assign]
    if not sharded(engine):
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(f"sharding needs torch 2.13 or newer, not {torch.__version__}")
    trunk = list(model.trunk())
    inside = {p for block in trunk for p in block.parameters()}
    whole = {p for p in model.parameters() if p not in inside and p not in trained}
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": mesh(engine, device),
        "offload_policy": CPUOffloadPolicy() if engine.offload and device != "cpu" else OffloadPolicy(),
    }
    for block in trunk:
        block.register_forward_pre_hook(_reached)
        fully_shard(block, mp_policy=bf16 if precision == "bf16" else MixedPrecisionPolicy(), **options)
    fully_shard(model, reshard_after_forward=False, ignored_params=whole, **options)
    for module in shards(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True)  # what a row reaches differs between processes


def shards(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered as one."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def settle(model: nn.Module) -> None:
    """To be called when other parts are trained than before: FSDP decides once, at the first forward, in which dtype it
    adds up a group's gradients, and a group that was frozen then has none."""
    for module in shards(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group._init_mp_dtypes()


def _reached(module: nn.Module, inputs: tuple) -> tuple:
    """Every process goes backward through every block, also where its own row reaches nothing that is trained."""
    if not torch.is_grad_enabled():
        return inputs
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad else x
        for x in inputs
    )


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that all have, sharded as ``like`` is; the tensor itself where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors gathered on rank 0, one after the other; nothing elsewhere. Every process must call it."""
    out = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if not dist.is_initialized() or dist.get_rank() == 0:
            out[name] = tensor
    return out


def each_whole(stack: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """``work`` on (n, rows, columns) matrices, whole ones: where they are sharded by rows, every process takes some of
    the n, and the results are sharded as before."""
    if not isinstance(stack, DTensor):
        return work(stack)
    by_matrix = stack.redistribute(placements=[Shard(0) if p.is_shard() else p for p in stack.placements])
    local = by_matrix.to_local()
    done = DTensor.from_local(
        work(local) if len(local) else local.float(),
        stack.device_mesh,
        by_matrix.placements,
        run_check=False,
        shape=stack.shape,
        stride=stack.stride(),
    )
    return done.redistribute(placements=stack.placements)


# ---- recomputing ----------------------------------------------------------------------------------------------------

KEPT = {  # products and attention: expensive to compute, small beside what is computed from them
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def recomputed(forward: Callable, mode: str) -> Callable:
    """A block's forward that keeps its input (``full``) or also its matrix products (``selective``) and recomputes
    the rest in the backward pass."""

    def policy(context: Any, op: Any, *inputs: Any, **settings: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    more: dict[str, Any] = (
        {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if mode == "selective" else {}
    )

    def call(*inputs: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **settings)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more, **settings)

    return call
