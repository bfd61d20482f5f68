"""A pipeline of transformers, before and after optimize(): python examples/faster_pipeline.py MODEL TEXT…"""

from __future__ import annotations

import sys
import time

import transformers

import distilbert_fast


def main(model: str, *texts: str) -> None:
    classify = transformers.pipeline("text-classification", model)
    for way in ("transformers", "fp32", "int8"):
        if way != "transformers":
            distilbert_fast.optimize(classify.model, way)
            classify(list(texts))  # weights are packed at the first call
        start = time.perf_counter()
        answers = classify(list(texts))
        print(f"{way}: {1e3 * (time.perf_counter() - start):.1f} ms", *answers, sep="\n  ")
    print(distilbert_fast.explain(classify.model))


if __name__ == "__main__":
    main(*sys.argv[1:])
