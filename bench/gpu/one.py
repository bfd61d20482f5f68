"""python -m bench.gpu.one NAME: launch one op a few times, for a profiler; without a NAME, print the names.

ncu --set basic --kernel-name _kl_div_fwd_kernel --launch-skip 1 --launch-count 1 python -m bench.gpu.one kl_div
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench.gpu.records import Where
from bench.gpu.tune import calls

CALLS = 3  # the first compiles


def named(where: Where) -> dict[str, Callable[[], object]]:
    """The calls that are tuned: ``kl_div``, ``attention`` of ``64 x 512`` …"""
    return {f"{op}, {what}" if what else op: call for op, what, call in calls(where)}


def main(arguments: list[str]) -> None:
    found = named(Where.here())
    if len(arguments) != 1 or arguments[0] not in found:
        raise SystemExit("usage: python -m bench.gpu.one NAME, one of: " + "; ".join(found))
    for _ in range(CALLS):
        found[arguments[0]]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
