"""A model's twin: the same parameters and buffers, but its own modules, so that nothing done to it touches the user's.

    model --deepcopy with the tensors shared--> twin, in eval mode

Capture and the fallback work on the twin: the user's training flags, hooks and attributes stay as they are, even when several
threads use the model meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from accelkit.errors import CaptureError, InputError


def require_usable(model: object) -> nn.Module:
    """Raises InputError for what is no nn.Module, or has parameters without data."""
    if not isinstance(model, nn.Module):
        hint = " (an instance, not the class)" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise InputError(f"model must be a torch.nn.Module{hint}, not {model if hint else type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} is a TorchScript module, which cannot be captured; give the nn.Module it was made from"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise InputError(f"{name} is not initialised yet (a lazy module); call the model once before optimize()")
        if tensor.is_meta:
            raise InputError(
                f"{name} is on the meta device and has no data; load the weights (model.to_empty, load_state_dict) first"
            )
    return model


def eval_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode that shares every parameter and buffer with it.

    Raises:
        CaptureError: the model cannot be copied (it holds a lock or a file, say).
    """
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():  # tensors kept as plain attributes are shared too, and may not be leaves
        shared.update({id(v): v for v in vars(module).values() if isinstance(v, torch.Tensor)})
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); accelkit works on a copy that shares the "
            "weights so that yours stays as it is. Give the class a __deepcopy__ that leaves the uncopyable attribute out"
        ) from error
    return twin.eval()


@contextlib.contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Run models inside and have their buffers, and the random number generators, as before afterwards.

    Buffers that were written to get their values back, those that were replaced (`self.h = self.h + 1`) their tensors.
    """
    places = [
        (m, name, t) for model in models for m in model.modules() for name, t in m._buffers.items() if t is not None
    ]
    saved = {id(t): (t, version(t), t.detach().clone()) for _, _, t in places}
    tensors = [*(t for model in models for t in model.parameters()), *(t for _, _, t in places)]
    devices = list({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, name, tensor in places:
                module._buffers[name] = tensor
            with torch.no_grad():
                for tensor, before, values in saved.values():
                    # batch_norm updates its running statistics without counting it as a write
                    if (before is not None and version(tensor) != before) or not torch.equal(tensor, values):
                        tensor.copy_(values)


def version(tensor: torch.Tensor) -> int | None:
    """PyTorch's count of in-place writes to the tensor; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Have what is assigned to a buffer inside (`self.h = self.h + 1`) written into the tensor that was there.

    The twin's buffers are the model's own tensors: a replaced one would be lost to the model and to the engines.
    """
    places = [(m, name, t) for m in model.modules() for name, t in m._buffers.items() if t is not None]
    yield
    for module, name, tensor in places:
        now = module._buffers.get(name)
        if now is not None and now is not tensor and now.shape == tensor.shape and now.dtype == tensor.dtype:
            with torch.no_grad():
                tensor.copy_(now)
            module._buffers[name] = tensor


def clone_inputs(tree: Any) -> Any:
    """A copy of nested inputs whose tensors may be written to."""
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree
    )


@contextlib.contextmanager
def no_fused_multi_head_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention and nn.TransformerEncoder open: their fast path is one opaque node that no pass knows."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence torch's warnings and the named loggers inside: what matters of it stands in the report or the error."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch(\..*)?$")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
