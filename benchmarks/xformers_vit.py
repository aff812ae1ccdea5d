"""The xFormers ViT comparison, then and now: vanilla, memory-efficient and sparse attention; median, IQR, memory used.

    python benchmarks/xformers_vit.py --quick                      # the small ViT of the seed's second table
    python benchmarks/xformers_vit.py                              # and ViT-B/16-224, and ViT-B/16 at 4097 tokens
    python benchmarks/xformers_vit.py --device cpu --tiny --target eager

Timed with torch.utils.benchmark, as there, in rounds of all candidates that are merged. Writes
benchmarks/results/<machine>/xformers_vit_<model>.json. Sparse attention is another model: its error is taken against a
float64 run with the same pattern, and it is compared with sparse candidates alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_peers import ACCELKIT, PEERS, Call, Case, Peer, accelkit_on, run, sparse_by_hand
from gpu_run import Experiment, main
from patterns import seed_pattern
from torch.utils.benchmark import Measurement, Timer

from accelkit.measure import Timing, timing_of

ROUNDS = 3


def vanilla(case: Case) -> Call:
    """Attention as matmul, softmax, matmul: what PyTorch models did when the table was made."""
    twin = copy.deepcopy(case.model, {id(t): t for t in [*case.model.parameters(), *case.model.buffers()]})
    set_attention: Any = twin.set_attn_implementation
    set_attention("eager")
    return run(twin, case.inputs)


def with_attention(kind: str) -> Callable[[Case], list[Any]]:
    """accelkit's default passes, attention by this kernel, or "pattern": sparse, over the experiment's pattern."""

    def passes(case: Case) -> list[Any]:
        from accelkit_passes import default_passes

        attention: Any = case.pattern if kind == "pattern" else kind
        return list(default_passes(case.precision, attention=attention))

    return passes


def timer(calls: Mapping[str, Call], options: argparse.Namespace) -> dict[str, Timing]:
    """torch.utils.benchmark's blocked_autorange of each candidate in turn, several times over, merged."""
    rounds = options.rounds or ROUNDS
    seconds = 1e-3 if options.tiny else options.seconds / (rounds * len(calls))
    taken: dict[str, list[Measurement]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            one = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            taken[name].append(one.blocked_autorange(min_run_time=seconds))
    return {name: timing_of([t * 1e3 for m in found for t in m.times]) for name, found in taken.items()}


CANDIDATES = {
    "vanilla": Peer("PyTorch, vanilla attention", vanilla),
    **{key: peer for key, peer in PEERS.items() if key in ("eager", "graph", "compile", "xformers", "xformers-graph")},
    "sparse": Peer("FlexAttention by hand, sparse", sparse_by_hand, sparse=True),
    "accelkit-xformers": Peer(
        'accelkit, swap_attention("xformers")',
        accelkit_on(None, with_attention("xformers")),
    ),
    "accelkit-sparse": Peer(
        "accelkit, swap_attention, sparse",
        accelkit_on(None, with_attention("pattern")), sparse=True,
    ),
    **{key: peer for key, peer in PEERS.items() if key.startswith("tensorrt")},
    ACCELKIT: PEERS[ACCELKIT],
    "accelkit-tensorrt": PEERS["accelkit-tensorrt"],
}  # fmt: skip

EXPERIMENTS = [
    Experiment(
        f"xformers_vit_{name}", f"The xFormers table: {title}", model, batches=batches, quick=batches[:1],
        precisions=("fp16",), peers=CANDIDATES, pattern=seed_pattern, clock=timer,
    )
    for name, title, model, batches in (
        ("small", "a ViT of 8 layers, 96 wide", "vit-xformers-96", (1, 64)),
        ("b16_224", "ViT-B/16-224", "vit-b16-224", (1, 8)),
        ("b16_1024", "ViT-B/16 at 1024 x 1024 (4097 tokens)", "vit-b16-1024", (1, 4)),
    )
]  # fmt: skip


def measure(arguments: Sequence[str] | None = None) -> int:
    return main(EXPERIMENTS, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(measure())
