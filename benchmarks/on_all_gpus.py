"""Runs a list of benchmark jobs over all visible GPUs at once, one process a GPU, and joins what they measured.

    python benchmarks/on_all_gpus.py fused --output OUT --budget 540       # every table of the fused target: 8 GPUs, ~8 min
    python benchmarks/on_all_gpus.py fused --output OUT --only 'fx2ait*'   # some of its jobs
    python benchmarks/on_all_gpus.py tensorrt --output OUT --budget 540    # in an environment with TensorRT
    python benchmarks/on_all_gpus.py tensorrt --output OUT --missing       # what benchmarks/results has no finished job of
    python benchmarks/on_all_gpus.py fused --list                          # what there is, with estimates

then, where the repository is (no GPU needed): `python benchmarks/merge_results.py OUT/parts`, `gpu_plots.py`, `make tables`.
On one GPU give a larger budget, or take the list in pieces (`--only`, or `--slice 1/4` ... `4/4`), each with an output
folder of its own; parts of all of them can be merged one after another.

OUT/parts/<machine>/ has the parts, OUT/logs/ a log a job, OUT/parts/<machine>/jobs_<list>.json what became of each job:
done, failed, ended at its time limit, or not started because the budget was used up. OUT/results has the parts joined with
what benchmarks/results has. Jobs never share a GPU; each has cores of its own (processor affinity, OMP_NUM_THREADS) and
empty caches of accelkit's, and the results say how many GPUs were in use at once.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merge_results
from gpu_jobs import LISTS, Job, run_of

HERE = Path(__file__).resolve().parent
CLEAN_UP_S = 15.0
"""Of the budget, kept for ending what still runs and joining the parts."""
TIMING_S = 40.0
"""Of a job's time, kept for timing what is built when it must stop building."""
LEAST_SHARE = 0.5
"""A job with less than this share of its estimate left is not started."""
POLL_S = 0.2


@dataclass
class Running:
    """A job that runs."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    started: float
    ends: float
    folder: str


@dataclass
class Launcher:
    """Jobs on slots: a slot is a GPU, or just a process where there is none.

    Attributes:
        name: of the list. slots: identifiers for CUDA_VISIBLE_DEVICES; empty strings where there is no GPU.
        budget_s: for all of it, from now.
    """

    name: str
    jobs: list[Job]
    slots: list[str]
    output: Path
    budget_s: float
    more: tuple[str, ...] = ()
    began: float = field(default_factory=time.perf_counter)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    running: dict[int, Running] = field(default_factory=dict)

    @property
    def ends(self) -> float:
        return self.began + self.budget_s - CLEAN_UP_S

    def go(self) -> None:
        """Run until all is done or the budget is used up; nothing that was started survives this."""
        waiting = sorted(self.jobs, key=lambda job: (job.rank, -job.seconds))
        try:
            while waiting or self.running:
                self._reap()
                if time.perf_counter() > self.ends:
                    break
                for slot in range(len(self.slots)):
                    job = next((job for job in waiting if self._fits(job)), None)
                    if slot not in self.running and job is not None:
                        waiting.remove(job)
                        self._start(job, slot)
                if not self.running and not any(map(self._fits, waiting)):
                    break
                time.sleep(POLL_S)
        finally:
            for running in list(self.running.values()):
                self._end(running, "ended: the budget was used up")
        for job in waiting:
            self._tell(job, "not started: too little of the budget was left")

    def _fits(self, job: Job) -> bool:
        return time.perf_counter() + job.seconds * LEAST_SHARE < self.ends

    def _start(self, job: Job, slot: int) -> None:
        now = time.perf_counter()
        ends = min(now + job.limit_s, self.ends)
        folder = tempfile.mkdtemp(prefix="accelkit-job-")
        cores = _cores(slot, len(self.slots))
        budget = ("--budget", f"{max(1.0, ends - now - TIMING_S):.0f}") if "--budget" not in job.arguments else ()
        command = [
            sys.executable, str(HERE / job.script), *job.arguments, *self.more, *budget, "--part", job.name,
            "--run", run_of(self.name), "--at-once", str(len(self.slots)), "--output", str(self.output / "parts"),
        ]  # fmt: skip
        environment = {
            **os.environ, "ACCELKIT_CACHE_DIR": folder, "OMP_NUM_THREADS": str(len(cores)), "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": str(min(16, len(cores))),
        }  # fmt: skip
        if self.slots[slot]:
            environment["CUDA_VISIBLE_DEVICES"] = self.slots[slot]
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        with open(self.output / "logs" / f"{job.name}.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)  # before it has threads of its own, which inherit it
        self.running[slot] = Running(job, process, slot, now, ends, folder)
        self._say(f"{job.name} starts on {self._where(slot)}")

    def _reap(self) -> None:
        for running in list(self.running.values()):
            code = running.process.poll()
            if code is not None:
                self._end(running, "done" if code == 0 else f"failed, exit code {code}: {self._last_line(running.job)}")
            elif time.perf_counter() > running.ends:
                late = running.ends < self.ends
                self._end(running, "ended: its time limit" if late else "ended: the budget was used up")

    def _end(self, running: Running, status: str) -> None:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)  # its session: compilers and builders that it started too
            running.process.wait()
        del self.running[running.slot]
        shutil.rmtree(running.folder, ignore_errors=True)
        seconds = time.perf_counter() - running.started
        self._tell(running.job, status, seconds=round(seconds, 1), slot=running.slot)

    def _tell(self, job: Job, status: str, **facts: Any) -> None:
        known = {"estimate_s": job.seconds, "command": _shown(job), "gpus_at_once": len(self.slots)}
        self.outcomes.append({"job": job.name, "status": status, **known, **facts})
        self._say(f"{job.name}: {status}" + (f" [{facts['seconds']} s]" if facts else ""))

    def _last_line(self, job: Job) -> str:
        lines = (self.output / "logs" / f"{job.name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def _where(self, slot: int) -> str:
        return f"GPU {self.slots[slot]}" if self.slots[slot] else f"process {slot}"

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:4.0f} s] {text}", flush=True)

    def write(self) -> Path:
        """What became of the jobs."""
        from accelkit.measure import write_results

        seconds = round(time.perf_counter() - self.began, 1)
        return write_results(f"{merge_results.JOBS}{self.name}", self.outcomes, self.output / "parts", seconds=seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    jobs = chosen(LISTS[options.list_name], options.only, options.slice)
    if options.missing:
        jobs = [job for job in jobs if job.name not in done_before(options.list_name)]
    slots = options.gpus.split(",") if options.gpus else visible_gpus()
    slots = slots or [""] * options.processes
    if options.list:
        for job in sorted(jobs, key=lambda job: (job.rank, -job.seconds)):
            print(f"{job.seconds:5.0f} s  rank {job.rank}  {job.name}\n         {_shown(job)}")
        share = sum(job.seconds for job in jobs) / len(slots)
        print(f"{len(jobs)} jobs, about {share / 60:.1f} minutes on {len(slots)} of these GPUs")
        return 0
    if options.output is None:
        raise SystemExit("--output FOLDER says where parts, logs and results go")
    launcher = Launcher(options.list_name, jobs, slots, options.output, options.budget, tuple(options.more))
    launcher.go()
    path = launcher.write()
    written = merge_results.merge_folder(options.output / "parts", options.output / "results", merge_results.RESULTS)
    done = sum(outcome["status"] == "done" for outcome in launcher.outcomes)
    print(f"{done} of {len(jobs)} jobs done; {len(written)} results files in {options.output / 'results'}; {path}")
    return 0 if done == len(jobs) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list_name", metavar="LIST", choices=list(LISTS), help=f"of {', '.join(LISTS)}")
    parser.add_argument("--output", type=Path, help="folder for parts, logs, results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (default: 540)")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="jobs whose names match, such as 'bert*'")
    parser.add_argument("--slice", metavar="I/N", help="every N-th job of the list, from the I-th on")
    parser.add_argument("--missing", action="store_true", help="jobs that are not recorded as done on this machine")
    parser.add_argument("--gpus", help="such as 0,1 (default: all that are visible)")
    parser.add_argument("--processes", type=int, default=1, help="at once where there is no GPU (default: 1)")
    parser.add_argument("--list", action="store_true", help="show the jobs and run nothing")
    parser.epilog = "Options after a lone -- are given to every job: -- --tiny --device cpu"
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given
    options = parser.parse_args(own)
    options.more = given[len(own) + 1 :]
    return options


def chosen(jobs: Sequence[Job], only: Sequence[str] | None, part: str | None) -> list[Job]:
    """Jobs by patterns, then by slice.

    Raises:
        SystemExit: a pattern that matches none; a slice that is none.
    """
    for pattern in only or ():
        if not any(fnmatch.fnmatchcase(job.name, pattern) for job in jobs):
            raise SystemExit(f"--only {pattern}: no job has such a name; --list shows them")
    kept = [job for job in jobs if not only or any(fnmatch.fnmatchcase(job.name, p) for p in only)]
    if part is None:
        return kept
    first, _, count = part.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise SystemExit(f"--slice {part}: it should be such as 1/4")
    return sorted(kept, key=lambda job: (job.rank, -job.seconds))[int(first) - 1 :: int(count)]


def done_before(list_name: str, results: Path = merge_results.RESULTS) -> set[str]:
    """Names of the list's jobs that this machine's recorded results have as done."""
    from accelkit.measure import machine_name

    path = results / machine_name() / f"{merge_results.JOBS}{list_name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["job"] for row in rows if row["status"] == "done"}


def visible_gpus() -> list[str]:
    """Identifiers for CUDA_VISIBLE_DEVICES: the environment's own, else numbers."""
    import torch

    count = torch.cuda.device_count()
    given = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return given[:count] if given else [str(index) for index in range(count)]


def _cores(slot: int, slots: int) -> list[int]:
    """The slot's own cores: neighbours, since they share caches and memory."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(known) // slots)
    first = slot * each % len(known)
    return known[first : first + each]


def _shown(job: Job) -> str:
    return f"python benchmarks/{' '.join((job.script, *job.arguments))}"


if __name__ == "__main__":
    sys.exit(main())
