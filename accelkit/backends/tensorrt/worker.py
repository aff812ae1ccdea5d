"""The build process: `python worker.py`, one job after another.

    lines on standard input: "path of a job.json" --worker_build.py--> plan file; {"result": ...} on standard output

Started by accelkit.backends.tensorrt.workers. It imports TensorRT and the small files beside it, neither torch nor accelkit,
and loads the library before there is a job. Lines on standard output, all JSON: {"ready": true} once it is loaded; of each
job {"stage": "parsing"}, {"phase": "...", "done": 3, "of": 20}, and its result. What the library itself prints goes to
standard error. It ends with its standard input, that is with its parent. Every foreseen failure is in a result; anything else
(a crash, a kill) is for the parent to notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt.job import BuildJob
    from accelkit.backends.tensorrt.worker_build import Say, run
    from accelkit.backends.tensorrt.worker_library import Library
    from accelkit.backends.tensorrt.worker_timings import Timings
else:
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, _folder)
    from job import BuildJob
    from worker_build import Say, run
    from worker_library import Library
    from worker_timings import Timings

    while _folder in sys.path:  # what TensorRT imports must not be found among the other files here
        sys.path.remove(_folder)


FORGOTTEN_S = 900.0
"""Without a job for so long the parent, which ends idle workers much earlier, has been stopped, or died without our noticing."""


def main() -> None:
    say = _own_standard_output()
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    library = Library()
    library.start()
    say({"ready": True})
    timings: dict[str, Timings] = {}
    while True:
        try:
            path = jobs.get(timeout=FORGOTTEN_S)
        except queue.Empty:
            os._exit(0)
        with open(path, encoding="utf-8") as file:
            job = BuildJob.from_json(file.read())
        result = run(job, library, timings, say)
        say({"result": result.to_json()})


def _own_standard_output() -> Say:
    """Lines for the parent on what was standard output; what anything else prints there goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()  # the progress monitor is called from the builder's threads

    def say(message: dict[str, Any]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            channel.write(json.dumps(message) + "\n")

    return say


def _read_jobs(jobs: queue.SimpleQueue[str]) -> None:
    """Until the parent closes our standard input, or is gone; then at once, even in the middle of a build.

    Without the library's own end, which takes time and has been seen to crash.
    """
    with open(0, "rb", closefd=False) as lines:
        for line in lines:
            jobs.put(json.loads(line))
    os._exit(1)


if __name__ == "__main__":
    main()
