"""The command line: generate, chat, pairs, doctor. stdout is data, stderr is the rest. Knows no arrays.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.

Exit codes: 0 done; 1 a fault of this program; 2 a mistake that the user can mend, and one line says how;
130 Ctrl-C; 141 the reader of stdout went away.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mlx_mtp.rows import Event, MlxMtpError, RequestError, Sampling, Stats

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

EMBEDDED = "tiny"

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


@dataclass(frozen=True)
class Choice(Debug):
    """Which pair runs, and how it decodes."""

    model: Annotated[str, typer.Option("--model", "-m", help="A folder or hub id; tiny is the embedded pair.")] = (
        EMBEDDED
    )
    drafter: Annotated[
        str, typer.Option(help="auto (the target's own, by name), none (plain decoding), a folder or hub id.")
    ] = "auto"
    quantize_drafter: Annotated[
        int | None, typer.Option(metavar="4|8", help="Quantise the drafter to so many bits at load.")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; unset = what suits the machine.")] = (
        None
    )
    width: Annotated[
        str,
        typer.Option(
            metavar="auto|heuristic|N",
            help="Tokens drafted per round; 0 is plain decoding. The text is the same.",
        ),
    ] = "auto"
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Stop after so many; unset = the context's end."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. This and the next: unset = the checkpoint's own.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of this probability.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the best.")] = None
    seed: Annotated[
        int | None, typer.Option(help="With a seed the text depends on weights, prompt and seed alone.")
    ] = None


@dataclass(frozen=True)
class Generate(Choice):
    """The options of `generate`."""

    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; - or nothing reads it from stdin.")
    ] = None
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="As a user's message, or as text to continue. Unset: --chat where the checkpoint has a chat "
            "template, --raw where it has none and for the embedded pair, which knows code better than talk.",
        ),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False


@dataclass(frozen=True)
class Talk(Choice):
    """The options of `chat`."""

    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None


@dataclass(frozen=True)
class Report(Debug):
    """The options of `pairs` and `doctor`."""

    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False


def command(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Register a function of one options dataclass: its fields become the command's arguments and options."""
    options = get_type_hints(run)["options"]
    hints = get_type_hints(options, include_extras=True)

    def call(**values: Any) -> None:
        try:
            run(options(**values))
        except BrokenPipeError:
            raise typer.Exit(_drop_stdout()) from None

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


@command
def generate(options: Generate) -> None:
    """Continue a text or answer a message. The text goes to stdout, one line of statistics to stderr."""
    prompt = _read_prompt(options)
    sampling, width = _sampling_changes(options), _width(options.width)
    pair = _load(options)
    as_chat = options.chat
    if as_chat is None:
        as_chat = pair.text.has_template and options.model != EMBEDDED
    events: Any = pair.stream(
        [{"role": "user", "content": prompt}] if as_chat else prompt,
        replace(pair.default_sampling, **sampling),
        width=width,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop or ()),
    )
    with closing(events):
        if options.as_json:
            _print_json(_collect(events))
        else:
            _report_stats(_show(events))


@command
def chat(options: Talk) -> None:
    """Talk in turns. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply."""
    sampling, width = _sampling_changes(options), _width(options.width)
    pair = _load(options)
    if not pair.text.has_template:
        raise RequestError(f"{options.model} has no chat template (a base model?); use `mlx-mtp generate`")
    conversation = pair.chat(options.system)
    chosen = replace(pair.default_sampling, **sampling)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            _say("the conversation is forgotten")
            continue
        try:
            events: Any = conversation.send(line, chosen, width=width, max_tokens=options.max_tokens)
            with closing(events), _interrupt_as_flag() as interrupted:
                stats = _show(events, interrupted)
        except RequestError as error:  # such as a full context: /reset helps, leaving does not
            _say(str(error))
            continue
        _report_stats(stats)


@command
def pairs(options: Report) -> None:
    """List the published targets with their drafters, and what of them fits into this machine's memory."""
    from mlx_mtp.doctor import memory_bytes
    from mlx_mtp.pairs import fits

    known = fits(memory_bytes())
    if options.as_json:
        _print_json(
            [
                {
                    "target": pair.target,
                    "drafter": pair.drafter,
                    "quantised": pair.quantised,
                    "params": int(pair.params),
                    "weight_bytes": {str(bits): pair.weight_bytes(bits) for bits in (16, 8, 4)},
                    "fits_bits": bits,
                }
                for pair, bits in known
            ]
        )
        return
    rows = [
        (
            pair.target,
            pair.drafter,
            *(f"{pair.weight_bytes(bits) / 1e9:.1f}" for bits in (16, 8, 4)),
            f"{bits} bit" if bits else "no",
        )
        for pair, bits in known
    ]
    _print_table(("target", "drafter (--drafter auto)", "GB, 16 bit", "8 bit", "4 bit", "fits here"), rows)


@command
def doctor(options: Report) -> None:
    """Show what this machine has, what of it is used, what is not, and why."""
    from mlx_mtp import kernels
    from mlx_mtp.doctor import facts

    found = facts(kernels.report())
    if options.as_json:
        _print_json([asdict(fact) for fact in found])
    else:
        _print_table(("item", "state", "reason"), [(fact.item, fact.state, fact.reason) for fact in found])


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
        return _drop_stdout()
    except typer.TyperException as error:
        return _fail(error, f"{error.format_message()} (see mlx-mtp --help)", 2, argv)
    except MlxMtpError as error:
        return _fail(error, str(error), 2, argv)
    except Exception as error:  # the last resort: whatever it is, the user sees one line
        message = f"internal error: {type(error).__name__}: {error}"
        return _fail(error, f"{message}; run again with --debug to see where", 1, argv)


def _drop_stdout() -> int:
    """Nobody reads stdout any more: keep what is buffered from failing again when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _fail(error: Exception, message: str, code: int, argv: list[str]) -> int:
    if "--debug" in argv:
        traceback.print_exception(error)
    _say(message)
    return code


def _say(message: str) -> None:
    """One line on stderr."""
    print("mlx-mtp:", " ".join(message.split()), file=sys.stderr, flush=True)


def _read_prompt(options: Generate) -> str:
    if options.file is not None:
        if options.prompt is not None:
            raise RequestError("the prompt is given twice; give it as an argument or with --file")
        return _read_file(options.file)
    if options.prompt is not None and options.prompt != "-":
        return options.prompt
    if options.prompt is None and sys.stdin.isatty():
        raise RequestError("no prompt; give it as an argument, with --file, or on stdin")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error


def _sampling_changes(options: Choice) -> dict[str, Any]:
    """The sampling options that were given, checked before anything is loaded."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    given = {name: value for name in names if (value := vars(options)[name]) is not None}
    Sampling(**given)
    return given


def _width(text: str) -> int | str:
    """The --width option, a number or a word, checked before anything is loaded."""
    from mlx_mtp.depth import depth_of

    try:
        width: int | str = int(text)
    except ValueError:
        width = text
    depth_of(width)
    return width


def _load(options: Choice) -> Pair:
    from mlx_mtp.pair import load

    with _progress() as report:
        pair = load(
            options.model,
            None if options.drafter == "none" else options.drafter,
            quantize_drafter=options.quantize_drafter,
            dtype=options.dtype,
            report=report,
        )
    for warning in pair.warnings:
        _say(f"warning: {warning}")
    return pair


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr for what has a known size; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def report(stage: str, done_bytes: int, total_bytes: int) -> None:
        if not total_bytes:  # a download begins, and huggingface_hub shows its own bars
            bar.stop()
            _say(stage)
            return
        bar.start()
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total_bytes)
        bar.update(tasks[stage], completed=done_bytes, total=total_bytes)

    try:
        yield report
    finally:
        bar.stop()


def _show(events: Iterator[Event], interrupted: Callable[[], bool] = lambda: False) -> Stats | None:
    """Write a stream's text to stdout as it comes; returns its statistics, None if it was interrupted."""
    last, stats = "\n", None
    try:
        for event in events:
            if event.text:
                last = event.text
                sys.stdout.write(event.text)
                sys.stdout.flush()
            stats = event.stats
            if interrupted():
                break
    finally:
        # On a terminal the next line starts at the left; in a file the text is the text and nothing else.
        if sys.stdout.isatty() and not last.endswith("\n"):
            sys.stdout.write("\n")
    return stats


def _collect(events: Iterator[Event]) -> dict[str, Any]:
    """The one object that `generate --json` prints."""
    tokens: list[int] = []
    text, reason, stats = "", None, Stats()
    for event in events:
        tokens += event.tokens
        text += event.text
        reason, stats = event.finish_reason, event.stats or stats
    return {"tokens": tokens, "text": text, "finish_reason": reason, **stats.to_json()}


def _report_stats(stats: Stats | None) -> None:
    """The line of statistics on stderr."""
    if stats is None:
        return
    parts = [f"{stats.generated_tokens} tokens", f"{stats.tokens_per_round:.2f} per round"]
    if stats.drafted:
        by_position = " ".join(f"{share:.0%}" for share in stats.acceptance_by_position)
        parts.append(f"{stats.kept / stats.drafted:.0%} of drafts kept (by position {by_position})")
    else:
        parts.append("nothing drafted")
    parts.append(f"{stats.decode_tok_s:.1f} tok/s")
    parts.append(f"prompt {stats.prompt_tokens} tokens, {stats.prefill_tok_s:.0f} tok/s")
    parts.append(f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB")
    print(", ".join(parts), file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D or the end of stdin. Ctrl-C drops a line begun."""
    typing = sys.stdin.isatty() and sys.stdout.isatty()
    if typing:
        import readline  # noqa: F401  (importing it gives input() a history and arrow keys)
    while True:
        try:
            line = input("> ") if typing else _next_line()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            if typing:
                print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def _next_line() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


@contextmanager
def _interrupt_as_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is read between rounds, so that none is torn; a second one acts at once."""
    hits: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table as wide as the terminal; in a file or pipe no line is broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False).print(table)


def _make_printable(stream: Any) -> None:
    """A terminal whose encoding lacks a character shows a substitute instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
