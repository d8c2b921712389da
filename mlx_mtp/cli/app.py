"""The command line's frame: the application, how a function becomes a command, errors and exit codes.

Exit codes: 0 done; 1 a fault of this program; 2 a mistake that the user can mend, and one line says how;
130 Ctrl-C; 141 the reader of stdout went away.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from mlx_mtp.cli.output import say
from mlx_mtp.rows import MlxMtpError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Gemma 4 on MLX, several tokens a pass with MTP drafters, and exactly the target's own text.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from mlx_mtp import __version__

        print("mlx-mtp", __version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@dataclass(frozen=True)
class Debug:
    """What every command takes."""

    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False


def command(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Register a function of one options dataclass: its fields become the command's arguments and options."""
    options = get_type_hints(run)["options"]
    hints = get_type_hints(options, include_extras=True)

    def call(**values: Any) -> None:
        try:
            run(options(**values))
        except BrokenPipeError:
            raise typer.Exit(drop_stdout()) from None

    call.__annotations__ = {field.name: hints[field.name] for field in fields(options)}
    call.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(options)
        ]
    )
    app.command(run.__name__, help=inspect.getdoc(run))(call)
    return run


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code. An error is one line; a traceback needs --debug."""
    argv = sys.argv[1:] if argv is None else argv
    _make_printable(sys.stdout)
    try:
        code = app(args=argv or ["--help"], prog_name="mlx-mtp", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return drop_stdout()
    except typer.TyperException as error:
        return _fail(error, f"{error.format_message()} (see mlx-mtp --help)", 2, argv)
    except MlxMtpError as error:
        return _fail(error, str(error), 2, argv)
    except Exception as error:  # the last resort: whatever it is, the user sees one line
        message = f"internal error: {type(error).__name__}: {error}"
        return _fail(error, f"{message}; run again with --debug to see where", 1, argv)


def _fail(error: Exception, message: str, code: int, argv: list[str]) -> int:
    if "--debug" in argv:
        traceback.print_exception(error)
    say(message)
    return code


def drop_stdout() -> int:
    """Nobody reads stdout any more: keep what is buffered from failing again when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _make_printable(stream: Any) -> None:
    """A terminal whose encoding lacks a character shows a substitute instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
