"""The command line. Nothing heavy is imported until a verb runs: ``diptych --help`` does not import torch.

Exit codes: 0 done, 2 wrong configuration, data or input, 3 out of memory, 4 interrupted but checkpointed; 1 is a bug.
"""

from __future__ import annotations

import dis
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli import analysis, data, evaluation, lists, training, use
from diptych.cli.options import BAD, INTERRUPTED, MEMORY, OK, Group, Verbs

PACKAGE = str(Path(__file__).parents[1])
BUG = (
    "This is a bug in diptych, not a mistake of yours. Please report it with this traceback, the command and the "
    "output of `diptych doctor`."
)


class Program(Group):
    """All verbs; turns what they raise into a message and an exit code."""

    def invoke(self, ctx: typer.Context) -> int:  # type: ignore[override]  # vendored click
        """Runs the verb and returns its exit code; a bug propagates with its traceback."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code or OK
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort | typer.TyperException):
                raise
            if (code := code_of(error)) is None:
                error.add_note(BUG)
                raise
            if ctx.params["traceback"]:
                traceback.print_exception(error)
            print(message_of(error, code), file=sys.stderr)
            return code


def code_of(error: Exception) -> int | None:
    """The exit code of an error that the user can mend, or None for a bug."""
    training_loop = sys.modules.get("diptych.training.loop")
    if training_loop and isinstance(error, training_loop.Interrupted):
        return INTERRUPTED
    if isinstance(error, MemoryError | RuntimeError):
        text = str(error)
        memory = isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
        return MEMORY if memory else None
    if isinstance(error, OSError | FloatingPointError | UnicodeError | json.JSONDecodeError):
        return BAD
    return BAD if isinstance(error, ValueError | ArithmeticError) and raised_here(error) else None


def raised_here(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package raised the error. One that Python or another package raised in the
    middle of our code was not foreseen, so it is a bug."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    if code.co_name == "reraise" and "DataLoader worker" in str(error):  # torch repeats what a worker raised
        return True
    return code.co_filename.startswith(PACKAGE) and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def message_of(error: Exception, code: int) -> str:
    """What is printed for an error that the user can mend."""
    if code == MEMORY:
        hint = "lower limits.tokens (--set stages.0.limits.tokens=1024) or the picture size, or use fewer workers"
        return f"out of memory: {error}\ntry: {hint}"
    return str(error) if code == INTERRUPTED else f"error: {error}"


app = Verbs(
    cls=Program,
    add_completion=True,
    subcommand_metavar="VERB ...",
    epilog="\b\nfirst steps:\n"
    "  diptych demo\n"
    "  diptych generate bagel/tiny 'a red circle left of a blue star'\n"
    "  diptych train bagel/tiny --steps 500 --out runs/mine\n"
    "\n\b\nevery verb has examples: diptych VERB --help",
)


def show_version(asked: bool) -> None:
    """Prints the version and ends, if ``--version`` is given."""
    if asked:
        from diptych import __version__

        print(f"diptych {__version__}")
        raise typer.Exit


@app.callback()
def diptych(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="with an error also print where it was raised; works after any verb")
    ] = False,
) -> None:
    """Unified multimodal models: networks that read pictures and draw them."""


training.add(app)
use.add(app)
evaluation.add(app)
analysis.add(app)
data.add(app)
lists.add(app)


def command() -> Any:
    """The tree of verbs, as click's commands."""
    return typer.main.get_command(app)


def share_cores() -> None:
    """Lets the threads of OpenMP spin only for a moment before they sleep, unless the user has set how: by default
    several programs on one machine spend most of their time spinning. To be called before torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    share_cores()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in words[: words.index("--") if "--" in words else None]:  # works before and after the verb
        words.remove("--traceback")
        words = ["--traceback", *words]
    try:
        return command().main(words, prog_name="diptych", standalone_mode=False)
    except typer.TyperException as error:
        if close := getattr(error, "possibilities", None):  # of an unknown option
            error.message += f". Did you mean {', '.join(close)}?"
            error.possibilities = None  # type: ignore[attr-defined]  # click would list them a second time
        error.show()  # type: ignore[attr-defined]  # click's own exceptions have it
        return error.exit_code
