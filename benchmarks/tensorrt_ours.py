"""accelkit's TensorRT target with the build's time split: TensorRT's parse and build, and accelkit's own around them.

fast, facts = optimized(model, inputs, "fp16")
facts["seconds"]       # {"optimize": 60.2, "tensorrt": 57.0, "own": 3.2}
call = raw_call(fast, inputs)   # its engine by execute_async_v3 on bound buffers, without accelkit
"""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorrt_by_hand import BoundCall, bind, library, load, names_of
from torch import nn

from accelkit.models import Inputs

PLAN = "engine.plan"


def optimized(
    model: nn.Module, inputs: Inputs, precision: str, *, cache: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The compiled model, and facts for a row: seconds, bytes of the engine, what it says about itself.

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
    seconds = {"optimize": total, "tensorrt": inside, "own": total - inside}
    return fast, {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "stages_seconds": variant["seconds"],
        "engine_bytes": sum(size for size, _ in builds) or None,
        "timing_cache_bytes": [result.timing_cache_bytes for _, result in builds if result.timing_cache_bytes],
        "pieces": len(variant["pieces"]),
        "torch_operators": variant["torch_operators"],
        "origins": [piece["origin"] for piece in variant["pieces"]],
        "precisions": [piece["precisions"] for piece in variant["pieces"]],
        "notes": [note for piece in variant["pieces"] for note in piece["notes"]],
    }


@contextmanager
def recorded_builds() -> Iterator[list[tuple[int, Any]]]:
    """(bytes of the plan, accelkit's BuildResult) of each engine that TensorRT builds meanwhile."""
    from accelkit.backends.tensorrt import backend, building

    builds: list[tuple[int, Any]] = []
    original = building.build_plan

    def build_plan(*args: Any, **named: Any) -> Any:
        plan, result = original(*args, **named)
        builds.append((len(plan), result))
        return plan, result

    users = [module for module in (building, backend) if getattr(module, "build_plan", None) is original]
    for module in users:
        setattr(module, "build_plan", build_plan)  # noqa: B010 - a module's attribute, for mypy
    try:
        yield builds
    finally:
        for module in users:
            setattr(module, "build_plan", original)  # noqa: B010


def plans_of(fast: Any) -> list[bytes]:
    """The plans in a compiled model, as it saves them."""
    with tempfile.TemporaryDirectory(prefix="accelkit-plans-") as folder:
        path = Path(folder) / "model.accel"
        fast.save(path)
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(PLAN)]


def raw_call(fast: Any, inputs: Inputs) -> BoundCall:
    """The compiled model's one engine without accelkit.

    Raises:
        RuntimeError: it is not one engine alone, or the engine's inputs are not the model's.
    """
    plans = plans_of(fast)
    if len(plans) != 1:
        raise RuntimeError(f"the compiled model has {len(plans)} engines, and overhead is measured over one")
    engine, runtime = load(library(), plans[0])
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
    tensors = names_of(inputs)[1]
    if len(given) != len(tensors):
        raise RuntimeError(f"the engine has {len(given)} inputs, the model {len(tensors)}")
    call = bind(engine, dict(zip(given, tensors, strict=True)), [name for name in names if name not in given])
    call.kept = (engine, runtime)
    return call
