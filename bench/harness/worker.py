"""The child's end of a worker: a process pinned to its cores. JSON lines in, JSON lines out.

The first line out is {"ready": true, ...}; then every line in is answered with one. What goes wrong is answered by
{"error": reason}, after which a process that cannot be built ends. What libraries print goes to the process's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from bench.harness.errors import reason

PR_SET_PDEATHSIG = 1
Message = Mapping[str, Any]


def serve(build: Callable[[Message], tuple[Message, Callable[[Message], Message]]]) -> None:
    """Build from what the command line gives, {"cores", ...}: what is said when ready, and what answers messages."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped between turns, it would outlive its parent
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        ready, answer = build(given)
    except Exception as error:
        say({"error": reason(error)})
        raise
    say({"ready": True, **ready})
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": reason(error)}
        say(reply)
