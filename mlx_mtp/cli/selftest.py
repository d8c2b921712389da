"""`selftest`: what to run first on a machine that nobody has tried, and a file to send."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli.app import Debug, command
from mlx_mtp.cli.output import say
from mlx_mtp.rows import RequestError

if TYPE_CHECKING:
    from mlx_mtp.selftest import Check

TOKENS = 24  # of every output


@dataclass(frozen=True)
class SelfTest(Debug):
    """The options of `selftest`."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path(
        "mlx-mtp-selftest.json"
    )
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Beside mlx-lm too, where that is installed.")
    ] = True


@command
def selftest(options: SelfTest) -> None:
    """Try this machine in under three minutes: kernels, exact outputs, memory. Needs no download.

    Prints a line a check, and writes one JSON file to attach to a report: no
    user name, host name or folder is in it. Exit code 1 if a check failed.
    """
    from mlx_mtp.selftest import checked, without_private

    _write(options.output, {})  # a folder that cannot be written to is no news after three minutes
    private, found = _private(), []
    for name, run in _checks(options):
        say(f"{name} ...")
        found.append(checked(name, run))
        shown = without_private(found[-1].detail, private)
        print(f"{found[-1].result.upper()} {name}: {shown} ({found[-1].seconds:.1f} s)", flush=True)
    failed = [check.name for check in found if check.result == "fail"]
    report = {"passed": not failed, "machine": _machine(), "checks": [asdict(check) for check in found]}
    _write(options.output, without_private(report, private))
    print(f"{'FAIL: ' + ', '.join(failed) if failed else 'PASS'}; the report is in {options.output}")
    if failed:
        raise typer.Exit(1)


def _checks(options: SelfTest) -> Iterator[tuple[str, Callable[[], Check]]]:
    from mlx_mtp import selftest as parts

    yield "environment", parts.environment
    yield "memory", parts.memory
    yield "exactness", lambda: parts.exactness(TOKENS)
    if options.compare:
        yield "compare", _compare


def _compare() -> Check:
    """The embedded pair beside mlx-lm: the same text, and how fast."""
    from mlx_mtp.cli.compare import Compare, measured
    from mlx_mtp.selftest import Check, judged_tables

    if find_spec("mlx_lm") is None:
        return Check("not run", "mlx-lm is not installed (pip install 'mlx-mtp[compare]')")
    asked = Compare(kind=["code"], batch=[1, 4], tokens=48, repeats=2, groups=1)
    return judged_tables(list(measured(asked)))


def _machine() -> dict[str, str]:
    from mlx_mtp import __version__
    from mlx_mtp.provenance import provenance

    machine = provenance([], __version__)
    del machine["command"]
    return machine


def _private() -> dict[str, str]:
    """What must not be in a report, and what takes its place."""
    found = {str(Path.home()): "~", str(Path.home().resolve()): "~"}
    for host in (socket.gethostname(), platform.node()):
        found |= {host: "<host>", host.split(".")[0]: "<host>"}
    try:
        found[getpass.getuser()] = "<user>"
    except (OSError, KeyError):
        pass  # the system knows none
    return found


def _write(file: Path, report: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}; name another with --output") from error
