"""The process of one contender of `distilbert-fast compare`: it answers once, and then is timed whenever it is asked.

JSON lines in and out. The first line out, {"first": …}, says that the first answer is there; each line in, {"pairs": …,
"batch": B}, is answered by the seconds of one pass over these pairs, after a call that is not timed; {"peak": true} by
the most resident memory so far. What goes wrong is answered by {"error": …}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    given = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print

    def say(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        _serve(given, say)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"})
        raise


def _serve(given: Mapping[str, Any], say: Any) -> None:
    import torch

    from distilbert_fast.data.stsb_lengths import PairLengths
    from distilbert_fast.jobs.contenders import CONTENDERS, batch_of, load_contender, vocabulary

    torch.set_num_threads(given["threads"])
    one, directory = CONTENDERS[given["name"]], Path(given["directory"])
    call = load_contender(one, directory)
    words = vocabulary(one, directory)
    with torch.inference_mode():
        call(batch_of(one, [PairLengths(*given["first"])], words, 0)).tolist()
        say({"first": True})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked.get("peak"):
                say({"peak_bytes": _peak()})
                continue
            pairs, size = [PairLengths(*pair) for pair in asked["pairs"]], asked["batch"]
            batches = [batch_of(one, pairs[start : start + size], words, start) for start in range(0, len(pairs), size)]
            call(batches[0])
            seconds = 0.0
            for batch in batches:
                start = time.perf_counter()
                call(batch)
                seconds += time.perf_counter() - start
            say({"seconds": seconds})


def _peak() -> int:
    """The most resident memory of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
