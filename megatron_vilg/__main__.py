"""``python -m megatron_vilg`` is ``vilg``; launchers such as ``torchrun`` and ``srun`` start it this way."""

from __future__ import annotations

import sys

from megatron_vilg.cli.main import command

if __name__ == "__main__":
    sys.exit(command())
