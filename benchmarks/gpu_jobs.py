"""What on_all_gpus.py runs: lists of jobs, each one process on one GPU.

    LISTS["fused"]        the fused target beside its peers, in every table
    LISTS["kernels"]      what each kernel takes, by shape
    LISTS["tensorrt"]     TensorRT by hand and through accelkit, fp16, and what builds cost; needs TensorRT
    LISTS["tensorrt-wide"]    the same tables in fp32 and tf32

`seconds` is what a job takes on an H200 beside seven others, roughly: of a rank, the launcher starts the longest first. A job
writes its own part of a results file, so that any of them can be run again alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


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
    table(VIT, "vit-b16-384", (8,), "fp16", 150, TUNED),
    table(VIT, "vit-b16-384", (32,), "fp16", 170, TUNED),
    table(VIT, "vit-b16-384", (16,), "fp16", 32, HALF),
    table(VIT, "vit-b16-384", (1, 8, 16, 32), "fp32,tf32", 24, WIDE),
    table(VIT, "vit-l16-384", (1, 8), "fp16", 50, HALF),
    table(VIT, "vit-l16-384", (16, 32), "fp16", 55, HALF),
    table(VIT, "vit-l16-384", (1, 8), "fp32,tf32", 40, WIDE),
    table(VIT, "vit-l16-384", (16, 32), "fp32,tf32", 50, WIDE),
    table(VIT, "vit-b16-224", (1, 8, 16, 32), "fp16", 30, HALF),
    table(VIT, "vit-b16-224", (1, 8, 16, 32), "fp32,tf32", 20, WIDE),
    table(VIT, "vit-l16-224", (1, 8), "fp16", 48, HALF),
    table(VIT, "vit-l16-224", (16, 32), "fp16", 48, HALF),
    table(VIT, "vit-l16-224", (1, 8, 16, 32), "fp32,tf32", 32, WIDE),
    table(SEED_VIT, "vit-b16-224", (4,), "fp16", 40, HALF),
    table(SEED_VIT, "vit-b16-224", (4,), "fp32,tf32", 25, WIDE),
    table(ENCODER, "encoder-block", (1, 64), "fp16", 60, TUNED),
    table(ENCODER, "encoder-block", (8, 512), "fp16", 60, TUNED),
    table(ENCODER, "encoder-block", (16, 32, 128, 256), "fp16", 15, HALF),
    table(BERT, "bert-base-128", (1, 64), "fp16", 100, TUNED),
    table(BERT, "bert-base-128", (8,), "fp16", 100, TUNED),
    table(BERT, "bert-base-128", (2, 4, 16), "fp16", 22, HALF, rank=1),
    table(BERT, "bert-base-128", (32, 128, 256), "fp16", 22, HALF),
    table(BERT, "bert-base-128", (1, 8, 64), "fp32,tf32", 20, WIDE, rank=1),
    table(BERT, "bert-base-128-padded", (1, 8, 64), "fp16", 22, PADDED),
    table(BERT, "bert-base-128-padded", (2, 4, 16), "fp16", 22, PADDED, rank=1),
    table(BERT, "bert-base-128-padded", (32, 128, 256), "fp16", 22, PADDED, rank=1),
    table("xformers_vit.py", "vit-xformers-96", (1, 64), "fp16", 40),
    table("xformers_vit.py", "vit-b16-224", (1, 8), "fp16", 45),
    table("xformers_vit.py", "vit-b16-1024", (1, 4), "fp16", 60),
)
KERNELS: tuple[Job, ...] = (Job("kernel_choices", "kernel_choices.py", ("--budget", "150"), 170, 1),)

BY_HAND = ("tensorrt-torchscript", "tensorrt-torchscript-graph", "tensorrt-dynamo")
HALF_MODEL = ("tensorrt-torchscript-half", "tensorrt-dynamo-half")
ENGINES = ("eager", "graph", "compile", *BY_HAND, "accelkit", "accelkit-tensorrt")
OTHER_ENGINES = (*ENGINES[:-2], *HALF_MODEL, *ENGINES[-2:])
"""With the other way to fp16 by hand, on few shapes: which way is faster is measured there."""
WIDE_ENGINES = ("eager", *BY_HAND, "accelkit", "accelkit-tensorrt")
STREAM = ("--own-stream",)
BUILDS = "tensorrt_build.py"


def engines(script: str, model: str, batch: Sequence[int], each_s: float, peers: Sequence[str], rank: int = 0,
            precision: str = "fp16") -> Job:  # fmt: skip
    """A job with TensorRT's candidates: their builds are most of it, so it has few batch sizes."""
    job = table(script, model, batch, precision, each_s, peers, rank=rank, more=STREAM)
    return replace(job, name=f"{job.name}-engines")


TENSORRT: tuple[Job, ...] = (
    engines(VIT, "vit-b16-384", (1,), 280, OTHER_ENGINES),
    engines(VIT, "vit-b16-384", (8,), 180, ENGINES),
    engines(VIT, "vit-b16-384", (16,), 180, ENGINES),
    engines(VIT, "vit-b16-384", (32,), 300, OTHER_ENGINES),
    *(engines(VIT, "vit-b16-224", (batch,), 170, ENGINES) for batch in (1, 8, 16, 32)),
    engines(SEED_VIT, "vit-b16-224", (4,), 170, ENGINES, rank=1),
    *(engines(VIT, "vit-l16-384", (batch,), 330, ENGINES, rank=int(batch in (8, 16))) for batch in (1, 8, 16, 32)),
    *(engines(VIT, "vit-l16-224", (batch,), 320, ENGINES, rank=int(batch in (8, 16))) for batch in (1, 8, 16, 32)),
    engines(BERT, "bert-base-128", (1,), 160, ENGINES),
    engines(BERT, "bert-base-128", (8,), 240, OTHER_ENGINES),
    engines(BERT, "bert-base-128", (16,), 160, ENGINES, rank=1),
    engines(BERT, "bert-base-128", (32,), 160, ENGINES),
    engines(BERT, "bert-base-128", (64,), 160, ENGINES, rank=1),
    engines(BERT, "bert-base-128-padded", (8, 64), 160, (*ENGINES, "accelkit-padded"), rank=1),
    engines(ENCODER, "encoder-block", (1, 8, 64, 512), 45, OTHER_ENGINES),
    engines(ENCODER, "encoder-block", (16, 32, 128, 256), 35, ENGINES),
    engines("xformers_vit.py", "vit-xformers-96", (1, 64), 110, ("vanilla", *ENGINES), rank=1),
    Job("tensorrt_build-encoder-block", BUILDS, ("--model", "encoder-block", "--batch", "1,64"), 150),
    Job("tensorrt_build-vit-b16-384-1", BUILDS, ("--model", "vit-b16-384", "--batch", "1"), 300),
    Job("tensorrt_build-vit-b16-384-32", BUILDS, ("--model", "vit-b16-384", "--batch", "32"), 320, rank=1),
    Job("tensorrt_build-bert-base-128-1", BUILDS, ("--model", "bert-base-128", "--batch", "1"), 280, rank=1),
    Job("tensorrt_build-vit-l16-384-1", BUILDS, ("--model", "vit-l16-384", "--batch", "1"), 500, rank=2),
)
TENSORRT_WIDE: tuple[Job, ...] = tuple(
    engines(script, model, batches, each_s, WIDE_ENGINES, rank, precision)
    for precision in ("fp32", "tf32")
    for script, model, batches, each_s, rank in (
        *((VIT, f"vit-b16-{size}", (batch,), 130, 0) for size in (384, 224) for batch in (1, 8, 16, 32)),
        *(
            (VIT, f"vit-l16-{size}", (batch,), 240, int(batch in (8, 16)))
            for size in (384, 224)
            for batch in (1, 8, 16, 32)
        ),
        (BERT, "bert-base-128", (1, 8), 110, 0),
        (BERT, "bert-base-128", (32,), 110, 0),
        (ENCODER, "encoder-block", (1, 8, 32), 30, 0),
    )
)

LISTS: dict[str, tuple[Job, ...]] = {
    "fused": (*FUSED, *KERNELS), "kernels": KERNELS, "tensorrt": TENSORRT, "tensorrt-wide": TENSORRT_WIDE,
}  # fmt: skip
"""Lists by name."""


def run_of(list_name: str) -> str:
    """The run that a list's rows belong to: the name's first word."""
    return list_name.partition("-")[0]
