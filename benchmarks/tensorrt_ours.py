"""accelkit's TensorRT target with the build's time split: TensorRT's parse and build, and accelkit's own around them.

fast, facts = optimized(model, inputs, "fp16")
facts["seconds"]       # {"optimize": 68.2, "start": 8.0, "tensorrt": 57.0, "own": 3.2}
call = raw_call(fast, inputs)   # its engine by execute_async_v3 on bound buffers, without accelkit
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tensorrt_by_hand import BoundCall, bind, library, load, names_of
from torch import nn

from accelkit.models import Inputs


@dataclass(frozen=True)
class Optimized:
    """A compiled model.

    Attributes:
        model: call it.
        facts: for a row: seconds (`start`: until TensorRT is loaded in the build process), bytes of the engine, what it says
            about itself.
        plans: of the engines that were built, not taken from a cache.
    """

    model: Any
    facts: dict[str, Any]
    plans: list[bytes]


def optimized(model: nn.Module, inputs: Inputs, precision: str, *, cache: bool = False, **options: Any) -> Optimized:
    """The model on accelkit's TensorRT target.

    Args:
        options: of the target (`cuda_graph=False`, `refittable=True`).
    """
    import accelkit
    from accelkit.backends.tensorrt.backend import TensorRT

    with recorded_builds() as builds:
        started = time.perf_counter()
        fast = accelkit.optimize(
            model, inputs, target=TensorRT(**options), precision=precision, cache=cache, progress=False
        )
        total = time.perf_counter() - started
    inside = sum(result.seconds.get("parse", 0.0) + result.seconds.get("build", 0.0) for _, result in builds)
    (variant,) = fast.report().to_json()["variants"]
    start = sum(result.seconds.get("start", 0.0) + result.seconds.get("wait", 0.0) for _, result in builds)
    seconds = {"optimize": total, "start": start, "tensorrt": inside, "own": total - inside - start}
    facts = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "stages_seconds": variant["seconds"],
        "engine_bytes": sum(len(plan) for plan, _ in builds) or None,
        "timing_cache_bytes": [result.timing_cache_bytes for _, result in builds if result.timing_cache_bytes],
        "pieces": len(variant["pieces"]),
        "torch_operators": variant["torch_operators"],
        "origins": [piece["origin"] for piece in variant["pieces"]],
        "precisions": [piece["precisions"] for piece in variant["pieces"]],
        "notes": [note for piece in variant["pieces"] for note in piece["notes"]],
    }
    return Optimized(fast, facts, [plan for plan, _ in builds])


@contextmanager
def recorded_builds() -> Iterator[list[tuple[bytes, Any]]]:
    """(plan, accelkit's BuildResult) of each engine that TensorRT builds meanwhile."""
    from accelkit.backends.tensorrt import backend, building

    builds: list[tuple[bytes, Any]] = []
    original = building.build_plan

    def build_plan(*args: Any, **named: Any) -> Any:
        plan, result = original(*args, **named)
        builds.append((plan, result))
        return plan, result

    users = [module for module in (building, backend) if getattr(module, "build_plan", None) is original]
    for module in users:
        setattr(module, "build_plan", build_plan)  # noqa: B010 - a module's attribute, for mypy
    try:
        yield builds
    finally:
        for module in users:
            setattr(module, "build_plan", original)  # noqa: B010


def raw_call(made: Optimized, inputs: Inputs) -> BoundCall:
    """The compiled model's one engine without accelkit.

    Raises:
        RuntimeError: it is not one engine alone, or the engine's inputs are not the model's.
    """
    if len(made.plans) != 1:
        raise RuntimeError(f"{len(made.plans)} engines were built, and overhead is measured over one")
    engine, runtime = load(library(), made.plans[0])
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
    tensors = names_of(inputs)[1]
    if len(given) != len(tensors):
        raise RuntimeError(f"the engine has {len(given)} inputs, the model {len(tensors)}")
    call = bind(engine, dict(zip(given, tensors, strict=True)), [name for name in names if name not in given])
    call.kept = (engine, runtime)
    return call
