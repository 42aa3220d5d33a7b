"""``diptych data``: check, show and prepare data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diptych.cli.options import (
    BAD,
    OK,
    CatalogOption,
    DataSetsArgument,
    DeviceOption,
    Dtype,
    EncodedOption,
    JsonOption,
    LayoutOption,
    RecipeArgument,
    SetOption,
    ShardOption,
    SideOption,
    Verbs,
    address_of,
    at_least_one,
    changes,
    complete_models,
    listed,
    numbers,
    show_skipped,
    show_table,
)

LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", help="rows per data set (default: all)")]


@dataclass(frozen=True)
class Filtering:
    """The rules of a filter."""

    min_side: Annotated[int, typer.Option("--min-side", metavar="PIXELS", help="of every picture's shorter side")] = 0
    max_aspect: Annotated[float, typer.Option("--max-aspect", metavar="R", help="longer side over shorter")] = 0.0
    language: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE,CODE", help="of the text: en, de, zh ... (py3langid)"),
    ] = None
    exact: Annotated[bool, typer.Option("--exact", help="drop rows whose picture files came before")] = False
    distance: Annotated[
        int | None,
        typer.Option("--distance", metavar="BITS", help="drop pictures whose 64-bit hash differs in at most so many"),
    ] = None
    similarity: Annotated[
        float | None,
        typer.Option("--similarity", metavar="COSINE", help="with --encoder: drop pictures with features this close"),
    ] = None
    encoder: Annotated[str | None, typer.Option("--encoder", help="efflite0, inception, or its TorchScript file")] = (
        None
    )
    function: Annotated[
        str | None,
        typer.Option("--function", metavar="FILE.py:NAME", help="your function of a sample: True keeps it"),
    ] = None

    def rules(self) -> Any:
        """The rules as ``diptych.data.filter`` takes them."""
        from diptych.data.filter import Rules

        return Rules(
            self.min_side,
            self.max_aspect,
            tuple(listed(self.language)),
            self.exact,
            self.distance,
            self.similarity,
            self.function,
        )


def add(app: Verbs) -> None:
    """Adds the verbs of this file to the command line."""
    verbs = Verbs(
        help="Check, show and prepare data sets.",
        subcommand_metavar="VERB ...",
        epilog="\b\nexamples:\n  diptych data check my_data.yaml\n  diptych data show shapes/draw --out sheet.png",
    )
    app.add_typer(verbs, name="data")
    verbs.verb("check", "diptych data check my_data.yaml")(check)
    verbs.verb(
        "show",
        "diptych data show shapes/draw emoji/scenes --out sheet.png",
        "diptych data show my_set --catalog my_data.yaml",
    )(show)
    verbs.verb("prepare", "diptych data prepare stamps", "diptych data prepare stamps --source ~/tuxpaint/stamps")(
        prepare
    )
    verbs.verb(
        "convert",
        "diptych data convert llava instruct.json mine.jsonl --images coco",
        "diptych data convert bagel-edit 'edits/*.parquet' edits.jsonl",
    )(convert)
    verbs.verb(
        "index",
        "diptych data index my_data.yaml",
        "diptych data index my_data.yaml photos scraped --processes 16",
    )(index)
    verbs.verb(
        "filter",
        "diptych data filter photos --catalog my_data.yaml --out kept --min-side 256 --max-aspect 3 --exact",
        "diptych data filter photos --catalog my_data.yaml --out kept --distance 4 --language en,de --shard 0/16",
        "diptych data filter photos --catalog my_data.yaml --out kept --merge",
    )(filter_rows)
    verbs.verb(
        "shard",
        "diptych data shard cats dogs --catalog my_data.yaml --out shards",
        "diptych data shard shapes/draw --limit 5000 --out shards",
    )(shard)
    verbs.verb(
        "stats",
        "diptych data stats shapes/draw shapes/ask",
        "diptych data stats cats --catalog my_data.yaml --layout bagel/7b-mot",
    )(stats)
    verbs.verb(
        "bench",
        "diptych data bench bagel/tiny --workers 0,1,2",
        "diptych data bench bagel/tiny --against runs/mine",
    )(bench)
    verbs.verb(
        "precompute",
        "diptych data precompute bagel/tiny --limit 2000 --out encoded",
        "diptych data precompute mine.yaml --catalog data.yaml --data photos --dtype bf16",
        "torchrun --nproc-per-node 8 -m diptych data precompute mine.yaml --out encoded",
        "diptych data precompute mine.yaml --out encoded --shard 0/16",
    )(precompute)


def check(
    catalog: Annotated[Path, typer.Argument(metavar="CATALOG", help="YAML file that names the data sets")],
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> int:
    """Validate every row of a catalog."""
    from diptych.data.check import check

    report = check(catalog, limit)
    print(json.dumps(report.to_json()) if as_json else report)
    return OK if report.ok else BAD


def show(
    names: DataSetsArgument,
    catalog: CatalogOption = None,
    layout: LayoutOption = "bagel/tiny",
    n: Annotated[int, typer.Option("-n", metavar="N", help="samples per data set")] = 4,
    size: SideOption = 64,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="the picture to write")] = Path("sheet.png"),
) -> None:
    """Draw a contact sheet of samples with their segments.

    The model decides how a sample is laid out as segments."""
    from diptych.data.catalog import sources
    from diptych.data.sheet import show
    from diptych.data.written import check_picture_path
    from diptych.models.store import skeleton

    at_least_one(n=n, size=size)
    check_picture_path(out)
    model = skeleton(layout)
    data_sets = sources(names, catalog=catalog, size=size)
    show(data_sets, model.lay_out, model.tokenizer.decode, n * len(names), out)
    print(out)


def prepare(
    name: Annotated[Literal["stamps"], typer.Argument(help="the data set")],
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="DIR", help="an unpacked folder of stamps (default: the Debian package)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="folder to write (default: where the data set is read)")
    ] = None,
) -> None:
    """Fetch and build a data set that does not ship."""
    from diptych.data.worlds import stamps

    counts = stamps.prepare(out, source)
    print("\n".join(f"{number:6d}  {label}" for label, number in counts.items()))


def convert(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="llava, llava-onevision, sharegpt4v, internvl, bagel-t2i, bagel-edit, bagel-sft, omnigen2 or cheers",
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a file, a folder or a pattern")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="the jsonl file to write; pictures held as bytes go to OUT-images/"),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="the catalog's picture folder: absolute paths become relative to it"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite files of the same names, keep all others")] = False,
    shard: ShardOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write another project's training data as rows of ours.

    Share I of N converts every N-th file to OUT-I-of-N.jsonl; a catalog reads all shares with path: 'OUT-*.jsonl'."""
    from diptych.data.convert import convert
    from diptych.machine.processes import share

    rank, world = share(shard)
    out = out if world == 1 else out.with_name(f"{out.stem}-{rank}-of-{world}{out.suffix}")
    result = convert(format, source, out, images, force, rank, world)
    if as_json:
        print(json.dumps(vars(result)))
    else:
        for line in result.skipped:
            print(f"skipped {line}")
        print(f"{out}: {result.rows} rows, {result.pictures} pictures, {len(result.skipped)} skipped")
    return OK if result.rows else BAD


def index(
    catalog: Annotated[str, typer.Argument(metavar="CATALOG", help="YAML file that names the data sets")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="which data sets (default: all that take an index)")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="processes that scan (default: one a processor)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Scan data sets once, for quick starts and shard order.

    The index goes to NAME.index beside the catalog, or where the catalog says (index: FILE). CATALOG may also be a
    folder that `diptych data precompute` wrote for one data set."""
    from diptych.core.errors import nearest
    from diptych.data import encoded
    from diptych.data.catalog import read_catalog
    from diptych.data.index import default_processes

    at_least_one(processes=processes)
    folder = address_of(catalog)
    if encoded.there(folder):
        rows = encoded.write_index(folder, processes or default_processes())
        print(json.dumps({"rows": rows}) if as_json else f"{folder / encoded.PLACES}: {rows} rows")
        return
    entries = read_catalog(catalog)
    for name in names or []:
        if name not in entries:
            raise ValueError(f"unknown data set {name!r}; {catalog} has: {', '.join(entries)}{nearest(name, entries)}")
    chosen = names or [name for name, entry in entries.items() if entry.takes_index]
    results = {}
    with progress_bars(shown=not as_json) as progress:
        for name in chosen:
            rows = entries[name].write_index(processes or default_processes(), partial(progress, name))
            results[name] = {"rows": rows, "file": str(entries[name].index_file)}
    if as_json:
        print(json.dumps(results))
        return
    show_table(catalog, ["data set", "rows", "index"], [[n, r["rows"], r["file"]] for n, r in results.items()])


def filter_rows(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a data set of the catalog")],
    catalog: Annotated[
        str, typer.Option("--catalog", metavar="FILE", help="YAML file that says where your own data sets are")
    ],
    filtering: Filtering,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=address_of, help="folder to write")] = Path(
        "kept"
    ),
    merge: Annotated[
        bool, typer.Option("--merge", help="only write the list of kept rows, from the facts of all shares")
    ] = False,
    device: DeviceOption = "auto",
    shard: ShardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a list of the rows to train on.

    The catalog entry reads them with keep: DIR. Share I/N computes the facts of its rows; --merge then writes the list.
    """
    from diptych.core.errors import nearest
    from diptych.data.catalog import read_catalog
    from diptych.data.filter import measure, select
    from diptych.data.tasks.annotations import Proxies
    from diptych.evaluation.benchmarks.distances import features
    from diptych.machine.devices import pick_device
    from diptych.machine.processes import share

    rank, world = share(shard)
    if not merge:
        entries = read_catalog(catalog)
        if name not in entries:
            raise ValueError(f"unknown data set {name!r}; {catalog} has: {', '.join(entries)}{nearest(name, entries)}")
        rules, source = filtering.rules(), entries[name].open_whole()
        if isinstance(source, Proxies):
            raise ValueError(f"data set {name!r} is read as a task; filter the pictures that it is made of")
        network = features(filtering.encoder, str(pick_device(device))) if filtering.encoder else None
        with progress_bars(shown=not as_json) as progress:
            count = counted(progress, name, -(-len(source) // world))
            measure(source, rules, out, features=network, rank=rank, world=world, progress=count)
        if world > 1:
            verb = f"diptych data filter {name} --catalog {catalog} --out {out} --merge"
            row = {"share": f"{rank}/{world}", "merge": verb}
            print(json.dumps(row) if as_json else f"share {rank}/{world} is done; when all are: {verb}")
            return
    result = select(out)
    if as_json:
        print(json.dumps(result))
        return
    dropped = ", ".join(f"{rule} {n}" for rule, n in result["dropped"].items()) or "none"
    print(f"{out}: keeps {result['kept']} of {result['rows']} rows; dropped: {dropped}")


def shard(
    names: DataSetsArgument,
    catalog: CatalogOption = None,
    limit: LimitOption = None,
    size: SideOption = 64,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", parser=address_of, help="folder to write, one folder a data set"),
    ] = Path("shards"),
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="rows of a shard")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="of the order; -1 keeps the order")] = 0,
    share_of: ShardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write data sets as shuffled webdataset shards."""
    from diptych.data.catalog import sources
    from diptych.data.mixture import First
    from diptych.data.shards import shard
    from diptych.machine.processes import share

    at_least_one(limit=limit, size=size, rows=rows)
    rank, world = share(share_of)
    results = {}
    with progress_bars(shown=not as_json) as progress:
        for name, source in sources(names, catalog=catalog, size=size).items():
            source = First(source, min(limit, len(source))) if limit else source
            count = counted(progress, name, -(-len(source) // world))
            order = None if seed < 0 else seed
            results[name] = shard(source, out / name, rows=rows, seed=order, rank=rank, world=world, progress=count)
    if as_json:
        print(json.dumps(results))
        return
    show_table(
        str(out),
        ["data set", "rows", "pictures", "shards", "skipped"],
        [[n, r["rows"], r["pictures"], r["shards"], len(r["skipped"])] for n, r in results.items()],
    )
    for result in results.values():
        show_skipped(result["skipped"])


def stats(
    names: DataSetsArgument,
    catalog: CatalogOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="rows per data set")] = 1000,
    size: SideOption = 64,
    layout: LayoutOption = "bagel/tiny",
    shard: ShardOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", parser=address_of, help="keep the counts of this share there"),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="add up the counts of all shares in --out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Count lengths, kinds of tokens and shapes of pictures.

    The model decides how a sample is laid out as tokens."""
    from diptych.data.catalog import sources
    from diptych.data.shards import merge_stats, stats, write_stats
    from diptych.data.sources import describe_left_out, find_files
    from diptych.machine.processes import share
    from diptych.models.store import skeleton

    at_least_one(limit=limit, size=size)
    rank, world = share(shard)
    if merge:
        if not out:
            raise ValueError("--merge adds up the counts in --out DIR; name it")
        counts = {n: c for n, c in merge_stats(find_files(out / "stats-*.json", (".json",))).items() if n in names}
        if lacking := sorted(set(names) - counts.keys()):
            raise ValueError(f"{out} holds no counts of {', '.join(lacking)}")
    else:
        counts = stats(sources(names, catalog, size), skeleton(layout).lay_out, limit, rank, world)
        if out:
            write_stats(counts, out / f"stats-{rank}-of-{world}.json")
    table = {name: lengths.to_json() for name, lengths in counts.items()}
    if as_json:
        print(json.dumps(table))
        return
    columns = ("rows", "bad", "no_target", "tokens", "p5", "p50", "p95", "longest", "supervised")
    rows = [[name, *(f"{row.get(column, 0):g}" for column in columns)] for name, row in table.items()]
    show_table(layout, ["data set", *columns], rows)
    for name, row in table.items():
        show_skipped(row["skipped"])
        if row["left_out"]:
            print(f"{name}  leaves out {describe_left_out(row['left_out'])}")
        for histogram in ("kinds", "shapes"):
            largest = max(row[histogram].values(), default=1)
            for label, number in list(row[histogram].items())[:12]:
                print(f"{name}  {label:<18} {number:>9}  {'█' * round(40 * number / largest)}")


def bench(
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="rows to wait for")] = 50,
    workers: Annotated[
        list[str] | None,
        typer.Option("--workers", metavar="N,N", help="numbers of worker processes to try (default: 0,1)"),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="RUN", help="compare with what this run's trainer consumed")
    ] = None,
    catalog: CatalogOption = None,
    encoded: EncodedOption = None,
    override: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed of a recipe's loader and the fill of rows."""
    from diptych.recipes.bench import loader_speed
    from diptych.recipes.run import configured

    at_least_one(rows=rows)
    measured = configured(recipe, catalog=catalog, encoded=encoded, override=changes(override))
    counts = numbers(workers, "--workers") if workers else [0, 1]
    speeds = loader_speed(measured, counts, rows, against)
    if not as_json:
        cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in speeds]
        show_table(measured.name, list(speeds[0]), cells)
    print(json.dumps({"benchmark": "data", "recipe": measured.name, "rows": speeds}))


def precompute(
    recipe: RecipeArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="the model whose encoders are used, in place of the recipe's own",
            autocompletion=complete_models,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME,NAME", help="which data sets (default: all of the recipe's)"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="rows per data set (embedded ones are endless)")
    ] = None,
    encoders: Annotated[
        list[str] | None,
        typer.Option("--encoders", metavar="NAME,NAME", help="which of the family's encoders (default: all)"),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", parser=address_of, help="folder or address to write")
    ] = Path("encoded"),
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="of the stored tensors (default: as computed)")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="pictures of one shape encoded together")] = 16,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="rows of a file")] = 1000,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="processes that read and resize")] = 0,
    catalog: CatalogOption = None,
    override: SetOption = None,
    device: DeviceOption = "auto",
    share_of: ShardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode a recipe's pictures once, with its frozen encoders."""
    from diptych.machine.processes import device_of_process, launched, share
    from diptych.recipes.run import precompute

    at_least_one(limit=limit, batch=batch, rows=rows)
    rank, world = share(share_of)
    with progress_bars(shown=not as_json and launched()[0] == 0) as progress:
        results = precompute(
            recipe,
            out,
            data=listed(data) or None,
            limit=limit,
            model=model,
            catalog=catalog,
            override=changes(override),
            device=device_of_process(device),
            progress=progress,
            encoders=listed(encoders) or None,
            dtype=dtype,
            batch=batch,
            shard=rows,
            workers=workers,
            rank=rank,
            world=world,
        )
    if as_json:
        print(json.dumps(results))
        return
    show_table(
        str(out),
        ["data set", "rows", "pictures", "MiB", "skipped"],
        [[n, r["rows"], r["pictures"], f"{r['bytes'] / 2**20:.1f}", len(r["skipped"])] for n, r in results.items()],
    )
    for result in results.values():
        show_skipped(result["skipped"])


def counted(progress: Callable[[str, int, int], None], name: str, total: int) -> Callable[[int], None]:
    """A function of the rows done since its last call that moves a bar."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        progress(name, done, total)

    return count


@contextmanager
def progress_bars(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (name, done, total) that moves the bar of that name on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield progress
