"""`generate` and `chat`: one text, or a conversation, on stdout."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli.app import command
from mlx_mtp.cli.choice import EMBEDDED, Choice, load_pair, measure_costs, parse_width, sampling_changes
from mlx_mtp.cli.output import print_json, say
from mlx_mtp.rows import Event, RequestError, Stats

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair


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


@command
def generate(options: Generate) -> None:
    """Continue a text or answer a message. The text goes to stdout, one line of statistics to stderr."""
    prompt = _read_prompt(options)
    sampling, width = sampling_changes(options), parse_width(options.width)
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
    measure_costs(pair, options)
    with closing(events):
        if options.as_json:
            print_json(_collect(events))
        else:
            _report_stats(_show(events))
    if pair.doubt:
        say(f"warning: {pair.doubt}")


@command
def chat(options: Talk) -> None:
    """Talk in turns. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply."""
    sampling, width = sampling_changes(options), parse_width(options.width)
    pair = _load(options)
    if not pair.text.has_template:
        raise RequestError(f"{options.model} has no chat template (a base model?); use `mlx-mtp generate`")
    measure_costs(pair, options)
    conversation = pair.chat(options.system)
    chosen, doubted = replace(pair.default_sampling, **sampling), False
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            say("the conversation is forgotten")
            continue
        try:
            events: Any = conversation.send(line, chosen, width=width, max_tokens=options.max_tokens)
            with closing(events), _interrupt_as_flag() as interrupted:
                stats = _show(events, interrupted)
        except RequestError as error:  # such as a full context: /reset helps, leaving does not
            say(str(error))
            continue
        _report_stats(stats)
        if pair.doubt and not doubted:
            doubted = True
            say(f"warning: {pair.doubt}")


def _load(options: Choice) -> Pair:
    """For one text at a time, which may take all the memory."""
    from mlx_mtp.scheduler import Limits

    return load_pair(options, Limits(max_rows=1))


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
    if stats.decode_s:
        drafting = f", {stats.draft_s / stats.decode_s:.0%} drafting" if stats.draft_s else ""
        parts.append(f"{stats.device_s / stats.decode_s:.0%} of the time on the device{drafting}")
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
