"""Options that several verbs take, each declared once, and the class that verbs are declared with.

Nothing here imports torch, numpy or rich before a verb runs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from diptych.generation.engine import Engine

OK, BAD, MEMORY, INTERRUPTED = 0, 2, 3, 4  # exit codes; 1 is a bug


class Group(TyperGroup):
    """A group of verbs: without one it prints its help, and ``default`` is the verb of a command that names none."""

    default: str | None = None

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # vendored click
        """Parses ``--help`` in place of no arguments, and adds ``default`` where the first argument is not a verb."""
        if not args:
            args = ["--help"]
        if self.default and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            self.refuse_misspelt(ctx, args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]  # vendored click
        """The group's own options. Flags that were not given are False: typer imports pydantic to convert None."""
        parameters = super().get_params(ctx)  # type: ignore[arg-type]  # vendored click
        for parameter in parameters:
            parameter.default = False if parameter.default is None else parameter.default
        return parameters

    def refuse_misspelt(self, ctx: typer.Context, word: str) -> None:
        """Fails where the first word is almost a verb and no file: ``evaluate lst`` means no model of that name."""
        from diptych.core.errors import nearest

        if (hint := nearest(word, self.commands)) and "/" not in word and not Path(word).exists():
            ctx.fail(f"No such command {word!r}{hint}")


class Verbs(typer.Typer):
    """A typer application whose verbs show examples and may take their options in dataclasses."""

    def __init__(self, help: str | None = None, cls: type[Group] = Group, **settings: Any) -> None:
        super().__init__(
            help=help,
            cls=cls,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
            **settings,
        )

    def verb(self, name: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declares a verb; its docstring is its help, and the help ends with the examples."""

        def declare(handler: Callable[..., Any]) -> Callable[..., Any]:
            self.command(name, epilog="\b\nexamples:\n" + "\n".join(f"  {line}" for line in examples))(spread(handler))
            return handler

        return declare


def spread(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with each parameter that is a dataclass replaced by the fields of the dataclass, which typer then
    reads as options; the handler gets the dataclass back."""
    hints = get_type_hints(handler, include_extras=True)
    groups: dict[str, type] = {}
    parameters = []
    for parameter in inspect.signature(handler).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = kind  # type: ignore[assignment]  # is_dataclass also accepts instances
        inner = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                parameter.replace(
                    name=field.name, annotation=inner[field.name], default=default, kind=parameter.KEYWORD_ONLY
                )
            )

    @wraps(handler)
    def call(**given: Any) -> Any:
        given = {name: expanded(value) for name, value in given.items()}
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        return handler(**given)

    del call.__wrapped__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect and typer read
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def expanded(value: Any) -> Any:
    """A path, or a list of paths, with ``~`` expanded: a shell leaves it in ``--out=~/x``. Other values stay."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


def names_in(module: str, table: str) -> Callable[[str], list[str]]:
    """Completion of a value: the keys of a table that start with what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in getattr(import_module(module), table) if name.startswith(incomplete)]

    return complete


complete_models = names_in("diptych.models.table", "SIZES")
complete_recipes = names_in("diptych.recipes", "RECIPES")
complete_benchmarks = names_in("diptych.evaluation.benchmarks.table", "TABLE")
complete_studies = names_in("diptych.studies.table", "STUDIES")


def address_of(text: str | Path) -> Path:
    """The path of a value that may be an address. Fails with the reason for one that is none."""
    from diptych.machine.addresses import address

    try:
        return address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


MODEL_HELP = "a name that `diptych models` lists, a model, run or published folder, or org/name"

Dtype = Literal["fp32", "bf16", "fp16"]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_models)]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="the model whose files are used where a published folder lacks them"),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or mps")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="of the weights (default: as published)")]
QuantizeOption = Annotated[
    Literal["int8"] | None, typer.Option("--quantize", help="round the weights of the blocks to eight bits")
]
PresetOption = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="the settings of a published entry point, such as demo or gedit")
]
ConfigOption = Annotated[
    list[str] | None,
    typer.Option("--config", metavar="PATH=VALUE", help="change a leaf of the model's config; may be repeated"),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="do only share I (from 0) of N (default: torchrun's, else all)"),
]
SeedOption = Annotated[int, typer.Option("--seed", help="seed of every random draw")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
CatalogOption = Annotated[
    str | None, typer.Option("--catalog", metavar="FILE", help="YAML file that says where your own data sets are")
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="a name that `diptych recipes` lists, or a file", autocompletion=complete_recipes
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="cut or stretch all stages to N steps, in proportion")
]
EncodedOption = Annotated[
    str | None,
    typer.Option(
        "--encoded", metavar="DIR", help="read data sets that `diptych data precompute` wrote in place of the originals"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="change any leaf of the recipe; may be repeated"),
]
DataSetsArgument = Annotated[list[str], typer.Argument(metavar="NAME", help="data sets: embedded, or of the catalog")]
SideOption = Annotated[int, typer.Option("--size", metavar="PIXELS", help="side of embedded pictures")]
LayoutOption = Annotated[
    str,
    typer.Option("--layout", metavar="MODEL", help="the model whose layout is used", autocompletion=complete_models),
]


def config_changes(items: Iterable[str] | None, option: str = "--config", form: str = "PATH=VALUE") -> dict[str, Any]:
    """What ``--config`` (or another option of its kind) changes, with values read as JSON where they can be."""
    from diptych.core.leaves import parse_leaf

    return {path: parse_leaf(text, path) for path, text in pairs(items, option, form).items()}


def interval(text: str) -> tuple[float, float]:
    """(low, high) of "LOW,HIGH"."""
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise ValueError(f"--interval takes LOW,HIGH, such as 0.4,1, not {text!r}") from None


@dataclasses.dataclass(frozen=True)
class Loading:
    """Which model to load, and how."""

    model: ModelArgument
    base: BaseOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    quantize: QuantizeOption = None
    preset: PresetOption = ""
    config: ConfigOption = None

    def load(self) -> Engine:
        """The engine of the model that the options name. Raises ``ValueError`` as ``diptych.load``."""
        from diptych.generation.engine import load

        options = (self.device, self.dtype, self.base, self.quantize, self.preset, config_changes(self.config))
        return load(self.model, *options)


@dataclasses.dataclass(frozen=True)
class Watching:
    """What is recorded of a training besides its metrics."""

    profile: Annotated[
        int, typer.Option("--profile", metavar="STEPS", help="trace so many steps into DIR/trace.json")
    ] = 0
    track: Annotated[Literal["trackio", "wandb"] | None, typer.Option("--track", help="log there too")] = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; a model takes those that its sampler has."""

    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="denoising steps (flow matching)")
    ] = None
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", metavar="SCALE", help="guidance on the text")
    ] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="of image codes (SynerGen-VL)")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="sample among the K likeliest codes")] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="sample among the likeliest codes of total mass P")
    ] = None

    guidance_interval: Annotated[
        str | None, typer.Option("--interval", metavar="LOW,HIGH", help="times in (LOW, HIGH] at which guidance acts")
    ] = None
    timestep_shift: Annotated[
        float | None, typer.Option("--shift", metavar="S", help="above 1: more of the steps near noise")
    ] = None
    renorm: Annotated[
        Literal["none", "global", "channel", "text_channel"] | None,
        typer.Option("--renorm", help="how the guided velocity is scaled back"),
    ] = None
    renorm_min: Annotated[
        float | None, typer.Option("--renorm-min", metavar="X", help="the least factor of --renorm")
    ] = None
    seeding: Annotated[
        Literal["address", "published"] | None,
        typer.Option("--seeding", help="published: draw the picture that the published code draws for a seed (BAGEL)"),
    ] = None
    setting: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME=VALUE", help="any other setting of the sampler; may be repeated"),
    ] = None

    def given(self, engine: Any) -> dict[str, Any]:
        """The settings that were given; the model's own stand for the others. Raises ``ValueError`` for one that the
        model's sampler does not have."""
        flags = {f.name: flag for f in dataclasses.fields(self) if (flag := FLAGS.get(f.name))}
        given = {name: value for name in flags if (value := getattr(self, name)) is not None}
        if self.guidance_interval is not None:
            given["guidance_interval"] = interval(self.guidance_interval)
        known = vars(engine.settings({}))
        if unknown := [flags[name] for name in given if name not in known]:
            has = [flag for name, flag in flags.items() if name in known]
            raise ValueError(
                f"{engine.name} does not draw by {', '.join(unknown)}; it takes {', '.join(has) or 'none'}"
            )
        more = config_changes(self.setting, "--setting", "NAME=VALUE")
        if twice := sorted(given.keys() & more.keys()):
            raise ValueError(f"{flags[twice[0]]} and --setting {twice[0]} are the same; give one")
        return given | more


@dataclasses.dataclass(frozen=True)
class EditSampling(Sampling):
    """The sampler of an edit, which is also guided by the edited picture."""

    image_guidance_scale: Annotated[
        float | None, typer.Option("--image-guidance", metavar="SCALE", help="guidance on the source picture")
    ] = None
    source_share: Annotated[
        float | None,
        typer.Option("--source-share", metavar="X", help="start from a mix with this share of the source (Cheers)"),
    ] = None


FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "image_guidance_scale": "--image-guidance",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "guidance_interval": "--interval",
    "timestep_shift": "--shift",
    "renorm": "--renorm",
    "renorm_min": "--renorm-min",
    "seeding": "--seeding",
    "source_share": "--source-share",
}


@dataclasses.dataclass(frozen=True)
class Planning:
    """What a picture is kept away from, and whether it is planned first."""

    negative_prompt: Annotated[
        str, typer.Option("--negative", metavar="TEXT", help="guidance goes away from this text")
    ] = ""
    think: Annotated[bool, typer.Option("--think", help="write a plan first and draw from it")] = False
    think_tokens: Annotated[
        int | None, typer.Option("--think-tokens", metavar="N", help="longest plan (default: 999, or the preset's)")
    ] = None

    def given(self, engine: Any) -> dict[str, Any]:
        """Arguments of ``Engine.generate`` and ``Engine.edit``."""
        if self.think_tokens is not None and not self.think:
            raise ValueError("--think-tokens needs --think")
        think = engine.thinking(self.think)
        if think and self.think_tokens is not None:
            think = dataclasses.replace(think, max_new_tokens=self.think_tokens)
        return {"negative_prompt": self.negative_prompt, "think": think or False}


@dataclasses.dataclass(frozen=True)
class Answering:
    """How an answer is sampled."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="longest answer")] = 64
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token")] = 0.0
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="sample among the likeliest tokens of total mass P")
    ] = 1.0
    think: Annotated[bool, typer.Option("--think", help="reason in <think> tags before the answer")] = False
    seed: SeedOption = 0

    def given(self) -> dict[str, Any]:
        """Arguments of ``Engine.ask`` and ``Engine.stream``."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How many pictures are drawn, how large, and where they go."""

    n: Annotated[int, typer.Option("-n", metavar="N", help="pictures; picture i has seed SEED + i")] = 1
    size: Annotated[str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="in pixels")] = None
    seed: SeedOption = 0
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            parser=address_of,
            help="picture file; several pictures get -0, -1 ... appended",
        ),
    ] = Path("picture.png")
    as_json: JsonOption = False

    def check(self) -> tuple[int, int] | None:
        """(width, height), if any. Raises ``ValueError`` for a bad size, and for a file that cannot be written without
        the loss of another, before a model is loaded."""
        from diptych.data.written import check_picture_path

        for file in self.files(self.n):
            check_picture_path(file)
        return pixels(self.size) if self.size else None

    def files(self, n: int) -> list[Path]:
        """The files of ``n`` pictures."""
        from diptych.data.written import numbered

        return numbered(self.out, n)


@dataclasses.dataclass(frozen=True)
class DrawingEdit(Drawing):
    """The same of an edit, whose picture is not named as the one that ``generate`` drew."""

    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="picture file; several pictures get -0, -1 ... appended")
    ] = Path("edited.png")


def pixels(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"{text!r} is not WIDTHxHEIGHT, such as 64x64")
    return int(width), int(height)


def pairs(items: Iterable[str] | None, option: str, form: str) -> dict[str, str]:
    """``KEY=VALUE`` items as a dict. Raises ``ValueError`` for an item without a sign, and for a key given twice."""
    result: dict[str, str] = {}
    for item in items or ():
        key, sign, value = item.partition("=")
        if not sign:
            raise ValueError(f"{option} takes {form}, not {item!r}")
        if key in result:
            raise ValueError(f"{option} {key} is given twice: {result[key]!r} and {value!r}")
        result[key] = value
    return result


def changes(items: Iterable[str] | None) -> dict[str, str]:
    """The leaves of a recipe that ``--set`` changes."""
    return pairs(items, "--set", "PATH=VALUE")


def listed(items: Iterable[str] | None) -> list[str]:
    """The values of an option that takes a list: separated by commas, or the option repeated."""
    return [value for item in items or () for value in item.split(",") if value]


def numbers(items: Iterable[str] | None, option: str) -> list[int]:
    """The whole numbers of an option that takes a list of them."""
    values = listed(items)
    if wrong := [value for value in values if not value.removeprefix("-").isdecimal()]:
        raise ValueError(f"{option} takes whole numbers separated by commas, not {wrong[0]!r}")
    return [int(value) for value in values]


def at_least_one(**options: int | None) -> None:
    """Raises ``ValueError`` for an option whose number is below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def show_table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table. Names are never cut: a pipe gets lines as long as they need, and on a terminal all
    columns but the first wrap."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # text in brackets, such as '.[hf]', is text
    if not console.is_terminal:
        console = Console(width=10_000, markup=False)
    table = Table(title=title)
    for number, name in enumerate(head):
        widest = 100 if number == len(head) - 1 else None
        table.add_column(name, no_wrap=number == 0, overflow="fold", max_width=widest)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def show_skipped(reasons: dict[str, Any]) -> None:
    """One line for every row that was skipped."""
    for row, reason in reasons.items():
        print(f"skipped {row}: {reason}")
