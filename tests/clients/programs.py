"""Runs other people's programs in a home of their own, without a network beyond this machine.

`make test-clients` installs them into the folder .clients.
"""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIENTS = HERE.parent.parent / ".clients"
LIMIT_S = 300.0  # a prompt of 30,000 tokens takes a CPU half a minute, on an idle machine
NOWHERE = "http://127.0.0.1:9"  # the discard port, where nothing listens


@dataclass(frozen=True)
class Ran:
    """The result of a program."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"


@dataclass(frozen=True)
class Desk:
    """A home folder and a working folder."""

    home: Path
    place: Path

    def environment(self, **more: str) -> dict[str, str]:
        """A program's environment variables. Requests to other machines go nowhere."""
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
        """Run a program to its end, then end what it left in its process group."""
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
    """End a process and its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS raises the latter if only a zombie is left
        pass


def node(name: str) -> Path:
    """A program installed by npm."""
    return _installed(CLIENTS / "npm" / "node_modules" / ".bin" / name)


def python(name: str) -> Path:
    """A program installed by pip, in a virtual environment of the same name."""
    return _installed(CLIENTS / name / "bin" / name)


def _installed(program: Path) -> Path:
    assert program.exists(), f"{program} is missing; `make test-clients` installs it"
    return program
