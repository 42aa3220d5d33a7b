"""Verbs that use a model: generate, edit, show, ask, chat, serve, export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diptych.cli.options import (
    Answering,
    BaseOption,
    ConfigOption,
    DeviceOption,
    Drawing,
    DrawingEdit,
    Dtype,
    DtypeOption,
    EditSampling,
    JsonOption,
    Loading,
    ModelArgument,
    Planning,
    PresetOption,
    QuantizeOption,
    Sampling,
    ShardOption,
    Verbs,
    address_of,
    complete_models,
    config_changes,
    pixels,
)
from diptych.machine.extras import install

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="a picture file")]


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    app.verb(
        "generate",
        "diptych generate bagel/tiny 'two blue stars' -n 4 --seed 7",
        "diptych generate bagel/tiny 'a cat' --size 64x64 --out cat.png",
        "diptych generate bagel/7b-mot 'a cat' --preset demo --think --seeding published",
        "diptych generate bagel/tiny --prompts prompts.txt --out pictures --shard 0/4",
    )(generate)
    app.verb(
        "edit",
        "diptych edit bagel/tiny scene.png 'make the star blue'",
        "diptych edit omnigen2/3b-4b cat.png 'the cat on the sofa' --also sofa.png",
    )(edit)
    app.verb("show", "diptych show picture.png", "diptych show picture.png --json")(show)
    app.verb("ask", "diptych ask bagel/tiny scene.png 'how many stars are there?'")(ask)
    app.verb("chat", "diptych chat bagel/tiny")(chat)
    app.verb(
        "serve",
        "diptych serve bagel/tiny",
        "diptych serve bagel/tiny runs/mine --port 8080 --runs runs",
        "diptych serve bagel/tiny --host 0.0.0.0 --api-key-file keys.txt --rate 60",
    )(serve)
    app.verb(
        "export",
        "diptych export runs/mine model --dtype bf16",
        "diptych export runs/mine model --format published",
        "diptych export bagel/tiny parts --format hf",
        "diptych export bagel/tiny-published model --format published --fresh",
        "diptych export omnigen2/3b-4b tuned --adapter pytorch_lora_weights.safetensors",
    )(export)


def generate(
    loading: Loading,
    drawing: Drawing,
    sampling: Sampling,
    planning: Planning,
    prompt: Annotated[str | None, typer.Argument(help="what to draw")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            parser=address_of,
            help="draw each prompt of a .txt or .jsonl into --out DIR",
        ),
    ] = None,
    shard: ShardOption = None,
) -> None:
    """Draw pictures of a prompt, or of a file of prompts."""
    if (prompt is None) == (prompts is None):
        raise ValueError("generate needs a prompt or --prompts FILE, not both")
    if prompts is not None:
        if planning != Planning():
            raise ValueError("--negative and --think are for one prompt, not for --prompts FILE")
        generate_prompts(loading, prompts, shard, drawing, sampling)
        return
    size = drawing.check()
    engine = loading.load()
    options = planning.given(engine) | sampling.given(engine)
    with step_bar() as on_step:
        pictures = engine.generate(str(prompt), drawing.n, size, drawing.seed, on_step=on_step, **options)
    save_pictures(drawing, pictures)


def generate_prompts(loading: Loading, prompts: Path, shard: str | None, drawing: Drawing, sampling: Sampling) -> None:
    """Draws this shard of a file of prompts and prints the file that lists its pictures."""
    from diptych.generation.offline import generate_file, read_prompts
    from diptych.machine.processes import share

    size, part = pixels(drawing.size) if drawing.size else None, share(shard)
    if drawing.out.suffix:
        raise ValueError(f"with --prompts, --out is a folder, not {str(drawing.out)!r}")
    read_prompts(prompts)  # a file that cannot be read is refused before a model is loaded
    engine = loading.load()
    with step_bar() as on_step:
        listed = generate_file(
            engine,
            prompts,
            drawing.out,
            drawing.n,
            size,
            drawing.seed,
            part,
            settings=sampling.given(engine),
            progress=on_step,
        )
    print(json.dumps({"list": str(listed)}) if drawing.as_json else listed)


@contextmanager
def step_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, and the function (done, total) that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def edit(
    loading: Loading,
    image: ImageArgument,
    instruction: Annotated[str, typer.Argument(help="what to change")],
    drawing: DrawingEdit,
    sampling: EditSampling,
    planning: Planning,
    mask: Annotated[
        Path | None, typer.Option("--mask", metavar="FILE", help="change only what is white, or transparent, here")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option("--also", metavar="FILE", help="a further edit source; may be repeated")
    ] = None,
) -> None:
    """Change a picture by instruction, or compose several."""
    size, images = drawing.check(), [image, *(also or [])]
    for file, source in product(drawing.files(drawing.n), images):
        if file.exists() and source.exists() and file.samefile(source):
            raise ValueError(f"--out would overwrite {source}, the picture to edit; name another file")
    engine = loading.load()
    options = planning.given(engine) | sampling.given(engine) | {"mask": mask}
    with step_bar() as on_step:
        pictures = engine.edit(images, instruction, drawing.n, size, drawing.seed, on_step=on_step, **options)
    save_pictures(drawing, pictures)


def save_pictures(drawing: Drawing, pictures: Any) -> None:
    """Writes the pictures of a result and prints their files."""
    files = pictures.save(drawing.out)
    if drawing.as_json:
        row = {"files": list(map(str, files)), "seed": pictures.seed, "parameters": dict(pictures.parameters)}
        print(json.dumps(row | ({"reasoning": pictures.reasoning} if pictures.reasoning else {})))
    else:
        print("\n".join(map(str, files)))


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a picture that generate or edit wrote")],
    as_json: JsonOption = False,
) -> None:
    """Show the prompt, seed and settings of a picture that was drawn."""
    from diptych.data.written import read_parameters

    parameters = read_parameters(file.expanduser())
    print(json.dumps(parameters) if as_json else "\n".join(f"{name}: {value}" for name, value in parameters.items()))


def ask(
    loading: Loading,
    image: ImageArgument,
    question: Annotated[str, typer.Argument(help="a question about the picture")],
    answering: Answering,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about a picture."""
    answer = loading.load().ask(image, question, **answering.given())
    show_answer(answer, as_json)


def show_answer(answer: Any, as_json: bool) -> None:
    """Prints an answer, as JSON with why it ended and the settings that counted."""
    row = {"text": answer.text, "finish_reason": answer.finish_reason, "parameters": dict(answer.parameters)}
    row |= {"reasoning": answer.reasoning} if answer.reasoning else {}
    print(json.dumps(row) if as_json else answer.text)


def chat(
    loading: Loading,
    answering: Answering,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where pictures are saved")] = Path("pictures"),
) -> None:
    """Talk in the terminal. /image PATH shows a picture, /draw PROMPT draws one, /new starts anew, /quit ends."""
    from diptych.machine.disk import check_folder

    check_folder(out)
    engine = loading.load()
    print(f"{engine.name}: type a message; /image PATH shows a picture, /draw PROMPT draws one, /new, /quit")
    Chat(engine, answering, out).run()


class Chat:
    """A conversation in the terminal."""

    def __init__(self, engine: Any, answering: Answering, folder: Path) -> None:
        self.engine, self.answering, self.folder = engine, answering, folder
        self.messages: list[Any] = []
        self.shown: list[Any] = []  # pictures that wait for the next message
        self.saved = 0

    def run(self) -> None:
        """Reads lines from the terminal until ``/quit`` or the end of the input."""
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self.obey(line)
            except ValueError as error:  # of this line: the conversation goes on without it
                print(f"error: {error}")

    def obey(self, line: str) -> None:
        """Runs a command, or sends a message."""
        command, _, rest = line.partition(" ")
        if command == "/new":
            self.messages, self.shown = [], []
        elif command == "/image":
            self.show(rest)
        elif command == "/draw":
            seed = self.answering.seed + self.saved
            [picture] = self.engine.generate(rest, seed=seed, think=self.answering.think)
            print(self.save(picture.image, picture.describe()))
        elif command.startswith("/"):
            print(f"unknown command {command}; there are /image, /draw, /new, /quit")
        elif line:
            self.say(line)

    def show(self, path: str) -> None:
        """Keeps a picture for the next message."""
        from diptych.core.sample import Image
        from diptych.data.decoding import open_picture

        self.shown.append(Image(open_picture(Path(path).expanduser(), path)))
        print(f"(showing {path}; now ask)")

    def say(self, line: str) -> None:
        """Sends a message, prints the answer while it is decoded, and keeps both in the conversation."""
        from diptych.core.sample import Image, Message, Text
        from diptych.generation.events import ImageDone, ReasoningDelta, TextDelta

        asked = [*self.messages, Message("user", (*self.shown, Text(line)))]
        answer: list[Any] = []
        text = ""
        thought = False
        for event in self.engine.stream(asked, **self.answering.given()):
            if isinstance(event, ReasoningDelta):
                print(("" if thought else "(thinking) ") + event.text, end="", flush=True)
                thought = True
            if isinstance(event, TextDelta):
                print("\n" if thought else "", end="")
                text, thought = text + event.text, False
                print(event.text, end="", flush=True)
            if isinstance(event, ImageDone):
                answer, text = [*answer, Text(text), Image(event.image, "target")], ""
                print(f"\n{self.save(event.image)}")
        print()
        self.messages, self.shown = [*asked, Message("assistant", (*answer, Text(text)))], []

    def save(self, image: Any, parameters: dict[str, Any] | None = None) -> Path:
        """Writes the next picture, under the first number that is free, and returns its file."""
        from diptych.data.written import save_picture

        numbered = (self.folder / f"picture-{number:03d}.png" for number in count(self.saved))
        file = next(file for file in numbered if not file.exists())
        save_picture(image, file, parameters)
        self.saved += 1
        return file


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="names, model, run or published folders, or org/name",
            autocompletion=complete_models,
        ),
    ],
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    preset: PresetOption = "",
    config: ConfigOption = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="keys that may use the server, one a line (default: none is needed)"
        ),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", metavar="N", help="requests that run together")] = 16,
    queue: Annotated[int, typer.Option("--queue", metavar="N", help="requests that may wait")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="for one request")] = 120.0,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", help="to finish running requests at the end")
    ] = 30.0,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="N", help="requests a minute for each key or address (default: no limit)"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="HOST",
            help="fetch pictures by URL from this public host; * for any (default: none); may be repeated",
        ),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            "--host-name",
            metavar="NAME",
            help="a name that reaches this server, besides localhost and its address; may be repeated",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="URL",
            help="let pages of this site use the server, such as http://localhost:3000; * for any; may be repeated",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="refuse parameters that have no effect (default: ignore them, with a warning)"),
    ] = False,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="DIR", help="show the training runs in this folder")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="write prompts to the log")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no line for every request")] = False,
) -> None:
    """Serve models: OpenAI's endpoints and a web page."""
    try:
        from diptych.serving.options import Options, public_name, read_keys
        from diptych.serving.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs the package {error.name}: {install('serve')}") from error
    from diptych.generation.engine import load

    options = Options(
        keys=read_keys(api_key_file) if api_key_file else (),
        slots=slots,
        queue=queue,
        timeout=timeout,
        grace=grace,
        rate=rate,
        hosts=frozenset(allow_host or ()),
        runs=runs,
        log_prompts=log_prompts,
        quiet=quiet,
        host_names=tuple(host_name or ()),
        strict=strict,
        origins=frozenset(allow_origin or ()),
    )
    names: list[str] = []

    def load_all() -> list[Any]:
        engines = [load(name, device, dtype, base, quantize, preset, config_changes(config)) for name in models]
        for engine in engines:
            engine.name = public_name(engine.name)
        names.extend(engine.name for engine in engines)
        return engines

    def announce(url: str) -> None:
        print(f"{', '.join(names)} at {url}  (Ctrl-C ends)", flush=True)

    serve(load_all, options, host, port, announce)


def export(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=address_of, help="the folder or address to write")],
    base: BaseOption = None,
    format: Annotated[
        Literal["diptych", "published", "hf"],
        typer.Option("--format", help="published: as the authors do; hf: language and vision parts for transformers"),
    ] = "diptych",
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="of the weights (default: bf16; other formats: as stored)")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FILE", help="add the low-rank adapters of a safetensors file first")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="random weights of a named size in place of a model's, to try a layout")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite files of the same names, keep all others")] = False,
) -> None:
    """Write a model as a release, or as its family publishes it.

    A release is model.safetensors, config.json and tokenizer.json."""
    from diptych.models.store import export, remote_code

    written = export(model, folder, format, dtype, base, force, adapter, fresh)
    if format == "hf":
        print("\n".join(str(file) for file in sorted(written.iterdir())))
    else:
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    if format == "published" and (needed := remote_code(written)):
        print(f"for transformers with trust_remote_code, add {needed}")
