"""A complete run as frozen, validated data, and its JSON form: the ``recipe.json`` of a run can be run again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diptych.core.leaves import parse_leaf, set_leaf, shortened
from diptych.data.mixture import BUFFER, Order
from diptych.models import configs, store

CHANGEABLE = (  # what a resumed run may change; * stands for one part of a path, ** for any
    "workers",
    "checkpoint_every",
    "keep",
    "skip_limit",
    "minutes",
    "catalog",
    "encoded",
    "folders**",
    "engine.shard",
    "engine.recompute",
    "engine.compile",
    "engine.offload",
    "engine.async_save",
    "engine.timeout",
    "stages.*.steps",
    "stages.*.train.**",
    "stages.*.loss.**",
    "stages.*.schedule.*",
    "stages.*.optimizer.clip",
    "stages.*.optimizer.weight_decay",
)
FREE = (  # mappings of a recipe whose keys are the user's
    *("data", "train", "loss", "dropout", "reading", "init", "folders", "lora"),
    *("rewards", "sampling", "reference", "dev"),
)


@dataclass(frozen=True)
class Schedule:
    """The factor on every learning rate: linear warm-up, then constant or cosine, then a linear decay to ``floor`` over
    the last ``decay`` share of the stage."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    shape: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    decay: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.decay <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"a schedule needs warmup >= 0 and decay, floor in [0, 1]: {self}")


@dataclass(frozen=True)
class Optimizer:
    """AdamW, AdamW with states of eight bits (on a GPU, through bitsandbytes), or Muon on the blocks' matrices with
    AdamW on everything else."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95  # muon
    clip: float = 1.0  # largest gradient norm


@dataclass(frozen=True)
class Limits:
    """The budgets of one packed row, and how many rows are added up for a step: ``accumulate`` on every process, or
    ``rows`` on all of them together, however many there are."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    tokens: int = 4096
    pictures: int = 256
    accumulate: int = 1
    rows: int | None = None
    samples: int | None = None  # of a row, at most; None: as many as fit

    def __post_init__(self) -> None:
        if min(self.tokens, self.pictures, self.accumulate, self.rows or 1) < 1:
            raise ValueError(f"tokens, pictures, accumulate and rows must be at least 1: {self}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples of a row must be at least 1: {self}")
        if self.rows and self.accumulate != 1:
            raise ValueError(f"give accumulate (rows of a process) or rows (of all processes), not both: {self}")

    def rows_of(self, processes: int) -> int:
        """How many rows one of the processes adds up. Raises ``ValueError`` where ``rows`` do not divide."""
        if self.rows is None:
            return self.accumulate
        if self.rows % processes:
            raise ValueError(f"{self.rows} rows a step do not divide among {processes} processes")
        return self.rows // processes


@dataclass(frozen=True)
class EngineConfig:
    """How a run uses its processes and its memory. Results differ by rounding only.

    ``shard``      parameters, gradients, optimizer and average over the processes (FSDP2): ``none`` (every process
                   holds all), ``full``, or ``hybrid`` (within each machine); one process holds all in any case
    ``recompute``  activations of the blocks in the backward pass: ``none``, ``selective`` (all but products), ``full``
    ``compile``    a back end of torch.compile (``inductor``) for every block
    ``frozen``     dtype of the weights that no stage trains: ``fp32``, ``bf16`` or ``int8`` (the blocks' linear
                   layers, the rest in bf16; not sharded); both compute in bf16 too
    ``offload``    shards live in the memory of the host
    ``async_save`` checkpoints are written while training goes on, from a copy in the memory of the host
    ``timeout``    minutes that a process waits for the others before it ends with an error
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    shard: Literal["none", "full", "hybrid"] = "none"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: str | None = None
    frozen: Literal["fp32", "bf16", "int8"] = "fp32"
    offload: bool = False
    async_save: bool = True
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"engine.timeout must be positive (minutes), not {self.timeout}")


@dataclass(frozen=True)
class SelfCondition:
    """How a picture without words is drawn from itself (IOMM): it is read with a share ``masked`` of its tokens blank,
    beside the words ``prompt``; without any, beside words of the family's own."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    masked: float
    prompt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.masked <= 1:
            raise ValueError(f"the masked share of a picture's tokens must lie in [0, 1], not {self.masked}")


@dataclass(frozen=True)
class Reward:
    """How a stage trains from rewards (docs/rewards.md). Its data sets are asks: the model draws or answers each
    ``group`` times, rewards judge what it made, and what is better than its group becomes more likely.

    ``rewards``      name -> weight of a reward (``diptych.recipes.rewards``)
    ``group``        rollouts of an ask
    ``asks``         asks of a step, over all processes
    ``sampling``     changes of the model's own drawing settings for rollouts
    ``temperature``  of words; ``max_new_tokens`` is their limit
    ``draws``        noise levels at which a picture is trained
    ``updates``      optimizer steps on the rollouts of a step
    ``beta``         DiffusionNFT: how far the implicit policies lie from the old one (arXiv 2509.16117, Eq. 5)
    ``clip``         token GRPO: ratios outside 1 - clip and 1 + clip get no gradient
    ``largest``      DiffusionNFT: advantages are clipped to this size
    ``std``          what advantages are divided by: the deviation of all rollouts of a step, of the group, or nothing
    ``reference``    loss term -> weight of the distance to the weights that the stage began with
    ``follow``       the weights that make rollouts follow the trained ones: after every step
                     old = d old + (1 - d) new, d = min(rise (step - flat), most) with (flat, rise, most)
    ``dev``          data set -> weight: asks that are only scored, at the model's own settings, at every checkpoint
    ``dev_asks``     how many of them
    ``patience``     checkpoints without a better dev score after which the stage ends; 0: never
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    rewards: dict[str, float]
    group: int = 16
    asks: int = 16
    sampling: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    max_new_tokens: int = 64
    draws: int = 2
    updates: int = 1
    beta: float = 1.0
    clip: float = 0.2
    largest: float = 5.0
    std: Literal["batch", "group", "none"] = "batch"
    reference: dict[str, float] = field(default_factory=dict)
    follow: tuple[int, float, float] = (0, 0.0, 0.0)
    dev: dict[str, float] = field(default_factory=dict)
    dev_asks: int = 96
    patience: int = 0

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("a stage with 'reward' needs at least one reward in 'rewards'")
        if bad := {name: w for name, w in self.rewards.items() if not math.isfinite(w) or w == 0}:
            raise ValueError(f"the weight of a reward must be finite and not 0: {bad}")
        if self.group < 2:
            raise ValueError(f"reward.group must be at least 2 (rollouts are compared), not {self.group}")
        if min(self.asks, self.draws, self.updates, self.max_new_tokens, self.dev_asks) < 1 or self.patience < 0:
            raise ValueError(f"asks, draws, updates, max_new_tokens and dev_asks must be at least 1: {self}")
        if not (self.temperature > 0 and self.beta > 0 and self.clip > 0 and self.largest > 0):
            raise ValueError(f"temperature, beta, clip and largest must be positive: {self}")
        flat, rise, most = self.follow
        if flat < 0 or rise < 0 or not 0 <= most < 1:
            raise ValueError(f"reward.follow must be (flat >= 0, rise >= 0, most in [0, 1)), not {self.follow}")
        if bad := {name: w for name, w in self.reference.items() if not (math.isfinite(w) and w >= 0)}:
            raise ValueError(f"the weights of reward.reference must be at least 0: {bad}")

    def decay(self, step: int) -> float:
        """How much of the old weights stays after a step of the stage."""
        flat, rise, most = self.follow
        return 0.0 if step < flat else min(rise * (step - flat), most)


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    ``train`` maps part name -> learning rate; a part that is not named is frozen, in eval mode and without optimizer
    state. ``data`` maps data set name -> weight (of samples). ``loss`` maps loss term -> weight. ``dropout`` maps a
    condition ("text", "image") -> how often a sample that draws is laid out without it, for guidance; "image|text" is
    how often a sample that lost its text loses its pictures too, and "text*" how often each text is left out, by a
    draw of its own. ``reading`` maps a data set -> the size rule at which its pictures are read (BAGEL:
    ``Config.seen``); the model's own for others. ``prompts`` maps a data set -> how its requests are worded: "{}"
    stands for the row's own text; a prompt without it is the question about a picture that comes without one.
    ``self_condition`` says what a picture without words is drawn from; by default from nothing.
    how often a sample that lost its text loses its pictures too.
    ``self_condition`` says what a picture without words is drawn from; by default from nothing. With ``reward`` the
    data sets are asks, and the stage trains from rewards.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    steps: int
    train: dict[str, float]
    data: dict[str, float]
    loss: dict[str, float]
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    limits: Limits = Limits()
    dropout: dict[str, float] = field(default_factory=dict)
    ema: float | None = None  # decay of the weight average that the stage hands on, or that is released
    ema_warmup: bool = True  # the decay rises to ``ema``; False: it is ``ema`` from the first step on
    self_condition: SelfCondition | None = None
    reading: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"stage {self.name!r} needs at least one step, not {self.steps}")
        if not self.train:
            raise ValueError(f"stage {self.name!r} trains nothing; name at least one part in 'train'")
        for name in ("reading", "prompts"):
            if unknown := sorted(getattr(self, name).keys() - self.data.keys()):
                raise ValueError(f"stage {self.name!r}: {name} has {unknown[0]!r}, which is not among its data")
        if self.reward and (self.dropout or self.self_condition):
            raise ValueError(f"stage {self.name!r} trains from rewards: it takes no dropout and no self_condition")
        if self.reward and (unknown := sorted(self.reward.reference.keys() - self.loss.keys())):
            raise ValueError(f"reward.reference names {unknown[0]!r}; the stage weighs {', '.join(self.loss)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run: the model, where frozen parts come from, the stages, the seed.

    ``init`` maps a module of the model -> what it starts from: ``model`` (a folder or shipped name: its module of the
    same path), ``model#path`` (another path) or ``transformers:model`` (a folder of transformers or an ``org/name`` of
    the hub, for a decoder or a module that is one of theirs). The key ``model`` takes everything over.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    model: dict[str, Any]  # family and the fields of its Config, as in config.json
    stages: tuple[Stage, ...]
    seed: int = 0
    size: int = 64  # pixels on a side of the embedded pictures
    init: dict[str, str] = field(default_factory=dict)
    catalog: str | None = None
    folders: dict[str, str] = field(default_factory=dict)  # data set name -> a plain folder of pictures in its place
    encoded: str | None = None  # folder of ``diptych data precompute``; its data sets stand in for those of their names
    workers: int = 1
    streams: int = 16
    order: Order = "global"  # of each data set's rows: shuffled as a whole, or by ``shards`` and in windows
    buffer: int = BUFFER  # rows of a window
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # auto: the faster one on the machine that trains
    engine: EngineConfig = EngineConfig()
    lora: dict[str, int] = field(default_factory=dict)  # part -> rank: its linear layers are adapted, not trained
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints that stay
    skip_limit: int | float = 100  # bad samples before the run stops: a count, or (below 1) a share of those drawn
    minutes: float | None = None  # of wall clock for the whole run; each stage gets its share by ``steps``

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"recipe {self.name!r} has no stages")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, -2**63 to 2**63 - 1, not {self.seed}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, not {self.minutes}")
        if self.checkpoint_every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint_every and keep must be at least 1: {self.checkpoint_every}, {self.keep}")
        if self.buffer < 1:
            raise ValueError(f"buffer must be at least 1 row, not {self.buffer}")
        if self.engine.frozen != "fp32" and self.precision != "bf16":
            raise ValueError(f"engine.frozen {self.engine.frozen} needs precision bf16: a product has one dtype")
        if self.engine.frozen == "int8" and self.engine.shard != "none":
            raise ValueError(f"int8 weights are not sharded: engine.shard {self.engine.shard} needs fp32 or bf16")
        if len({s.name for s in self.stages}) != len(self.stages):
            raise ValueError(f"recipe {self.name!r} has two stages of one name: {[s.name for s in self.stages]}")
        named = {name.partition("#")[0].removesuffix("/pictures") for s in self.stages for name in s.data}
        if unknown := sorted(self.folders.keys() - named):
            raise ValueError(f"recipe {self.name!r} has no data set {unknown[0]!r}; it has {', '.join(sorted(named))}")
        configs.config_from_json(self.model)  # raises for an unknown family or field

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(s.steps for s in self.stages)

    def on(self, model: str | Path) -> Recipe:
        """The same recipe as post-training of a model that there is: a folder or a name that ships."""
        return replace(self, model=store.read_config(model), init={"model": str(model)})

    def to_json(self) -> str:
        """The recipe as JSON text, which ``from_json`` reads."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, where: str = "recipe") -> Recipe:
        """The recipe of a JSON text. Raises ``ValueError`` with line or field, the bad value and the reason."""
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists ...
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        return Recipe.from_dict(row, where)

    @staticmethod
    def from_dict(row: Any, where: str = "recipe") -> Recipe:
        """The recipe of a mapping. Raises ``ValueError`` naming every unknown or bad field."""
        try:
            return TypeAdapter(Recipe).validate_python(row)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {shortened(e['input'])})" for e in error.errors()
            ]
            raise ValueError(f"{where}: " + "; ".join(lines)) from error

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """The recipe of a .json or .yaml file."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                row = yaml.safe_load(path.read_text())
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark else 0
                raise ValueError(f"{path}:{line}: not valid YAML: {error.problem}") from error
            except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, a 13th month ...
                reason = " ".join(str(error).split())
                raise ValueError(f"{path}: not valid YAML: {reason}") from error
            return Recipe.from_dict(row, str(path))
        return Recipe.from_json(path.read_text(), str(path))

    def override(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with leaves changed by dotted path, as on the command line: ``{"stages.0.steps": "100"}``.

        Values are read as JSON where they can be. Raises ``ValueError`` for a path that does not exist."""
        row = json.loads(self.to_json())
        for path, text in changes.items():
            set_leaf(row, path, parse_leaf(text, path), free=FREE)
        return Recipe.from_dict(row, "overridden recipe")

    def resumed_with(self, changes: Mapping[str, str], stage: int = 0, done: int = 0) -> Recipe:
        """The recipe of a run that continues in ``stage`` after ``done`` of its steps, with leaves changed as in
        ``override``.

        Raises ``ValueError``, naming the leaf, for a change that would contradict what was trained so far: anything but
        ``CHANGEABLE``, other parts or losses, finished stages, and fewer steps than are done."""
        new = self.override(changes)
        before, after = leaves(self), leaves(new)
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) == after.get(path) and (path in before) == (path in after):
                continue
            if not any(_matches(path, pattern) for pattern in CHANGEABLE):
                raise ValueError(f"a resumed run cannot change {path!r}; it can change {', '.join(CHANGEABLE)}")
            keys = path.split(".")
            if keys[0] == "stages" and keys[2] in ("train", "loss") and (path in before) != (path in after):
                raise ValueError(
                    f"a resumed run changes values in {'.'.join(keys[:3])!r}, not which there are: {path!r}"
                )
            if keys[0] == "stages" and int(keys[1]) < stage:
                raise ValueError(
                    f"a resumed run cannot change {path!r}: stage {self.stages[int(keys[1])].name!r} is finished"
                )
        if new.stages[stage].steps < done:
            raise ValueError(
                f"stage {new.stages[stage].name!r} cannot have {new.stages[stage].steps} steps: {done} are done"
            )
        return new

    def with_steps(self, steps: int) -> Recipe:
        """The recipe cut or stretched to ``steps`` in all, every stage in proportion (at least one step each)."""
        if steps < len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need at least as many steps, not {steps}")
        total, out, used = self.steps, [], 0
        for i, stage in enumerate(self.stages):
            left = len(self.stages) - 1 - i
            share = steps - used if not left else min(max(1, round(stage.steps * steps / total)), steps - used - left)
            warmup = min(stage.schedule.warmup, share // 4)
            out.append(replace(stage, steps=share, schedule=replace(stage.schedule, warmup=warmup)))
            used += share
        return replace(self, stages=tuple(out))


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern of ``CHANGEABLE`` matches a dotted path."""
    regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^.]*")
    return re.fullmatch(regex, path) is not None


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a dataclass, dict or list by dotted path: what ``override`` can change."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, str)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        return {
            k: v
            for key, inner in value.items()
            for k, v in leaves(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}
