"""Kernels compiled ahead by another process: under the names that this one looks for; nothing is launched, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")


from accelkit.tuning import compiling
from accelkit.tuning.compile_worker import _import
from accelkit.tuning.compiling import Compiler, _launches_noted

PROGRAM = '''
import threading, time, torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

class Hopper(DriverBase):
    """A GPU that is not there: what the launching code asks before it compiles."""
    is_active = classmethod(lambda cls: True)
    map_python_to_cpp_type = lambda self, name: name
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    get_benchmarker = lambda self: None
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    def launcher_cls(self, *_):
        raise InterruptedError

driver.set_active(Hopper())
from accelkit.kernels import linear, linear_tiles
from accelkit.tuning.compiling import Compiler, _launches_noted
from accelkit.tuning.problems import task_of

linear._device_facts = lambda device: (False, 132)
x, w, b = (torch.randn(size).half() for size in ((32, 64), (64, 64), (64,)))
task = task_of("linear_activation", x, w, b, "gelu")
with Compiler(2) as compiler:
    numbers = compiler.note(task)
    tiles = sum(config.implementation == "tiles" for config in task.candidates())
    assert len(set(numbers)) == len(numbers) == tiles > 2, (numbers, tiles)
    assert compiler.note(task) == numbers
    compiler.go()
    compiler.wait(numbers, time.monotonic() + 60)
    assert compiler._done == dict.fromkeys(numbers), compiler._done
assert compiler._process.returncode is not None

# what this process compiles has the same names: it finds all of it
hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
for config in task.candidates():
    try:
        linear.linear_activation(x, w, b, "gelu", None, None, config)
    except InterruptedError:
        pass
assert hits == [True] * tiles, hits

# another thread's launches are its own: they are neither noted nor kept from running
noted, reached = [], []
def other():
    try:
        linear_tiles.linear(x, w, b, "silu")
    except InterruptedError:
        reached.append(True)
with _launches_noted(noted):
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
assert (noted, reached) == ([], [True]), (noted, reached)
assert triton.knobs.runtime.jit_cache_hook is None
print("as compiled here")
'''


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_another_process_compiles_what_this_one_looks_for(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert result.stdout.strip() == "as compiled here", result.stderr[-3000:]


def test_one_processor_compiles_for_itself() -> None:
    with Compiler(1) as compiler:
        assert not compiler.available
        assert compiler.note(None) == []  # type: ignore[arg-type]
        compiler.go()
        compiler.wait([1], time.monotonic() + 60)


def test_a_process_that_cannot_start_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(compiling.subprocess, "Popen", refuse)
    with Compiler(4) as compiler:
        assert not compiler.available


def test_a_process_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_WORKER", "accelkit.no_such_module")
    with Compiler(4) as compiler:
        began = time.monotonic()
        compiler.wait([1, 2], began + 30)
        assert time.monotonic() - began < 20


def test_waiting_ends_in_time() -> None:
    compiler = Compiler(4)
    compiler._running = True
    told: list[Any] = []
    compiler.wait([7], time.monotonic() + 0.05, lambda *numbers: told.append(numbers))
    assert told


def test_only_our_kernels_are_imported() -> None:
    with pytest.raises(ValueError, match=r"os is none of accelkit's kernels"):
        _import("os")


def test_the_hook_before_is_put_back() -> None:
    from triton import knobs

    def hook(**_: Any) -> None:
        """Somebody else's."""

    before = knobs.runtime.jit_cache_hook
    try:
        knobs.runtime.jit_cache_hook = hook
        with _launches_noted([]):
            assert knobs.runtime.jit_cache_hook is not hook
        assert knobs.runtime.jit_cache_hook is hook
    finally:
        knobs.runtime.jit_cache_hook = before
