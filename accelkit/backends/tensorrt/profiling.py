"""One engine on its example, watched: the layers that the inspector shows, their times, and the kernels that ran.

Done once, after a build; what it finds is kept in the manifest (proof.py judges it).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

RUNS = 3


def information(tensorrt: Any, engine: Any, context: Any) -> str:
    """The inspector's JSON for the shapes that `context` is set to: of dynamic engines it tells no formats without."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))


def layer_times(tensorrt: Any, context: Any, run: Callable[[], None]) -> dict[str, list[float]]:
    """Layer's name -> ms in each of RUNS runs. `context` reports its times from now on; it should not be used for more.

    `run` enqueues once and waits.
    """
    times: dict[str, list[float]] = defaultdict(list)

    class Profiler(tensorrt.IProfiler):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            tensorrt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(float(ms))

    profiler = Profiler()
    context.profiler = profiler
    for _ in range(RUNS):
        run()
    del profiler  # the context had it for as long as it ran
    return dict(times)


def kernel_times(run: Callable[[], None]) -> Mapping[str, float]:
    """Kernel's name -> ms, of one run, by CUPTI through torch.profiler.

    Raises:
        RuntimeError: there is no kernel in the list: CUPTI is not usable here, or another profiler has it.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        microseconds = float(getattr(event, "self_device_time_total", 0.0))
        if microseconds and event.device_type == DeviceType.CUDA:
            found[str(event.key)] += microseconds / 1e3
    if not found:
        raise RuntimeError("torch.profiler lists no kernels (CUPTI is not usable, or another profiler is attached)")
    return dict(found)
