"""BERT-base on today's tools: PyTorch, ONNX Runtime and OpenVINO by hand, torch.compile, and accelkit's targets.

    python benchmarks/bert_tools.py                      # batch sizes 1 to 8 on a CPU; on a GPU see bert_gpu.py
    python benchmarks/bert_tools.py --model vit-b16-224 --batch 1,8
    python benchmarks/bert_tools.py --quick              # does it work? Short, small, and nothing is recorded

One process; for each batch size every tool is built, its error taken against a float64 copy of the model, and all are
timed in interleaved rounds. Half precision is bf16 on a CPU and fp16 on a GPU. Writes
benchmarks/results/<machine>/<name>.json, .md and .png.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
CPU_BATCHES = [1, 2, 4, 8]
BASELINE = ("PyTorch", "fp32")
MODELS = {"bert-base-128": ("bert_tools", "BERT-base, 128 tokens"), "vit-b16-224": ("vit_tools", "ViT-B/16, 224 x 224")}
QUICK_MODEL = "encoder-block"

Key = tuple[str, str]
"""(tool, precision)."""


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--device" in given or "--tiny" in given or torch.cuda.is_available():  # other peers, padding, other options
        import bert_gpu

        return bert_gpu.run(given)
    options = _options(given)
    if not options.quick:  # build seconds are those of a first build; Inductor reads this when it compiles
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="accelkit-bench-inductor-")
    from accelkit.measure import write_results

    device = "cpu"
    batches = options.batch or ([1] if options.quick else CPU_BATCHES)
    name, subject = MODELS[options.model]
    model_name = QUICK_MODEL if options.quick else options.model
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rows += measure_batch(model_name, batch, device, options.seconds, options.rounds)
    subject = QUICK_MODEL if options.quick else subject
    title = f"{subject}: ms a batch (times as fast as PyTorch fp32)"
    table = results_table(rows, batches)
    folder = options.output or (Path(tempfile.mkdtemp(prefix="accelkit-quick-")) if options.quick else RESULTS)
    facts: dict[str, Any] = {
        "model": model_name,
        "device": device,
        "packages": ("onnxruntime", "openvino", "onnxscript", "transformers"),
    }
    if not options.quick:  # a file with a table is shown in the README
        facts |= {"title": title, "table": table}
    path = write_results(name, rows, folder, **facts)
    text = f"# {title}\n\n{markdown(table)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(rows, title, path.with_suffix(".png"))
    print(text)
    print(f"wrote {path} and .md, .png beside it")
    if failures := [row for row in rows if row["failure"]]:
        for row in failures:
            print(
                f"not measured: {row['tool']} {row['precision']} batch {row['batch']}: {row['failure']}",
                file=sys.stderr,
            )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="bert-base-128")
    parser.add_argument("--batch", type=lambda text: [int(word) for word in text.split(",")], help="such as 1,8")
    parser.add_argument("--seconds", type=float, help="timed rounds of one batch size (default: 60; 2 with --quick)")
    parser.add_argument("--rounds", type=int, help="exactly this many rounds, however long they take")
    parser.add_argument(
        "--output", type=Path, help="results folder (default: benchmarks/results; a temporary one with --quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"model {QUICK_MODEL}, batch 1, for a look whether all works"
    )
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (2.0 if options.quick else 60.0)
    return options


# --- measuring


def measure_batch(model_name: str, batch: int, device: str, seconds: float, rounds: int | None) -> list[dict[str, Any]]:
    """Build every tool for one batch size, and time all that could be built."""
    import torch
    from by_hand import float64_outputs, quiet, worst_error

    from accelkit.cli.bench import on_device
    from accelkit.measure import interleaved
    from accelkit.models import load_model

    model, inputs = load_model(model_name, batch)
    assert inputs is not None  # a built-in model
    model, inputs = model.to(device), on_device(inputs, device)
    truth = float64_outputs(model, inputs)
    rows: dict[Key, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    keys: dict[str, Key] = {}
    for (tool, precision), build in tools(model, inputs, device).items():
        print(f"batch {batch}: building {tool} {precision}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"batch": batch, "tool": tool, "precision": precision, "failure": None}
        rows[tool, precision] = row
        started = time.perf_counter()
        try:
            with quiet():
                call = build()
            row["build_seconds"] = round(time.perf_counter() - started, 3)
            row["error"] = worst_error(call, truth)
        except Exception as error:  # noqa: BLE001 - a tool that cannot take the model is a result, told below the table
            row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        calls[f"{tool} {precision}"], keys[f"{tool} {precision}"] = call, (tool, precision)
    print(f"batch {batch}: timing {len(calls)} candidates", file=sys.stderr, flush=True)
    limits = {"min_rounds": rounds, "max_rounds": rounds} if rounds else {}
    with torch.no_grad():
        timings = interleaved(calls, seconds=seconds, warmup=2, device=device, **limits)
    baseline = timings[" ".join(BASELINE)]
    for name, timing in timings.items():
        rows[keys[name]] |= {
            **timing.to_json(),
            "items_per_second": round(batch * 1e3 / timing.median_ms, 3),
            "speedup": round(baseline.median_ms / timing.median_ms, 4),
            "within_spread": not (timing.slower_than(baseline) or baseline.slower_than(timing)),
        }
    calls.clear()
    torch._dynamo.reset()
    gc.collect()
    return list(rows.values())


def tools(model: Any, inputs: Any, device: str) -> dict[Key, Callable[[], Any]]:
    """Everything that is compared, in the table's order: (tool, precision) -> what builds it."""
    import torch
    from by_hand import flat_call, onnxruntime_session, openvino_model, plain, torch_compiled

    import accelkit
    from accelkit import plugins
    from accelkit.cli.targets import missing

    half = ("fp16", torch.float16) if device == "cuda" else ("bf16", torch.bfloat16)
    both = (("fp32", torch.float32), half)
    found: dict[Key, Callable[[], Any]] = {}
    for name, dtype in both:
        found["PyTorch", name] = lambda d=dtype: plain(model, inputs, d)
    for name, dtype in both if device == "cuda" else both[:1]:  # ONNX Runtime has no bf16 kernels on a CPU
        found["ONNX Runtime by hand", name] = lambda d=dtype: onnxruntime_session(model, inputs, d)
    for name, dtype in both if device == "cpu" else ():
        found["OpenVINO by hand", name] = lambda d=dtype: openvino_model(model, inputs, d)
    for name, dtype in both:
        found["torch.compile", name] = lambda d=dtype: torch_compiled(model, inputs, d, freezing=False)
    for name, dtype in both:
        found["torch.compile, freezing", name] = lambda d=dtype: torch_compiled(model, inputs, d, freezing=True)

    def optimized(target: str, precision: str) -> Any:
        fast = accelkit.optimize(model, inputs, target=target, precision=precision, cache=False, progress=False)
        return flat_call(fast, inputs)

    for target in plugins.names(plugins.BACKENDS):
        if missing(target) is not None:
            print(f"skipped: accelkit {target}: {missing(target)}", file=sys.stderr)
            continue
        backend = plugins.find(plugins.BACKENDS, target)
        for name, _ in both:
            if name in backend.precisions and device in backend.devices:
                found[f"accelkit {target}", name] = lambda t=target, n=name: optimized(t, n)
    return found


# --- showing


def results_table(rows: Sequence[dict[str, Any]], batches: Sequence[int]) -> dict[str, Any]:
    """One line a tool and precision, one column a batch size; the error is the largest over the batch sizes."""
    lines: list[list[Any]] = []
    for tool, precision in dict.fromkeys((row["tool"], row["precision"]) for row in rows):
        own = {row["batch"]: row for row in rows if (row["tool"], row["precision"]) == (tool, precision)}
        errors = [row["error"] for row in own.values() if row.get("error") is not None]
        cells = [_cell(own.get(batch)) for batch in batches]
        lines.append([tool, precision, *cells, f"{max(errors):.1e}" if errors else None])
    columns = ["tool", "precision", *(f"batch {batch}" for batch in batches), "error against float64"]
    return {"columns": columns, "rows": lines}


def _cell(row: dict[str, Any] | None) -> str | None:
    if row is None or "median_ms" not in row:
        return None
    return f"{significant(row['median_ms'])} ({'~' if row['within_spread'] else ''}{row['speedup']:.2f}x)"


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(table: dict[str, Any]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Speed-up over PyTorch fp32 by batch size, one line a tool and precision; needs matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    measured = [row for row in rows if "speedup" in row]
    for tool, precision in dict.fromkeys((row["tool"], row["precision"]) for row in measured):
        own = sorted((r["batch"], r["speedup"]) for r in measured if (r["tool"], r["precision"]) == (tool, precision))
        style = {"linestyle": "-" if precision == "fp32" else "--", "linewidth": 2.5 if "accelkit" in tool else 1.2}
        axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=f"{tool}, {precision}", **style)
    batches = sorted({row["batch"] for row in measured})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch size", ylabel="times as fast as PyTorch fp32", title=title.split(":")[0])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
