"""The measurements of cpu_goals.py; each runs alone in a fresh process and gives back plain data.

A part takes (model, seconds) and imports what it needs itself: some measure imports, some memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

CALL_ROUNDS_MS = 5.0
"""A sample of a call of some microseconds repeats it until it lasts this long: the clock's own cost vanishes."""


def speed(model_name: str, seconds: float) -> dict[str, Any]:
    """All candidates of one model at batch 1, interleaved: medians in ms and errors against float64."""
    import torch
    from by_hand import (
        flat_call,
        float64_outputs,
        onnxruntime_session,
        openvino_model,
        plain,
        quiet,
        torch_compiled,
        worst_error,
    )

    from accelkit.errors import AccelkitError
    from accelkit.measure import interleaved
    from accelkit.models import load_model

    model, inputs = load_model(model_name)
    assert inputs is not None  # a built-in model
    import accelkit

    def optimized(target: str, precision: str) -> Any:
        fast = accelkit.optimize(model, inputs, target=target, precision=precision, cache=False, progress=False)
        return flat_call(fast, inputs)

    builders: dict[str, Callable[[], Any]] = {
        "PyTorch fp32": lambda: plain(model, inputs, torch.float32),
        "PyTorch bf16": lambda: plain(model, inputs, torch.bfloat16),
        "ONNX Runtime by hand fp32": lambda: onnxruntime_session(model, inputs),
        "OpenVINO by hand fp32": lambda: openvino_model(model, inputs),
        "OpenVINO by hand bf16": lambda: openvino_model(model, inputs, torch.bfloat16),
        "torch.compile fp32": lambda: torch_compiled(model, inputs, torch.float32, freezing=False),
        "torch.compile, freezing bf16": lambda: torch_compiled(model, inputs, torch.bfloat16, freezing=True),
        "accelkit onnxruntime fp32": lambda: optimized("onnxruntime", "fp32"),
        "accelkit openvino fp32": lambda: optimized("openvino", "fp32"),
        "accelkit openvino bf16": lambda: optimized("openvino", "bf16"),
        "accelkit inductor fp32": lambda: optimized("inductor", "fp32"),
        "accelkit inductor bf16": lambda: optimized("inductor", "bf16"),
    }
    truth = float64_outputs(model, inputs)
    calls, errors, failures = {}, {}, {}
    for name, build in builders.items():
        try:
            with quiet():
                call = build()
            errors[name] = worst_error(call, truth)
        except (AccelkitError, ImportError, RuntimeError) as error:  # told in the details of the goal that it misses
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        calls[name] = call
    with torch.no_grad():
        timings = interleaved(calls, seconds=seconds, warmup=2)
    return {"timings": {n: t.to_json() for n, t in timings.items()}, "errors": errors, "failures": failures}


def call(model_name: str, seconds: float) -> dict[str, Any]:
    """A CompiledModel's call beside its engine's own on the same tensors, in us, for three forms of call."""
    import torch
    from torch import nn

    import accelkit
    from accelkit.measure import interleaved
    from accelkit.models import load_model

    linear, inputs = load_model("one-linear")
    assert isinstance(inputs, tuple)
    (x,) = inputs

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(first + second)
            return result

    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"result": self.linear(x)}

    def optimized(model: nn.Module, example: Any) -> tuple[Any, Any]:
        fast = accelkit.optimize(model, example, target="onnxruntime", cache=False, progress=False)
        (piece,) = fast._built.variants[0].lowered.pieces  # type: ignore[union-attr] - the raw engine has no public way
        return fast, piece.engine

    positional, positional_engine = optimized(linear, x)
    keywords, keywords_engine = optimized(Keywords().eval(), {"first": x, "second": x})
    dictionary, dictionary_engine = optimized(Dictionary().eval(), x)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "positional tensor": (lambda: positional_engine(x), lambda: positional(x)),
        "keyword tensors": (lambda: keywords_engine(x, x), lambda: keywords(first=x, second=x)),
        "dict output": (lambda: dictionary_engine(x), lambda: dictionary(x)),
    }
    calls = {
        f"{form}, {who}": c for form, pair in pairs.items() for who, c in zip(("engine", "model"), pair, strict=True)
    }
    timings = interleaved(calls, seconds=seconds / 4, warmup=20, min_sample_ms=CALL_ROUNDS_MS, max_rounds=2000)
    forms = {}
    for form in pairs:
        engine, whole = timings[f"{form}, engine"], timings[f"{form}, model"]
        forms[form] = {
            "added_us": (whole.median_ms - engine.median_ms) * 1e3,
            "engine": engine.to_json(),
            "model": whole.to_json(),
        }
    return {"forms": forms}


def import_(model_name: str, seconds: float) -> dict[str, Any]:
    """Seconds of `import torch`, then of `import accelkit`."""
    import sys

    assert "torch" not in sys.modules
    started = time.perf_counter()
    import torch  # noqa: F401

    between = time.perf_counter()
    import accelkit  # noqa: F401

    return {"torch_s": between - started, "accelkit_s": time.perf_counter() - between}


def build(model_name: str, seconds: float) -> dict[str, Any]:
    """optimize() for onnxruntime twice in this process, with the cache; its lazy imports fall into the first."""
    import accelkit
    from accelkit.models import load_model

    model, inputs = load_model(model_name)
    found: dict[str, Any] = {}
    for which in ("first", "second"):
        started = time.perf_counter()
        fast = accelkit.optimize(model, inputs, target="onnxruntime", progress=False)
        found[f"{which}_s"] = time.perf_counter() - started
        variants = fast.report().variants
        found[f"{which}_origins"] = [p.origin for v in variants for p in v.pieces]
        found[f"{which}_stages_s"] = {k: round(s, 4) for v in variants for k, s in v.seconds.items()}
        del fast, variants
        gc.collect()
    return found


def build_by_hand(model_name: str, seconds: float) -> dict[str, Any]:
    """Export, save and session load by hand, and one run; imports inside, as in `build`."""
    from accelkit.models import load_model

    model, inputs = load_model(model_name)
    assert inputs is not None
    started = time.perf_counter()
    from by_hand import onnxruntime_session

    onnxruntime_session(model, inputs)()
    return {"first_s": time.perf_counter() - started}


def memory(model_name: str, seconds: float) -> dict[str, Any]:
    """Peak resident memory of optimize() for onnxruntime, the model's own weights included, over the weights' bytes."""

    def run(model: Any, inputs: Any) -> Any:
        import accelkit

        return accelkit.optimize(model, inputs, target="onnxruntime", cache=False, progress=False)

    return _peak(model_name, run)


def memory_by_hand(model_name: str, seconds: float) -> dict[str, Any]:
    """The same of export and session by hand."""

    def run(model: Any, inputs: Any) -> Any:
        from by_hand import onnxruntime_session

        session = onnxruntime_session(model, inputs)
        session()
        return session

    return _peak(model_name, run)


def _peak(model_name: str, run: Callable[[Any, Any], Any]) -> dict[str, Any]:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    from transformers import BertModel  # noqa: F401

    import accelkit  # noqa: F401
    from accelkit.measure import peak_memory, resident_bytes
    from accelkit.models import load_model

    before_bytes = resident_bytes()  # after the imports: code is no copy of weights
    model, inputs = load_model(model_name)
    gc.collect()
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    weights_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    with peak_memory() as seen:
        kept = run(model, inputs)
    del kept
    added_bytes = seen.peak_bytes - before_bytes
    return {
        "weights_bytes": weights_bytes,
        "before_bytes": before_bytes,
        "loaded_bytes": seen.before_bytes,
        "peak_bytes": seen.peak_bytes,
        "factor": added_bytes / weights_bytes,
    }


PARTS: dict[str, Callable[[str, float], dict[str, Any]]] = {
    "speed": speed,
    "call": call,
    "import": import_,
    "build": build,
    "build_by_hand": build_by_hand,
    "memory": memory,
    "memory_by_hand": memory_by_hand,
}
