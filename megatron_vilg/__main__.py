"""``python -m megatron_vilg`` is ``vilg``; ``torchrun ... -m megatron_vilg`` and ``srun`` use it."""

from __future__ import annotations

import sys

from megatron_vilg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
