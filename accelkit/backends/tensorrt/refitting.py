"""New weights for a refittable engine.

    graph's tensors, by ONNX initializer's name (`@encoder.weight`) --in the engine's dtypes--> Refitter --> the same engine

A refitted engine is always one of its own, deserialised for it, so that calls in flight finish with the old weights. What
TensorRT made of several weights when it built (a folded scale, say) is no weight any more: then it is a LoweringError, and
the caller builds anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backends.tensorrt import versions
from accelkit.backends.tensorrt.runtime import log_of, said
from accelkit.backends.tensorrt.streams import Streams
from accelkit.errors import LoweringError
from accelkit.tensor_hash import contents


def dtypes_of(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each weight's dtype by PyTorch's name, for the manifest."""
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.items()}


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the weights' names, shapes and values."""
    names = sorted(weights)
    hashes = contents([weights[name] for name in names])
    lines = [f"{name} {list(weights[name].shape)} {digest}" for name, digest in zip(names, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_of(graph: fx.GraphModule, dtypes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The graph's tensors for the initializers that `dtypes` names, in these dtypes.

    Raises:
        LoweringError: the graph has no such tensor.
    """
    found = {}
    for name, dtype in dtypes.items():
        target = name.removeprefix("@")
        try:
            tensor = graphs.attribute(graph, target)
        except AttributeError as error:
            raise LoweringError(f"the engine has the weight {target}, which the graph does not have") from error
        found[name] = tensor.detach().to(getattr(torch, dtype))
    return found


def refit(tensorrt: Any, engine: Any, weights: Mapping[str, torch.Tensor], streams: Streams) -> None:
    """Put `weights` into `engine`, which nothing runs on; waits until they are in.

    Args:
        weights: by ONNX initializer's name, in the engine's dtypes, on any device.

    Raises:
        LoweringError: the engine has no such weight, another shape of it, or cannot do with these weights alone.
    """
    log = log_of(tensorrt)
    log.clear()
    refitter = tensorrt.Refitter(engine, log)
    known = set(refitter.get_all_weights())
    if absent := sorted(set(weights) - known):
        raise LoweringError(
            f"the engine cannot be refitted: it has no weights {_listed(absent)} of their own any more (TensorRT made them part "
            "of others when it built)"
        )
    held = []  # what the refitter points to has to stay until it is done
    for name, tensor in weights.items():
        given, *location, kept = _as_weights(tensorrt, tensor)
        held.append(kept)
        if not refitter.set_named_weights(name, given, *location):
            raise LoweringError(
                f"the engine does not take {name.removeprefix('@')} of shape {list(tensor.shape)} and {tensor.dtype}{said(log)}"
            )
    if missing := sorted(refitter.get_missing_weights()):
        raise LoweringError(
            f"the engine cannot be refitted: it also needs {_listed(missing)}, which TensorRT made when it parsed the network"
        )
    with streams.on_device():
        done = versions.refit(refitter, streams.current())
        streams.synchronize()  # `held` goes after this
    if not done:
        raise LoweringError(f"TensorRT {tensorrt.__version__} failed to refit the engine{said(log)}")


def _as_weights(tensorrt: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
    """What `set_named_weights` takes: (weights[, location], what must stay alive)."""
    if versions.refits_from_device(tensorrt):
        kept = tensor.contiguous()
        place = tensorrt.TensorLocation.DEVICE if kept.is_cuda else tensorrt.TensorLocation.HOST
        names = {name: member for member, name in versions.DTYPES.items()}
        dtype = tensorrt.DataType.__members__[names[str(kept.dtype).removeprefix("torch.")]]
        return tensorrt.Weights(dtype, kept.data_ptr(), kept.numel()), place, kept
    values = tensor.cpu().contiguous().reshape(-1).numpy()
    return tensorrt.Weights(values), values


def _listed(names: Iterable[str]) -> str:
    names = [name.removeprefix("@") for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
