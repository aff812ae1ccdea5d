"""Plugins: TensorRT's own and those of a user's shared libraries, for the build and for running.

Standard library and this folder's `versions` only: the worker imports this file by itself.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt.versions import plugin_count
else:
    from versions import plugin_count


def load_plugins(trt: Any, logger: Any, paths: Sequence[str]) -> str | None:
    """Make TensorRT's own plugins and those in `paths` known; why one of them cannot be, or None.

    A library registers its plugins as it is loaded, or offers them to TensorRT's registry to take: both are tried.
    """
    trt.init_libnvinfer_plugins(logger, "")
    registry = trt.get_plugin_registry()
    for path in paths:
        if path in _loaded:
            continue
        if not os.path.exists(path):
            return f"there is no plugin library {path}"
        before = plugin_count(registry)
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"the plugin library {path} does not load: {error}"
        if plugin_count(registry) == before and registry.load_library(path) is None:
            return f"the plugin library {path} loads, but holds no plugins for this TensorRT"
        _loaded.add(path)
    return None


_loaded: set[str] = set()  # the process has one registry, which refuses plugins that it has already
