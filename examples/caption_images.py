"""Caption pictures from Python: greedy, beam search, the best of 32, and how likely the model finds a caption.

Usage: ``python examples/caption_images.py runs/demo picture.png [PICTURE ...]``
"""

from __future__ import annotations

import sys

from megatron_vilg.generate.pipeline import Pipeline


def main(run: str, pictures: list[str]) -> None:
    """Print the captions of each picture and their log-likelihoods."""
    pipeline = Pipeline.load(run)
    ids = pipeline.encode_images(pictures)  # [pictures, codes]: pictures are read once
    ways = {
        "greedy": pipeline.caption(ids),
        "beam 5": pipeline.caption(ids, beam=5),
        "best of 32": pipeline.caption_of_candidates(ids, 32),  # checked by the direction that draws
    }
    for name, captions in ways.items():
        scores = pipeline.caption_log_likelihood(ids, captions)
        for picture, caption, score in zip(pictures, captions, scores.tolist(), strict=True):
            print(f"{picture}\t{name}\t{caption}\t{score:.1f} nats")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
