"""The memory of every process, the FLOPs of a step, the time and the cost of a run, before it starts.

The model is built on the meta device and prepared as for training. One real row of the recipe's data goes through its
forward and backward pass: ``Hollow`` adds up the allocations and counts the FLOPs, and nothing is computed. The sizes
of parameters, gradients, optimizer state, average and gathered parameters follow from the parts and their sharding.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from diptych.core.batch import Batch
from diptych.core.errors import nearest
from diptych.core.losses import combine
from diptych.core.noise import Noise
from diptych.machine.devices import fastest_precision, host_memory, matmul_rate
from diptych.models import configs, store
from diptych.models.protocol import Trainable
from diptych.parts.quantize import to_int8
from diptych.training import lora, optim
from diptych.training.parallel import spread
from diptych.training.parameters import always_frozen, ever_trained, freeze
from diptych.training.recipe import Recipe, Stage
from diptych.training.rows import Sources, stage_loader

GIB = 2**30
GPUS = {  # dense bf16 TFLOP/s and GiB, from the data sheets
    "3090": (71, 24),
    "4090": (165, 24),
    "5090": (210, 32),
    "a10": (125, 24),
    "l4": (121, 24),
    "l40s": (362, 48),
    "a100-40": (312, 40),
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
}


def limits_of(gpu: str, device: str = "cuda", memory: float | None = None) -> tuple[float, float]:
    """(peak rate in FLOP/s, memory in GiB) of a GPU by name, or with ``device`` "cpu" of this machine, whose rate is
    measured. ``memory`` replaces the memory. Raises ``ValueError`` for an unknown GPU, listing the known ones."""
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; choose from {', '.join(GPUS)}{nearest(gpu, GPUS)}")
    if device == "cpu":
        return matmul_rate(torch.float32) * 1e9, memory or host_memory() / GIB
    rate, size = GPUS[gpu]
    return rate * 1e12, float(memory or size)


class Hollow(TorchDispatchMode):
    """Runs a model on the meta device with a real batch: operations on tensors of the model compute nothing.

    ``live`` are the bytes that its results hold now and ``peak`` the most they ever held; ``most`` is the same without
    what was ``set_aside`` (gradients that stay). ``flops`` are those of each kind of product. Counted here rather than
    by torch's ``FlopCounterMode``, whose hooks keep what blocks recompute until the garbage is collected."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.most = self.aside = 0
        self.flops: Counter[Any] = Counter()
        tensors = [*model.parameters(), *model.buffers()]
        self.known: dict[int, Any] = {p.untyped_storage()._cdata: None for p in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs = kwargs | {"device": torch.device("meta")}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops[func._overloadpacket] += count(*args, **kwargs, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_meta:
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.most = max(self.most, self.live - self.aside)

    def set_aside(self, size: int) -> None:
        """Leaves ``size`` bytes out of ``most`` from now on."""
        self.aside += size


@contextmanager
def fused() -> Iterator[None]:
    """Attention as the fused kernels do it, for meta tensors: there torch itself would lay out the whole matrix.

    Replaces torch's function, because recomputed blocks do not enter a dispatch mode."""
    real = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
        if not q.is_meta:
            return real(q, k, v, attn_mask, *rest, **more)
        groups = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(groups, -3) if groups > 1 else x for x in (k, v))
        bias = None if attn_mask is None else attn_mask.to("meta", q.dtype).expand(*q.shape[:-1], k.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, 0.0, bool(more.get("is_causal", False)), scale=more.get("scale"))[0]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


@dataclass(frozen=True)
class StageEstimate:
    """The memory of one process in a stage, in bytes, and the time in seconds and cost of the whole stage."""

    stage: str
    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int  # parameters and gradients that are whole for a moment, and what sums them
    activations: int
    saving: int  # the host's copy of a checkpoint that is being written
    process: int  # interpreter and libraries
    total: int  # on the device
    host: int  # in the host's memory; on a CPU, everything
    tokens: int  # of a row
    flops: float  # of a step of one process
    step_seconds: float
    seconds: float
    cost: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def plan(
    recipe: Recipe,
    sources: Sources,
    *,
    gpus: int = 1,
    nodes: int = 1,
    device: str = "cuda",
    peak: float = 989e12,
    mfu: float = 0.4,
    price: float = 0.0,
) -> list[StageEstimate]:
    """What every stage of the recipe needs on each of ``gpus`` processes on ``nodes`` machines.

    ``peak`` is the device's rate in FLOP/s and ``mfu`` the share of it that training reaches; ``price`` is of one
    device for an hour. Raises ``ValueError`` for processes that do not divide as the recipe shards."""
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise ValueError(f"{gpus} processes do not divide among {nodes} machines")
    if recipe.precision == "auto":  # every GPU of the table has units for bfloat16
        recipe = replace(recipe, precision=fastest_precision("cpu") if device == "cpu" else "bf16")
    needs = []
    for stage in recipe.stages:
        model = _prepared(recipe, stage)
        row = _row(recipe, stage, sources, model)
        work = _measure(model, row.batch, recipe, stage)
        accumulate = stage.limits.rows_of(gpus)
        flops = work.flops * accumulate
        seconds = flops / (peak * mfu)
        memory = _memory(model, recipe, stage, work, gpus, gpus // nodes, device)
        needs.append(
            StageEstimate(
                stage=stage.name,
                **memory,
                tokens=row.stats.tokens,
                flops=flops,
                step_seconds=seconds,
                seconds=seconds * stage.steps,
                cost=seconds * stage.steps * gpus * price / 3600,
            )
        )
    return needs


def flops(recipe: Recipe, stage: Stage, batch: Batch) -> float:
    """The work of one row of a stage, forward and backward; recomputed products count again."""
    return _measure(_prepared(recipe, stage), batch.to("cpu"), recipe, stage).flops


def _prepared(recipe: Recipe, stage: Stage) -> Trainable:
    """The model as one process trains it, on the meta device."""
    name, config = configs.config_from_json(recipe.model)
    model = store.create(name, config, device="meta")
    lora.inject(model, recipe.lora, recipe.seed)
    trained = ever_trained(model, recipe.stages)
    if recipe.engine.frozen == "int8":
        to_int8(model.blocks(), trained)
    freeze(model, stage.train)
    spread(model, replace(recipe.engine, shard="none", compile=None), recipe.precision, "meta", trained)
    return model


def _row(recipe: Recipe, stage: Stage, sources: Sources, model: Trainable) -> Any:
    """The fullest of a few rows of the stage's own data."""
    loader = stage_loader(replace(recipe, streams=1, workers=0), stage, model, sources)
    return max((row for _, row in zip(range(4), loader)), key=lambda row: row.stats.tokens)


@dataclass(frozen=True)
class _Work:
    activations: int  # the most bytes that are neither weights nor gradients
    together: int  # the most bytes of activations and gradients at one time, when gradients begin empty
    flops: float


def _measure(model: Trainable, batch: Any, recipe: Recipe, stage: Stage) -> _Work:
    """One row through the network, forward and backward."""
    if recipe.precision == "bf16":
        model.to(torch.bfloat16)  # autocast knows no meta tensors; activations have two bytes this way too
    hollow = Hollow(model)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: hollow.set_aside(p.numel() * p.element_size()))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with hollow, fused():
            loss = combine(model(batch, Noise(recipe.seed, 0)), stage.loss, model.counts(batch))
            if loss.requires_grad:
                loss.backward()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{model.family} cannot be planned: its forward asks for computed values: {error}") from error
    for hook in hooks:
        hook.remove()
    model.float()
    return _Work(hollow.most, hollow.peak, float(hollow.flops.total()))


def _memory(
    model: Trainable, recipe: Recipe, stage: Stage, work: _Work, gpus: int, local: int, device: str
) -> dict[str, int]:
    """Bytes of one process by what holds them."""
    engine, config = recipe.engine, stage.optimizer
    ways = 1 if engine.shard == "none" else gpus if engine.shard == "full" else local
    half = 2 if recipe.precision == "bf16" else 4
    ever = ever_trained(model, recipe.stages)
    freeze(model, stage.train)
    blocks = [_size(b.parameters()) for b in model.trunk()] if ways > 1 else []
    inside = {p for b in model.trunk() for p in b.parameters()} if ways > 1 else set()
    every = set(model.parameters())
    exact = ever | always_frozen(model)
    kept, root = every - inside - ever, _size(ever - inside)
    trained = [p for p in every if p.requires_grad]
    slots = _slots(model, trained, config.name)

    def held(some: Iterable[nn.Parameter]) -> int:
        whole = 4 if engine.frozen == "fp32" else 2  # of what no stage trains
        return sum(p.numel() * (1 if p.dtype == torch.int8 else 4 if p in exact else whole) for p in some)

    weights = held(every - kept) // ways + held(kept) + sum(b.numel() * b.element_size() for b in model.buffers())
    gradients = 4 * _size(trained) // ways
    optimizer, average = 4 * slots // ways, (4 * _size(trained) // ways if stage.ema else 0)
    gathered = 0
    if ways > 1:  # two blocks (one ahead), the gradients of one twice, and what is gathered together
        largest = max(blocks, default=0)
        gathered = 2 * half * largest + 8 * largest + 4 * root + 4 * _size(p for p in trained if p not in inside)
    elif gpus > 1:
        gathered = gradients  # the flat copy that is summed
    alike = Counter(tuple(p.shape) for p in _matrices(model, trained)) if config.name == "muon" else Counter()
    together = {shape: min(n, optim.at_once(*shape)) for shape, n in alike.items()}
    update = max((5 * 4 * n * rows * columns // ways for (rows, columns), n in together.items()), default=0)
    micro = stage.limits.rows_of(gpus)
    during = work.together if micro == 1 and ways == 1 else work.activations + gradients
    activations = max(during, gradients + update) - gradients
    state = weights + optimizer + average
    saving = state if engine.async_save else 0
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    here = saving + process  # always the host's
    on_host = here + (weights + gradients + optimizer + average if engine.offload or device == "cpu" else 0)
    total = state + gradients + gathered + activations
    if device == "cpu":
        on_host = total + here
    elif engine.offload:
        total -= weights + gradients + optimizer + average
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "average": average,
        "gathered": gathered,
        "activations": activations,
        "saving": saving,
        "process": process,
        "total": total,
        "host": on_host,
    }


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _matrices(model: Trainable, trained: list[nn.Parameter]) -> list[nn.Parameter]:
    inside = {id(p) for b in model.blocks() for p in b.parameters() if p.dim() == 2}
    return [p for p in trained if id(p) in inside]


def _slots(model: Trainable, trained: list[nn.Parameter], name: str) -> int:
    """Numbers that the optimizer keeps: two for each of AdamW's, one for each of Muon's."""
    muon = _size(_matrices(model, trained)) if name == "muon" else 0
    return 2 * _size(trained) - muon
