"""`dynamic_shapes` as users write it, to each input's dynamic dimensions, and on to torch.export's form.

{"input_ids": {0: Dim("batch")}}  ->  leaf index -> dimension -> Dim  ->  torch.export's dynamic_shapes
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from accelkit.dims import Dim
from accelkit.errors import InputError
from accelkit.signature import Binder, leaf_names


def dims_by_leaf(
    binder: Binder, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> dict[int, dict[int, Dim]]:
    """For each leaf of canonical (args, kwargs), by its index: dimension -> Dim."""
    if dynamic_shapes is None:
        return {}
    if isinstance(dynamic_shapes, (tuple, list)):
        names = [name for name, kind, _ in binder.parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
        if len(dynamic_shapes) > len(names):
            raise InputError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries, forward takes {len(names)} inputs: {names}"
            )
        dynamic_shapes = dict(zip(names, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, dict):
        raise InputError(f"dynamic_shapes must be a dict by input name or a tuple, not {type(dynamic_shapes).__name__}")
    leaves = leaf_names((args, kwargs), binder)
    values = pytree.tree_leaves((args, kwargs))
    found: dict[int, dict[int, Dim]] = {}
    for name, spec in dynamic_shapes.items():
        for path, dimensions in _named_specs(name, spec):
            if path not in leaves:
                raise InputError(f"dynamic_shapes names {path!r}, but the example's inputs are {', '.join(leaves)}")
            index = leaves.index(path)
            found[index] = _checked(path, dimensions, values[index])
    return found


def _named_specs(path: str, spec: Any) -> Iterator[tuple[str, dict[int, Dim]]]:
    if spec is None:
        return
    if isinstance(spec, dict) and all(isinstance(k, int) for k in spec):
        yield path, {k: v for k, v in spec.items() if v is not None}
    elif isinstance(spec, (tuple, list)) and all(isinstance(v, (Dim, type(None))) for v in spec):
        yield path, {k: v for k, v in enumerate(spec) if v is not None}
    elif isinstance(spec, dict):
        for key, value in spec.items():
            yield from _named_specs(f"{path}[{key!r}]", value)
    elif isinstance(spec, (tuple, list)):
        for key, value in enumerate(spec):
            yield from _named_specs(f"{path}[{key}]", value)
    else:
        raise InputError(f"dynamic_shapes[{path!r}] must be a dict of dimension to accelkit.Dim, not {spec!r}")


def _checked(path: str, dimensions: dict[int, Dim], value: Any) -> dict[int, Dim]:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"dynamic_shapes[{path!r}] is for a tensor; the example has {type(value).__name__}")
    checked = {}
    for index, dim in dimensions.items():
        if not isinstance(dim, Dim):
            raise InputError(f"dynamic_shapes[{path!r}][{index}] must be an accelkit.Dim, not {dim!r}")
        if not -value.dim() <= index < value.dim():
            raise InputError(
                f"dynamic_shapes[{path!r}] names dimension {index}, but {path} has {value.dim()}: {list(value.shape)}"
            )
        size = value.shape[index]
        if size < dim.min or (dim.max is not None and size > dim.max):
            raise InputError(f"the example's {path} has size {size} in dimension {index}, outside {dim}")
        checked[index % value.dim()] = dim
    return checked


def resized(tree: Any, dims: dict[int, dict[int, Dim]], sizes: dict[str, int]) -> Any:
    """The example with each dynamic dimension `name` grown or cut to sizes[name] (rows are repeated to grow)."""
    leaves, spec = pytree.tree_flatten(tree)
    for index, dimensions in dims.items():
        for position, dim in dimensions.items():
            if dim.name in sizes:
                rows = torch.arange(sizes[dim.name], device=leaves[index].device) % leaves[index].shape[position]
                leaves[index] = leaves[index].index_select(position, rows)
    return pytree.tree_unflatten(leaves, spec)


def widened(tree: Any, dims: dict[int, dict[int, Dim]]) -> Any:
    # torch.export takes a size of 1 for a constant: capture a dynamic dimension at 2 or more, by repeating the example.
    leaves = pytree.tree_leaves(tree)
    sizes: dict[str, int] = {}
    for index, dimensions in dims.items():
        for position, dim in dimensions.items():
            if leaves[index].shape[position] < 2 and (dim.max is None or dim.max >= 2):
                sizes[dim.name] = max(2, dim.opt or 2)
    return resized(tree, dims, sizes) if sizes else tree


def exported_shapes(example: Any, dims: dict[int, dict[int, Dim]], binder: Binder) -> Any:
    if not dims:
        return None
    exported: dict[str, Any] = {}
    leaves, spec = pytree.tree_flatten(example)
    specs = []
    for index, leaf in enumerate(leaves):
        entry = {}
        for position, dim in dims.get(index, {}).items():
            if dim.max == dim.min:
                continue  # a range of one size is a fixed dimension
            if dim.name not in exported:
                # torch.export specialises what may be 1: its range starts at 2 inside, and calls with 1 are checked by tests
                exported[dim.name] = dim.exported()
            entry[position] = exported[dim.name]
        specs.append(entry if isinstance(leaf, torch.Tensor) else None)
    args_spec, kwargs_spec = pytree.tree_unflatten(specs, spec)
    by_parameter = binder.by_parameter(args_spec, kwargs_spec)
    for name, kind, _ in binder.parameters:
        if kind == "VAR_KEYWORD" and by_parameter.get(name):
            raise InputError(
                f"dynamic_shapes for a call that fills **{name} ({', '.join(by_parameter[name])}): torch.export does not support "
                "that; name these inputs as parameters of forward, or leave dynamic_shapes out"
            )
    return by_parameter
