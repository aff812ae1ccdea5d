"""Run by `accelkit demo` in a new process: loads an .accel file and embeds tokenised text with it.

    python -m accelkit.cli.demo_child model.accel inputs.npz embeddings.npz

It has neither the model's class nor transformers: the file alone is enough. inputs.npz holds `0/input_ids`, ... for
each batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

import accelkit
from accelkit.persistence import read_manifest


def main(arguments: Sequence[str]) -> int:
    model_path, inputs_path, embeddings_path = arguments
    started = time.perf_counter()
    fast = accelkit.load(model_path)
    load_seconds = time.perf_counter() - started
    batches: dict[int, dict[str, torch.Tensor]] = {}
    with np.load(inputs_path, allow_pickle=False) as arrays:
        for key in arrays.files:
            number, name = key.split("/")
            batches.setdefault(int(number), {})[name] = torch.from_numpy(arrays[key])
    embeddings = torch.cat([fast(**batches[number]) for number in sorted(batches)])
    np.savez(embeddings_path, embeddings=embeddings.numpy())
    origins = sorted({piece.origin for variant in fast.report().variants for piece in variant.pieces})
    told = {
        "stats": fast.stats(),
        "origins": origins,
        "engines_in_file": len(json.loads(read_manifest(model_path))["engines"]),
        "load_seconds": load_seconds,
        "transformers": "transformers" in sys.modules,
    }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
