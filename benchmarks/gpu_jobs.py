"""What on_all_gpus.py runs: lists of jobs, each one process on one GPU.

    LISTS["fused"]        the fused target beside its peers, in every table
    LISTS["kernels"]      what each kernel takes, by shape

`seconds` is what a job takes on an H200 beside seven others, roughly: of a rank, the launcher starts the longest first. A job
writes its own part of a results file, so that any of them can be run again alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: of the job, of its log and of its part of the results file.
        script: file in benchmarks/. arguments: for it; the launcher adds output, part, run and budget.
        seconds: estimate. Ended after three times as much, and a minute.
        rank: jobs of rank 0 come first; a budget that is too small costs the others.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    seconds: float = 60.0
    rank: int = 0

    @property
    def limit_s(self) -> float:
        return 3 * self.seconds + 60


START_S = 20.0
"""Imports, the model, the ceilings."""


def table(
    script: str, model: str, batches: Sequence[int], precisions: str, each_s: float, peers: Sequence[str] = (), *,
    rank: int = 0, rounds_s: float = 3.0, more: Sequence[str] = (),
) -> Job:  # fmt: skip
    """A job of one model; `each_s` is what one batch size in one precision takes."""
    sizes = ",".join(map(str, batches))
    name = f"{script.removesuffix('.py')}-{model}-{precisions.replace(',', '-')}-{sizes.replace(',', '-')}"
    extra = ("--peers", ",".join(peers)) if peers else ()
    arguments = ("--model", model, "--batch", sizes, "--precision", precisions, "--seconds", str(rounds_s))
    seconds = START_S + each_s * len(batches) * len(precisions.split(","))
    return Job(name, script, (*arguments, *extra, *more), seconds, rank)


VIT, BERT, ENCODER, SEED_VIT = (
    "fastertransformer_vit.py",
    "bert_tools.py",
    "fx2ait_encoder.py",
    "vision_language_vit.py",
)
WIDE = ("eager", "graph", "compile", "accelkit")
HALF = (*WIDE[:3], "xformers", "xformers-graph", "onnxruntime", "accelkit", "accelkit-onnxruntime")
TUNED = ("+autotune", "+accelkit-tuned", "+accelkit-onnxruntime")
"""The default peers, and what takes minutes: few shapes have them."""
PADDED = (*HALF[:-2], "accelkit-padded", "accelkit")

FUSED: tuple[Job, ...] = (
    table(VIT, "vit-b16-384", (1,), "fp16", 150, TUNED),
    table(VIT, "vit-b16-384", (8,), "fp16", 170, TUNED),
    table(VIT, "vit-b16-384", (32,), "fp16", 190, TUNED),
    table(VIT, "vit-b16-384", (16,), "fp16", 50, HALF),
    table(VIT, "vit-b16-384", (1, 8, 16, 32), "fp32,tf32", 24, WIDE),
    table(VIT, "vit-l16-384", (1, 8), "fp16", 65, HALF),
    table(VIT, "vit-l16-384", (16, 32), "fp16", 75, HALF),
    table(VIT, "vit-l16-384", (1, 8), "fp32,tf32", 40, WIDE),
    table(VIT, "vit-l16-384", (16, 32), "fp32,tf32", 50, WIDE),
    table(VIT, "vit-b16-224", (1, 8, 16, 32), "fp16", 45, HALF),
    table(VIT, "vit-b16-224", (1, 8, 16, 32), "fp32,tf32", 20, WIDE),
    table(VIT, "vit-l16-224", (1, 8), "fp16", 60, HALF),
    table(VIT, "vit-l16-224", (16, 32), "fp16", 60, HALF),
    table(VIT, "vit-l16-224", (1, 8, 16, 32), "fp32,tf32", 32, WIDE),
    table(SEED_VIT, "vit-b16-224", (1, 4, 8, 16, 32), "fp16", 30, (*WIDE, "xformers", "onnxruntime")),
    table(SEED_VIT, "vit-b16-224", (1, 4, 8, 16, 32), "fp32", 20, WIDE),
    table(SEED_VIT, "vit-b16-224", (1, 4, 8, 16, 32), "tf32", 20, WIDE, rank=1),
    table(ENCODER, "encoder-block", (1, 64), "fp16", 70, TUNED),
    table(ENCODER, "encoder-block", (8, 512), "fp16", 70, TUNED),
    table(ENCODER, "encoder-block", (16, 32, 128, 256), "fp16", 15, HALF),
    table(BERT, "bert-base-128", (1, 64), "fp16", 120, TUNED),
    table(BERT, "bert-base-128", (8,), "fp16", 110, TUNED),
    table(BERT, "bert-base-128", (2, 4, 16), "fp16", 35, HALF, rank=1),
    table(BERT, "bert-base-128", (32, 128, 256), "fp16", 35, HALF),
    table(BERT, "bert-base-128", (1, 8, 64), "fp32,tf32", 20, WIDE, rank=1),
    table(BERT, "bert-base-128-padded", (1, 8, 64), "fp16", 35, PADDED),
    table(BERT, "bert-base-128-padded", (2, 4, 16), "fp16", 35, PADDED, rank=1),
    table(BERT, "bert-base-128-padded", (32, 128, 256), "fp16", 35, PADDED, rank=1),
    table("xformers_vit.py", "vit-xformers-96", (1, 64), "fp16", 40),
    table("xformers_vit.py", "vit-b16-224", (1, 8), "fp16", 45),
    table("xformers_vit.py", "vit-b16-1024", (1, 4), "fp16", 60),
)
KERNELS: tuple[Job, ...] = (Job("kernel_choices", "kernel_choices.py", ("--budget", "150"), 170),)

LISTS: dict[str, tuple[Job, ...]] = {"fused": (*FUSED, *KERNELS), "kernels": KERNELS}
"""Lists by name; a list's name is the run that its rows belong to."""
