"""``vilg checkpoint verify`` from a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vilg.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "verify", *sys.argv[1:]]))
