"""The texts of a file that are nearest to a query: python examples/nearest_texts.py MODEL FILE QUERY

MODEL is an encoder, also of sentence-transformers; FILE has a text a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from distilbert_fast import Predictor


def main(model: str, file: str, query: str, count: int = 3) -> list[str]:
    embed = Predictor.load(model, "embedding", precision="int8", normalize=True)
    texts = list(dict.fromkeys(line for line in Path(file).read_text().splitlines() if line.strip()))
    cosines = np.stack(embed(texts)) @ embed(query)
    found = [texts[at] for at in np.argsort(-cosines)[:count]]
    print(*found, sep="\n")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
