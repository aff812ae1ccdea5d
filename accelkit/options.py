"""Resolves what the caller of `optimize()` wrote: names to values, examples to calls, "auto" to a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from accelkit import plugins
from accelkit.backend_api import Backend
from accelkit.capture import Program
from accelkit.errors import AccelkitError, BackendUnavailableError, InputError
from accelkit.pass_api import GraphPass, OnnxPass
from accelkit.precision import Int8, Precision
from accelkit.signature import TensorSpec

AUTO_ORDER = {"cpu": ("onnxruntime", "inductor", "eager"), "cuda": ("fastertransformer", "inductor", "eager")}
"""`target="auto"`: the first of these that is available here and has the precision."""


def canonical_example(example_inputs: Any, what: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    `what` names it in messages.

    Raises:
        InputError: something else, or a tensor on the meta device.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    elif hasattr(example_inputs, "keys") and all(isinstance(k, str) for k in example_inputs.keys()):  # noqa: SIM118
        args, kwargs = (), {k: example_inputs[k] for k in example_inputs.keys()}  # noqa: SIM118 - BatchEncoding is no dict
    else:
        raise InputError(
            f"{what} must be a tensor, a tuple of positional arguments or a dict of keyword arguments, "
            f"not {type(example_inputs).__name__}"
        )
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in pytree.tree_leaves((args, kwargs))):
        raise InputError(f"{what} has a tensor on the meta device; examples need real data")
    return args, kwargs


def device_type(model: nn.Module) -> str:
    """The device that the model's parameters are on.

    Raises:
        InputError: on several kinds of device.
    """
    kinds = {t.device.type for t in [*model.parameters(), *model.buffers()]}
    if len(kinds) > 1:
        raise InputError(
            f"the model's parameters are on several kinds of device ({', '.join(sorted(kinds))}); move it to one"
        )
    return kinds.pop() if kinds else "cpu"


def resolve_backend(target: str | Backend, precision: Precision, device: str) -> Backend:
    """The backend value for a name or a value, for a model on `device` ("cpu", "cuda").

    Raises:
        InputError: unknown name, not a backend, a precision or a device that it does not have.
        BackendUnavailableError: it cannot run here; the message says what to install.
    """
    if target == "auto":
        return _first_available(precision, device)
    backend = plugins.find(plugins.BACKENDS, target)() if isinstance(target, str) else target
    if not isinstance(backend, Backend):
        hint = f"; did you mean {backend.__name__}()?" if isinstance(backend, type) else ""
        raise InputError(f"target must be a name or a Backend value, not {target!r}{hint}")
    if precision.name not in backend.precisions_on(device):
        others = [n for n in plugins.names(plugins.BACKENDS) if _has(n, precision, device)]
        raise InputError(
            f"target {backend.name!r} has no {precision}; it has {', '.join(backend.precisions_on(device))}. "
            f"{precision} is had by: {', '.join(others) or 'no installed target'}"
        )
    if device not in backend.devices:
        raise InputError(
            f"target {backend.name!r} runs models on {', '.join(backend.devices)}; this model is on {device}"
        )
    if (reason := backend.unavailable()) is not None:
        raise BackendUnavailableError(f"target {backend.name!r} cannot run here: {reason}")
    return backend


def as_kernels_want(precision: Precision, backend: Backend) -> Precision:
    """The precision with the backend's choices where the caller left them open."""
    if isinstance(precision, Int8) and precision.activations is None:
        return dataclasses.replace(precision, activations=backend.int8_activations)
    return precision


def _has(name: str, precision: Precision, device: str) -> bool:
    try:
        return precision.name in plugins.find(plugins.BACKENDS, name).precisions_on(device)
    except AccelkitError:  # someone's broken plug-in must not hide the message that asks
        return False


def _first_available(precision: Precision, device: str) -> Backend:
    reasons = []
    for name in AUTO_ORDER.get(device, ("eager",)):
        kind = plugins.find(plugins.BACKENDS, name)
        if precision.name not in kind.precisions_on(device) or device not in kind.devices:
            reasons.append(f"{name} has no {precision} on {device}")
            continue
        backend = kind()
        reason = backend.unavailable()
        if reason is None:
            return backend  # type: ignore[no-any-return]
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailableError(f"no target has {precision} on {device} here: {'; '.join(reasons)}")


def resolve_passes(
    passes: Iterable[GraphPass | OnnxPass | str] | None, precision: Precision
) -> tuple[tuple[GraphPass, ...], tuple[OnnxPass, ...]]:
    """The passes over the fx graph and those over ONNX, each in order.

    Raises:
        InputError: unknown name, or something that is no pass.
    """
    if passes is None:
        import accelkit_passes

        passes = accelkit_passes.default_passes(precision)
    elif isinstance(passes, str):
        passes = (passes,)
    values = [plugins.find(plugins.PASSES, p)() if isinstance(p, str) else p for p in passes]
    for value in values:
        if not isinstance(value, (GraphPass, OnnxPass)):
            hint = f"; did you mean {value.__name__}()?" if isinstance(value, type) else ""
            raise InputError(f"passes must be names or pass values, not {value!r}{hint}")
    return (
        tuple(v for v in values if isinstance(v, GraphPass)),
        tuple(v for v in values if isinstance(v, OnnxPass)),
    )


def sizes_of(program: Program, sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """The program's example inputs with dynamic dimensions (by the user's names) brought to `sizes`, rows repeated to grow.

    Raises:
        InputError: a size outside the dimension's range.
    """
    signature = program.signature
    symbols = {symbol: sizes[name] for symbol, name in signature.dims.items() if name in sizes}
    for symbol, size in symbols.items():
        low, high = signature.ranges[symbol]
        if size < low or (high is not None and size > high):
            covered = f"{low} to {high or 'any size'}"
            raise InputError(f"bucket {signature.dims[symbol]}={size} is outside what the program covers, {covered}")
    grown = []
    for spec, tensor in zip(signature.tensors, program.inputs, strict=True):
        for dimension, symbolic in enumerate(spec.shape):
            if symbolic in symbols:
                rows = torch.arange(symbols[str(symbolic)], device=tensor.device) % tensor.shape[dimension]
                tensor = tensor.index_select(dimension, rows)
        grown.append(tensor)
    return tuple(grown)


__all__ = [
    "AUTO_ORDER",
    "TensorSpec",
    "as_kernels_want",
    "canonical_example",
    "device_type",
    "resolve_backend",
    "resolve_passes",
    "sizes_of",
]
