"""Compile a model, print the report, and write the result to one file that accelkit.load() reads."""

from __future__ import annotations

import argparse
from pathlib import Path

import accelkit
from accelkit.cli.output import batch_size, output_path
from accelkit.errors import InputError
from accelkit.models import MODELS, Inputs, load_model

HELP = "compile a model and save it to an .accel file"
EXAMPLES = (
    "accelkit optimize minilm --target onnxruntime --output minilm.accel --report minilm.json",
    "accelkit optimize my_package.models:make --target inductor --precision bf16 --batch 8 --output model.accel",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--target", default="auto", help="see `accelkit targets` (default: auto)")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, ... (default: fp32)")
    parser.add_argument("--batch", type=batch_size, default=1, help="batch size of the example inputs (default: 1)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.accel", help="the file to write")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report too: JSON for *.json, else text")
    parser.add_argument("--no-cache", action="store_true", help="compile anew and keep nothing in the engine cache")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument MODEL, as several commands take it."""
    names = ", ".join(MODELS)
    parser.add_argument("model", metavar="MODEL", help=f"{names}, or your own: package.module:callable")


def run(options: argparse.Namespace) -> int:
    """Build, print the report, save."""
    output = output_path(options.output, ".accel")
    assert output is not None  # required by the parser
    report_path = output_path(options.report)
    model, inputs = load_model(options.model, options.batch)
    fast = accelkit.optimize(
        model, require_inputs(options.model, inputs), target=options.target, precision=options.precision,
        cache=not options.no_cache, progress=not options.quiet,
    )  # fmt: skip
    print(fast.report())
    if report_path is not None:
        fast.report().save(report_path)
        print(f"wrote {report_path}")
    fast.save(output)
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")
    return 0


def require_inputs(name: str, inputs: Inputs | None) -> Inputs:
    """The inputs, or what to do about their absence.

    Raises:
        InputError: the model's callable brings none.
    """
    if inputs is None:
        raise InputError(f"{name} brings no example inputs; let the callable return (module, inputs)")
    return inputs
