"""The command line: a module for every group of commands. stdout is data, stderr is the rest. Knows no arrays.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

from mlx_mtp.cli import compare as compare
from mlx_mtp.cli import generate as generate
from mlx_mtp.cli import plan as plan
from mlx_mtp.cli import reports as reports
from mlx_mtp.cli import selftest as selftest
from mlx_mtp.cli import serve as serve
from mlx_mtp.cli.app import app, main

__all__ = ["app", "main"]
