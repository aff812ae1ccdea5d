"""BERT-base on a GPU: `bert_tools.py` there. Rows of 128 tokens, full ones and ones that are text to 40 % in the mean.

    python benchmarks/bert_tools.py --quick                                  # fp16, batch 1, 8, 64
    python benchmarks/bert_tools.py --model bert-base-128-padded             # with padding alone
    python benchmarks/bert_tools.py --device cpu --tiny --target eager       # the same code on a tiny model

Writes benchmarks/results/<machine>/bert_tools.json and bert_tools_padded.json. Padded rows are compared on their text;
accelkit runs them with its remove_padding pass and without, and their floor counts the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_peers import ACCELKIT, PEERS, Peer, accelkit_on, default_passes_with, remove_padding
from gpu_run import Experiment, main

BATCHES, QUICK = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 64)
PADDED_PEERS = {
    **{key: peer for key, peer in PEERS.items() if key != ACCELKIT},
    "accelkit-padded": Peer("accelkit, padding kept", accelkit_on(None, default_passes_with("remove_padding", None))),
    ACCELKIT: Peer("accelkit, remove_padding", accelkit_on(None, remove_padding)),
}
EXPERIMENTS = [
    Experiment(
        "bert_tools", "BERT-base, 128 tokens, full rows", "bert-base-128", BATCHES, QUICK, ("fp32", "tf32", "fp16")
    ),
    Experiment(
        "bert_tools_padded", "BERT-base, rows of 128 tokens, 40 % of them text", "bert-base-128-padded",
        BATCHES, QUICK, ("fp16",), PADDED_PEERS,
    ),
]  # fmt: skip


def run(arguments: Sequence[str] | None = None) -> int:
    return main(EXPERIMENTS, __doc__ or "", arguments)
