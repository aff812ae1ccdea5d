"""What the author of a model meant by a cast that does nothing in float32: `.float()`, or `.to(x.dtype)` back again?

Run in float32, both are `aten.to.dtype(x, torch.float32)`. Two things tell them apart: the author's source line, which
torch.export keeps with every node, and, where there is none, the alternation of the two (what is already upcast can
only be cast back).

A cast that does nothing also returns its own input, so that torch.export gives later uses of `x` the cast's result: the
residual in `n = self.norm(x); x = x + n` adds `norm`'s upcast x. A Python variable does not leave its module's
`forward` by itself: uses outside of the module that made the cast mean the value before it.
"""

from __future__ import annotations

import re

import torch
from torch import fx

_UPCAST = re.compile(r"\.float\(|\b(to|type)\([^)]*(float32|torch\.float\b|\bfloat\b)|dtype=torch\.float(32)?\b")
_OTHERS = re.compile(r"\btype_as\(|\b(to|type)\([^)]*(\.dtype\b|\w_d?type\b|\bdtype\b|\.device\b|\bdevice\b)")


def says_float32(node: fx.Node) -> bool | None:
    """True for an upcast, False for a cast to some other tensor's dtype or device, None where the source line does not
    tell."""
    lines = [line for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    line = (
        lines[-1].split("#")[0] if lines else ""
    )  # torch.export keeps the lines of modules' forward, not of functions in it
    if bool(_UPCAST.search(line)) != bool(_OTHERS.search(line)):
        return bool(_UPCAST.search(line))
    if node.target == torch.ops.aten.to.dtype_layout and not _UPCAST.search(line):
        return False  # how torch.export writes `.to(device)`
    return None


def module_path(node: fx.Node) -> str | None:
    """The path of the module whose forward made the node (`encoder.layer.0`; empty for the model's own), None where
    unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else None


def module_paths(node: fx.Node) -> list[str]:
    """All modules the node lies in, from the outermost."""
    return [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def leaves_module(cast: fx.Node, user: fx.Node) -> bool:
    """Whether `user` lies outside of the module whose forward made `cast`."""
    made_in = module_path(cast)
    return bool(made_in) and bool(module_paths(user)) and made_in not in module_paths(user)
