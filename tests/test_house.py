"""The rules of the house: who imports whom, what a start costs, what may stand in a file, documents that run."""

from __future__ import annotations

import ast
import builtins
import configparser
import contextlib
import inspect
import io
import os
import re
import resource
import shlex
import shutil
import subprocess
import symtable
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from diptych import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diptych"
FILES = sorted(PACKAGE.rglob("*.py"))
SPEAKING = {"cli", "studies", "__main__.py"}  # rooms that print
DOCUMENTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.is_file()]
LARGEST = 2 * 2**20


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command, **how) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, **how)


def tracked() -> list[Path]:
    """The files that git has or would add."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def undefined(code: str, path: str = "code") -> list[str]:
    """The global names that a module reads and never defines. Linters that know shape strings cannot tell these."""
    module = symtable.symtable(code, path, "exec")
    known = {*dir(builtins), "__file__", "__name__", *(s.get_name() for s in module.get_symbols() if s.is_assigned())}
    known |= {s.get_name() for s in module.get_symbols() if s.is_imported() or s.is_namespace() or s.is_annotated()}
    scopes, names = [module], set()
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        globals_ = (s for s in scope.get_symbols() if s.is_global() or scope is module)
        names |= {s.get_name() for s in globals_ if s.is_referenced()} - known
    return sorted(names)


def test_every_name_is_defined():
    assert undefined("import a\ndef f(x):\n    return a.b(x, [c for _ in x])") == ["c"]
    lost = {name(path): names for path in FILES if (names := undefined(path.read_text(), str(path)))}
    assert not lost


def test_rooms():
    lint = Path(sys.executable).with_name("lint-imports")
    done = run(lint, "--no-cache", "--config", ROOT / ".importlinter")
    assert done.returncode == 0, done.stdout + done.stderr


def planted(tmp_path, file: str, line: str) -> subprocess.CompletedProcess:
    """What lint-imports says of a copy of the package in which ``file`` has one more line."""
    shutil.copytree(
        PACKAGE, tmp_path / "diptych", ignore=shutil.ignore_patterns("__pycache__", "checkpoints", "static")
    )
    target = tmp_path / "diptych" / file
    target.write_text(f"{target.read_text()}\n{line}\n" if target.exists() else f"{line}\n")
    lint = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [lint, "--no-cache", "--config", ROOT / ".importlinter"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "file, line, contract",
    [
        ("models/cheers.py", "import diptych.models.bagel", "Families do not import each other"),
        ("core/layout.py", "import diptych.machine.doctor", "Rooms"),
        ("data/catalog.py", "import diptych.models.table", "Rooms"),
        ("training/loop.py", "import diptych.models.bagel", "never a family"),
        ("attic.py", "import diptych.core", "Rooms"),  # a room that is not in the picture
        ("training/loop.py", "import peft", "peft"),
        ("recipes/tiny.py", "import typer", "typer"),
    ],
    ids=lambda value: value if value.endswith(".py") else None,
)
def test_a_forbidden_import_is_refused(tmp_path, file, line, contract):
    done = planted(tmp_path, file, line)
    assert done.returncode != 0, done.stdout
    broken = done.stdout.partition("Broken contracts")[2]
    assert contract in broken or (file == "attic.py" and "attic" in done.stdout + done.stderr), done.stdout


def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return parser


def test_contributing_and_the_contracts_say_the_same():
    """The table of confined packages, and the picture of the rooms, against what lint-imports enforces."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = dict(re.findall(r"^\| ([\w.]+) \| (`.*`) \|$", text, re.M))
    homes = {package: set(re.findall(r"`([^`]+)`", cell)) for package, cell in table.items()}
    enforced: dict[str, set[str]] = {}
    for section in contracts().values():
        for line in section.get("ignore_imports", "").split("\n"):
            if line.strip():
                module, _, package = line.strip().partition(" -> ")
                enforced.setdefault(package, set()).add(f"{module.removeprefix('diptych.').replace('.', '/')}.py")
    using = {name(p).removeprefix("diptych/") for p in FILES if "torch.distributed" in p.read_text()}
    assert homes == enforced | {"torch.distributed": using, "typer": {"cli/"}}
    picture = text.partition("## Rooms")[2].split("```")[1]
    drawn = [set(line.split()) for line in picture.splitlines() if re.search(r"[a-z]", line)]
    layers = contracts()["importlinter:contract:rooms"]["layers"].split("\n")
    assert drawn == [set(re.split(r"[|\s]+", line.strip())) for line in layers if line.strip() not in ("", "__main__")]


def test_the_contracts_name_every_family():
    from diptych.models.table import FAMILIES

    modules = {home.partition(":")[0] for home in FAMILIES.values()}
    assert set(contracts()["importlinter:contract:independence"]["modules"].split()) == modules
    assert set(contracts()["importlinter:contract:families"]["forbidden_modules"].split()) == modules


def test_ruff():
    done = run(Path(sys.executable).with_name("ruff"), "check", "--no-cache", "diptych", "tests", "scripts")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train", "--help"), ("evaluate", "run", "--help"), ("--version",), ()], ids=" ".join
)
def test_help_is_fast_and_light(arguments):
    code = (
        "import sys, diptych.cli\n"
        f"try: diptych.cli.main({list(arguments)!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pydantic', 'rich', 'matplotlib', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(sys.executable, "-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3  # of the processor: what the test must not depend on is how busy the machine is


def test_importing_the_package_costs_nothing_and_its_names_exist():
    code = (
        "import time; start = time.process_time(); import diptych; seconds = time.process_time() - start\n"
        "import sys; assert 'torch' not in sys.modules; print(seconds, *diptych.__all__)"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    seconds, *names = done.stdout.split()
    assert float(seconds) < 0.25
    import diptych

    for public in names:
        assert getattr(diptych, public) is not None and public in dir(diptych)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        diptych.nothing  # noqa: B018


def test_the_public_face_shows_signatures_and_nothing_else():
    import diptych

    assert sorted(dir(diptych)) == sorted(diptych.__all__)
    assert {"steps", "seed", "catalog", "device"} <= inspect.signature(diptych.train).parameters.keys()
    for public in diptych.__all__:
        assert getattr(diptych, public).__doc__, f"diptych.{public} has no docstring"
        kinds = {p.kind for p in inspect.signature(getattr(diptych, public)).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds or public == "Recipe", f"diptych.{public} takes **anything"
    with pytest.raises(TypeError, match="stps"):
        diptych.train("bagel/tiny", stps=20)


def test_a_type_checker_sees_the_public_face(tmp_path):
    """``py.typed`` ships, so a wrong keyword fails in the user's type checker."""
    (tmp_path / "mine.py").write_text('import diptych\n\ndiptych.train("bagel/tiny", stps=20)\n')
    (tmp_path / "good.py").write_text('import diptych\n\ndiptych.train("bagel/tiny", steps=20)\n')
    wrong, right = (
        run(sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", tmp_path / file)
        for file in ("mine.py", "good.py")
    )
    assert wrong.returncode == 1 and 'Unexpected keyword argument "stps"' in wrong.stdout, wrong.stdout
    assert right.returncode == 0, right.stdout


def verbs(command=None, at=()) -> dict[tuple, Any]:
    """Every verb and group of the command line by its words."""
    found = {}
    for word, inner in getattr(command or cli.command(), "commands", {}).items():
        found[(*at, word)] = inner
        found |= verbs(inner, (*at, word))
    return found


def help_of(words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([*words, "--help"]) == 0
    return out.getvalue()


def parse(words) -> None:
    """Parses a command without running it; fails as the command line does."""
    context = cli.command().make_context("diptych", list(words))
    while hasattr(command := context.command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, inner, rest = command.resolve_command(context, rest)
        context = inner.make_context(name, rest, parent=context)


@pytest.mark.parametrize("words", [(), *(w for w, verb in verbs().items() if hasattr(verb, "commands"))], ids=" ".join)
def test_a_list_of_verbs_shows_whole_sentences_at_80_columns(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(words).partition("Commands:")[2].partition("examples:")[0].partition("first steps:")[0]
    listed = [line for line in shown.splitlines() if line.strip()]
    assert listed and not [line for line in listed if line.endswith("...")]


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_shows_an_example_that_parses(words):
    shown = help_of(words)
    examples = [line.strip() for line in shown.partition("examples:")[2].split("\n\n")[0].splitlines() if line.strip()]
    assert examples, f"diptych {' '.join(words)} --help shows no example"
    for example in examples:
        _, _, arguments = example.partition("diptych ")
        parse(shlex.split(arguments))


def test_every_option_is_explained():
    for words, verb in verbs().items():
        for parameter in verb.params:
            assert parameter.help, f"{' '.join(words)} {parameter.opts}"


def test_no_option_is_swallowed_by_torchrun():
    """torchrun refuses a line in which an option of ours is the beginning of several of its own (--run was)."""
    from torch.distributed.run import get_args_parser

    own = {option for action in get_args_parser()._actions for option in action.option_strings}
    for words, verb in verbs().items():
        for option in (o for parameter in verb.params for o in parameter.opts if o.startswith("--")):
            longer = {o for o in own if o.startswith(option) and o != option}
            assert len(longer) < 2, f"{' '.join(words)} {option}: {longer}"


def _strings(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=name)
def test_package_files_name_no_place_of_this_machine(path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert not re.search(r"(?<![\w.~])/(work|home|root|tmp|Users|mnt|data\d?)/", line), (
            f"{name(path)}:{number}: {line}"
        )
        assert not re.search(r"cuda:\d", line), f"{name(path)}:{number}: {line}"


def test_tracked_files_name_no_place_of_this_machine():
    for path in tracked():
        if (
            path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", "")
            and path.stat().st_size < LARGEST
        ):
            text = path.read_text(errors="replace")
            assert str(ROOT) not in text or str(ROOT) == "/", name(path)


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(PACKAGE).parts[0] not in SPEAKING], ids=name)
def test_library_rooms_do_not_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            pytest.fail(f"{name(path)}:{node.lineno} prints")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_broad_except_and_no_bare_assertion_of_types(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            raises_on = any(isinstance(x, ast.Raise) for x in ast.walk(node))
            broad = caught in ("everything", "Exception", "BaseException")
            assert not broad or raises_on, f"{name(path)}:{node.lineno} swallows {caught}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_edges_touch_the_global_random_state_or_the_environment(path):
    allowed_seed = {"diptych/training/build.py"}  # inside fork_rng
    allowed_environment = {
        "diptych/cli/__init__.py",  # OpenMP's spinning, set before torch is imported
        "diptych/cli/evaluation.py",
        "diptych/evaluation/rewards.py",  # the key of a judge that a recipe names
        "diptych/machine/addresses.py",  # the cache of remote files: its folder and its limit
        "diptych/machine/processes.py",
        "diptych/data/worlds/stamps.py",
    }
    text = path.read_text()
    if name(path) not in allowed_seed:
        assert not re.search(r"(torch|random)\.(manual_seed|seed)\(", text.replace("Generator().manual_seed", "")), (
            name(path)
        )
    if name(path) not in allowed_environment:
        assert "os.environ" not in text and "getenv" not in text, name(path)


def test_all_python_is_formatted():
    python = [p for p in tracked() if p.suffix == ".py"]
    skipping = [name(p) for p in python if re.search(r"# fmt: (skip" + "|off)", p.read_text())]
    assert not skipping
    done = run(Path(sys.executable).with_name("ruff"), "format", "--no-cache", "--check", *python)
    assert done.returncode == 0, done.stdout


PARAMETERS = 12
LONG_SIGNATURES = {  # each parameter is an option of the command line, which typer reads from the signature
    "diptych/cli/data.py": {"precompute"},
    "diptych/cli/evaluation.py": {"run"},
    "diptych/cli/training.py": {"plan", "train"},
    "diptych/cli/use.py": {"serve"},
}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_function_takes_more_than_12_parameters(path):
    long = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([a for a in arguments if a not in ("self", "cls")]) > PARAMETERS:
                long.add(node.name)
    assert long == LONG_SIGNATURES.get(name(path), set())


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=name)
def test_prose_is_at_most_120_columns_wide(path):
    """Outside blocks of code, tables and HTML, whose lines cannot be broken."""
    prose = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), path.read_text(), flags=re.S | re.M)
    for number, line in enumerate(prose.splitlines(), start=1):
        whole = line.lstrip().startswith(("|", "<", "![", "[!["))
        assert len(line) <= 120 or whole, f"{name(path)}:{number} has {len(line)} characters"


@pytest.mark.parametrize("path", [p for p in FILES if p.read_text().strip()], ids=name)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or path.name == "__main__.py", name(path)


def test_no_family_is_known_outside_models():
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("models", "recipes", "cli", "studies"):
            continue
        assert not re.search(r"family *==|models\.(bagel|cheers|synergen|iomm)\b", path.read_text()), name(path)


def test_processes_are_known_to_two_modules():
    """import-linter sees packages only, so it cannot tell torch.distributed from torch."""
    using = {name(p) for p in FILES if "torch.distributed" in p.read_text()}
    assert using <= {"diptych/machine/processes.py", "diptych/training/parallel.py", "diptych/training/checkpoint.py"}


def test_only_checkpoints_are_large():
    for path in tracked():
        if path.stat().st_size > LARGEST:
            assert "checkpoints" in path.parts, f"{name(path)} has {path.stat().st_size / 2**20:.1f} MiB"


def blocks(path: Path) -> list[tuple[int, str]]:
    """The python blocks of a document that are to run, with their lines."""
    found, lines = [], path.read_text().splitlines()
    at = 0
    while at < len(lines):
        if lines[at].strip() == "```python":
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            before = next((line for line in reversed(lines[:at]) if line.strip()), "")
            if "<!-- not run" not in before:
                found.append((at + 1, "\n" * (at + 1) + "\n".join(lines[at + 1 : end])))
            at = end
        at += 1
    return found


def test_every_page_is_in_the_navigation_and_every_extra_in_the_readme():
    pages = {str(p.relative_to(ROOT / "docs")) for p in DOCUMENTS if p.parent != ROOT}
    assert pages == set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    table = (ROOT / "README.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == extras.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_run(path, tmp_path, monkeypatch):
    if not blocks(path):
        pytest.skip("no python in it")
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "document"}
    for line, code in blocks(path):
        try:
            exec(compile(code, str(path), "exec"), space)
        except Exception as error:
            error.add_note(f"in the python block at {name(path)}:{line}")
            raise


def test_the_readme_tells_the_truth(tmp_path, monkeypatch):
    """The first pictures and answers that a reader sees are right."""
    import PIL.Image

    from diptych.data.worlds import shapes, shapes_judge

    drawn = shapes.Prompt(
        "position",
        "a red circle left of a blue star",
        (shapes.Need("circle", "red"), shapes.Need("star", "blue")),
        "left of",
    )
    after = shapes.Prompt("position", "", (shapes.Need("circle", "red"), shapes.Need("star", "green")), "left of")

    def judge(picture, edited, answer):
        assert (verdict := shapes_judge.check(picture, drawn)).ok, verdict.reason
        assert (verdict := shapes_judge.check(edited, after)).ok, verdict.reason
        assert answer == "blue"

    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert repr(drawn.text).replace("'", '"') in code
    space: dict = {"__name__": "document"}
    exec(compile(code, "README.md", "exec"), space)
    judge(space["picture"], space["edited"], space["answer"])
    assert space["again"] == "green"
    assert (space["release"] / "model.safetensors").is_file() and space["scores"]["vqa-mini@exact/overall"].n > 0
    shutil.rmtree("runs")
    said = {}
    for line in readme.partition("```sh\n")[2].partition("```")[0].splitlines():
        command = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said[line.split()[1]] = done.stdout
    with PIL.Image.open("scene.png") as picture, PIL.Image.open("edited.png") as edited:
        judge(picture, edited, said["ask"].strip())
    assert "done: runs/mine/release" in said["train"] and "vqa-mini@exact/overall" in said["evaluate"]
    assert "vqa-mini" in Path("report.html").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_in_documents_parse(path):
    for line in path.read_text().splitlines():
        match = re.match(r"^\s*\$? ?(?:torchrun .* -m )?diptych (.*)$", line)
        if not match or (match[1].split(" ")[0],) not in verbs() or "<!--" in line or "`" in line or " is " in line:
            continue
        words = shlex.split(re.split(r" # | {3,}", match[1])[0], comments=True)
        if not words or "|" in words:
            continue
        try:
            parse(words)
        except typer.TyperException as error:
            pytest.fail(f"{name(path)}: {line.strip()}: {error.format_message()}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_in_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not re.match(r"\w+:", target):
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"


@pytest.mark.parametrize("path", [*FILES, *DOCUMENTS], ids=name)
def test_citations_can_be_followed(path):
    """A citation names a paper's section, equation or table, or a page and heading under docs/, never our notes."""
    text = path.read_text()
    lost = re.findall(r"specs?: ?[A-Z]\w*|\(E\d+\)|\(U\d+\)|\(Q\d+\)", text)
    assert not lost, f"{name(path)} cites {lost}"
    for page, heading in re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", text):
        assert (ROOT / page).is_file(), f"{name(path)} cites {page}"
        titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, f"{name(path)} cites {page}#{heading}"


RETIRED = re.compile(  # a phrase that a reader must read twice; the field's words are in docs/glossary.md
    r"numbers? that (?:is|are) none|(?:its|in) company\b|what is (?:said|told|made) of|older half|is to be had|"
    r"whose business|(?:the|is) business of|by a bit\b|nobody's here|(?:drawn|said) like any other|stands? beside a ",
    re.I,
)


def test_retired_phrases_stay_out():
    assert RETIRED.search("Numbers that are none stop it") and not RETIRED.search("NaN losses stop the run bit by bit")
    here = Path(__file__).resolve()
    prose = [p for p in tracked() if p.suffix in {".py", ".md", ".js", ".html"} and p.resolve() != here]
    met = [
        f"{name(p)}: {phrase[0]!r}"
        for p in prose
        if p.name != "NOTES.md"
        for phrase in RETIRED.finditer(" ".join(p.read_text().split()))
    ]
    assert not met, "\n".join(met)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=name)
def test_scripts_and_tests_that_documents_name_exist(path):
    text = path.read_text()
    named = re.findall(r"(?<![\w/.])(?:tests|benchmarks|scripts)/[\w/.-]+\.(?:py|sh)\b", text)
    assert not [file for file in named if not (ROOT / file).is_file()]


def test_benchmarks_of_make_are_files():
    listed = re.search(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert all((ROOT / "benchmarks" / f"{benchmark}.py").is_file() for benchmark in listed)
    left_out = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - set(listed)
    hours_or_gpus = {"at_scale", "caption_gap", "compare", "equal", "faults", "large", "scale", "step_cache"}
    assert left_out == hours_or_gpus | {"common"}


def test_nothing_reaches_the_network():
    import socket

    with socket.socket() as s, pytest.raises(RuntimeError, match="tests may not use the network"):
        s.connect(("192.0.2.1", 80))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_shapes_are_checked_at_run_time():
    import jaxtyping
    import torch

    from diptych.parts.images import to_pil

    with pytest.raises((jaxtyping.TypeCheckError, TypeError)):
        to_pil(torch.zeros(4, 2, 2))
