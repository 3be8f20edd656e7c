"""Draw pictures from Python: load a run, draw, look at what the model itself thinks of them.

Usage: ``python examples/generate_images.py runs/demo 水彩画的红苹果 [PROMPT ...]``
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megatron_vilg.data.images import to_image
from megatron_vilg.generate.pipeline import Pipeline


def main(run: str, prompts: list[str], out: Path = Path("drawn")) -> None:
    """Draw eight pictures per prompt, save the two that both directions of the model find likeliest."""
    pipeline = Pipeline.load(run)
    settings = dataclasses.replace(pipeline.config.sample, guidance=2.0, rerank=8)
    ids, _ = pipeline.draw_best_ids(prompts, num_images=2, settings=settings, seed=0)  # [prompts, 2, codes]
    out.mkdir(parents=True, exist_ok=True)
    for row, prompt in enumerate(prompts):
        for rank, pixels in enumerate(pipeline.decode(ids[row])):
            path = out / f"{row}-{rank}.png"
            to_image(pixels).save(path)
            print(f"{path}\t{prompt}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
