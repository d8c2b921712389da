"""`python -m mlx_mtp` is `mlx-mtp`."""

import sys

from mlx_mtp.cli import main

if __name__ == "__main__":
    sys.exit(main())
