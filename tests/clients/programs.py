"""Running other people's programs: where they are installed, a home of their own, no network but this machine's.

`make test-clients` installs them into the folder .clients, and says what they need.
"""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIENTS = HERE.parent.parent / ".clients"
LIMIT_S = 300.0  # a prompt of 30,000 tokens takes a CPU half a minute, where nothing else runs
NOWHERE = "http://127.0.0.1:9"  # the port of "discard", which nobody serves


@dataclass(frozen=True)
class Ran:
    """A program that has ended."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"


@dataclass(frozen=True)
class Desk:
    """A user's desk: a home, and a folder to work in."""

    home: Path
    place: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a program: this desk's home; whatever would go to other machines goes nowhere."""
        proxies = {f"{name}_PROXY": NOWHERE for name in ("HTTP", "HTTPS", "ALL")} | {"NO_PROXY": "127.0.0.1,localhost"}
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TERM": "dumb",
            "NO_COLOR": "1",
            "DO_NOT_TRACK": "1",
            "npm_config_offline": "true",
            "NODE_OPTIONS": f'--require "{HERE / "offline.cjs"}"',
            **proxies,
            **{name.lower(): value for name, value in proxies.items()},
            **more,
        }

    def run(self, program: Path, *arguments: str, **variables: str) -> Ran:
        """Run a program in this place to its end; what it leaves running in its process group is ended."""
        process = subprocess.Popen(
            [str(program), *arguments],
            cwd=self.place,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        late = False
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            late = True
        end(process)
        if late:
            out, err = process.communicate()
        ran = Ran(process.returncode, out, err)
        assert not late, f"{program.name} was not done after {LIMIT_S:g} s; {ran}"
        return ran


def end(process: subprocess.Popen) -> None:
    """End a process that leads a group, and all of the group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says the latter where only a zombie is left
        pass


def node(name: str) -> Path:
    """A program that npm has installed."""
    return _installed(CLIENTS / "npm" / "node_modules" / ".bin" / name)


def python(name: str) -> Path:
    """A program that pip has installed, in a virtual environment of the same name."""
    return _installed(CLIENTS / name / "bin" / name)


def _installed(program: Path) -> Path:
    assert program.exists(), f"{program} is missing; `make test-clients` installs it"
    return program
