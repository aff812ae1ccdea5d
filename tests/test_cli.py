"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import accelkit
from accelkit import plugins
from accelkit.backends.eager import Eager
from accelkit.cache import EngineCache
from accelkit.cli import bench, main, output
from accelkit.cli.cache import size_bytes
from accelkit.cli.main import COMMANDS
from accelkit.errors import LoweringError

MODELS = """
import torch
from torch import nn

def make(batch=1):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(), nn.Linear(48, 5))
    return model, torch.randn(batch, 24)

def without_inputs():
    return nn.Linear(3, 4)

class Faulty(nn.Module):
    def forward(self, x):
        raise ArithmeticError("the model's own trouble")

def faulty():
    return Faulty(), torch.randn(2, 3)

def must_not_be_built():
    raise SystemExit("built before the arguments were checked")
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's folder with a module of models; the module's name, fresh for each test."""
    name = f"users_models_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return name


def only_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


def row_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line


# --- help, usage, errors


@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_has_an_example_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example:\n  accelkit {command}" in text
    assert "exit codes:" in text
    assert "130" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["bench"], "MODEL"),
        (["bench", "mlp", "--batch", "0"], "'0' is not a batch size"),
        (["bench", "mlp", "--batch", "1,x"], "'x' is not a batch size"),
        (["bench", "mlp", "--target", "eager,,inductor"], "not a list of names"),
        (["bench", "mlp", "--seconds", "-1"], "above zero"),
        (["optimize", "mlp"], "--output"),
        (["cache", "--clear", "--path"], "not allowed with"),
        (["cache", "--limit", "much"], "is not a size"),
    ],
)
def test_wrong_command_line_is_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bench", "mpl"], "unknown model 'mpl'; did you mean 'mlp'?"),
        (["bench", "mlp", "--target", "onnxruntme"], "unknown target 'onnxruntme'; did you mean 'onnxruntime'?"),
        (["bench", "mlp", "--precision", "fp33"], "unknown precision 'fp33'"),
        (["bench", "mlp", "--target", "onnxruntime", "--precision", "tf32"], "target onnxruntime has no tf32"),
        (["optimize", "mlp", "--output", "m.accel", "--target", "no"], "unknown target 'no'"),
        (["bench", "no_such_module:make"], "no module named 'no_such_module'"),
    ],
)
def test_error_is_1_and_one_sentence(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], models: str
) -> None:
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert only_line(told.err.replace("accelkit: skipped:", "").strip()).startswith(("accelkit: error: ", "target"))
    assert reason in told.err
    assert "Traceback" not in told.err


def test_debug_gives_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "bench", "mpl"]) == 1
    before = capsys.readouterr().err
    assert main(["bench", "mpl", "--debug"]) == 1
    for text in (before, capsys.readouterr().err):
        assert text.startswith("Traceback")
        assert "InputError: unknown model 'mpl'" in text


def test_models_own_exception_is_told_by_its_name(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", f"{models}:faulty", "--target", "eager", "--output", "m.accel"]) == 1
    assert (
        only_line(capsys.readouterr().err)
        == "accelkit: error: ArithmeticError: the model's own trouble (--debug shows where)"
    )
    assert not Path("m.accel").exists()


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["targets"], "run", interrupted)
    assert main(["targets"]) == 130
    assert only_line(capsys.readouterr().err) == "accelkit: interrupted"


def test_own_warnings_are_one_line_and_others_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warning(options: object) -> int:
        warnings.warn("another package's news", stacklevel=1)
        warnings.warn("slower than asked", accelkit.AccelkitWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(COMMANDS["targets"], "run", warning)
    assert main(["targets"]) == 0
    assert only_line(capsys.readouterr().err) == "accelkit: warning: slower than asked"


# --- as a process


def start(arguments: list[str], folder: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "accelkit.cli", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options,  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_ends_a_process_with_130_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\ndef make():\n    print('begun', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
    )
    process = start(["bench", "slow:make", "--target", "eager"], tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert only_line(err) == "accelkit: interrupted"


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = start(["passes"], tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # as `| head -0` does
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == ""


# --- listings


def test_targets_lists_each_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    for name in plugins.names(plugins.BACKENDS):
        assert row_of(text, name)
    eager = row_of(text, "eager")
    assert "fp32, bf16, fp16" in eager
    assert "cpu 3" in eager
    assert " yes " in eager
    assert "\x1b" not in text, "escape codes where there is no terminal"


def test_targets_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Eager, "unavailable", lambda self: "this machine is too tired: pip install coffee")
    assert main(["targets"]) == 0
    assert "no: this machine is too tired: pip install coffee" in row_of(capsys.readouterr().out, "eager")
    assert main(["env"]) == 0
    assert "target eager: this machine is too tired: pip install coffee" in capsys.readouterr().out


def test_a_broken_plugin_is_shown_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = plugins.find

    def broken(group: str, name: str) -> object:
        if name in ("eager", "remove_dropout"):
            raise accelkit.AccelkitError(f"{name} cannot be loaded: reinstall that package")
        return find(group, name)

    monkeypatch.setattr(plugins, "find", broken)
    assert main(["targets"]) == 0
    assert "no: eager cannot be loaded: reinstall that package" in row_of(capsys.readouterr().out, "eager")
    assert main(["passes"]) == 0
    assert "remove_dropout cannot be loaded" in row_of(capsys.readouterr().out, "remove_dropout")


def test_passes_stand_in_the_order_that_they_run_in(capsys: pytest.CaptureFixture[str]) -> None:
    from accelkit.options import resolve_passes
    from accelkit.precision import BF16

    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    graph_passes, onnx_passes = resolve_passes(None, BF16)
    names = [p.name for p in (*graph_passes, *onnx_passes)]
    listed = [line.split()[0] for line in text.splitlines()[2:]]
    assert [name for name in listed if name in names] == names
    assert listed.index("calibrate_int8") == listed.index("eliminate_dead_code") - 1
    assert set(listed) == set(plugins.names(plugins.PASSES))
    assert re.search(r" \d+ \(bf16, fp16 only\) ", row_of(text, "set_precision"))
    assert "limit_bytes=" in row_of(text, "fold_constants")
    assert re.search(r" accelkit\b", row_of(text, "remove_dropout"))


def test_env_tells_versions_hardware_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path))
    EngineCache(tmp_path).put("0123abcd", {"engine": b"x" * 3000}, {"backend": "eager"})
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "torch").split() == ["torch", torch.__version__]
    assert f"{torch.get_num_threads()} threads in PyTorch" in text
    assert f"{tmp_path}: 1 engine" in text
    assert re.search(r"^GPU +\S", text, re.MULTILINE)
    assert "target eager: ready" in text


# --- the cache


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """Three engines of about 1, 2 and 3 kB, used in the order c, a, b."""
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path))
    cache = EngineCache(tmp_path)
    for age, (key, size) in enumerate({"b": 2000, "a": 1000, "c": 3000}.items()):
        cache.put(key * 8, {"engine": os.urandom(size)}, {"backend": f"of {key}"})
        used = time.time() - 3600 * (age + 1)
        os.utime(tmp_path / "engines" / f"{key * 8}.engine", (used, used))
    return cache


def test_cache_lists_the_latest_first(filled: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["b" * 8, "a" * 8, "c" * 8]
    assert "backend of a" in lines[3]
    assert lines[-1].startswith("3 engines, ")
    assert lines[-1].endswith(f"in {filled.folder}")


def test_cache_limit_removes_the_least_recently_used(filled: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    size = {entry.key: entry.size_bytes for entry in filled.entries()}
    assert main(["cache", "--limit", str(size["b" * 8] + size["a" * 8])]) == 0
    assert [entry.key for entry in filled.entries()] == ["a" * 8, "b" * 8]
    assert capsys.readouterr().out.startswith("removed 1 engine")
    assert main(["cache", "--limit", "1GiB"]) == 0
    assert len(filled.entries()) == 2


def test_cache_clear_and_path(filled: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--path"]) == 0
    assert capsys.readouterr().out == f"{filled.folder}\n"
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("removed 3 engines, ")
    assert filled.entries() == []


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("2GiB", 2**31), ("1.5 kb", 1500), ("3MiB", 3 * 2**20)])
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


# --- bench


def test_bench_measures_each_pair_that_exists(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", f"{models}:make", "--target", "eager", "--precision", "fp32,tf32,bf16", "--batch", "1,6"]
    assert main([*arguments, "--seconds", "0.05", "--json", "rows.json", "--no-cache"]) == 0
    told = capsys.readouterr()
    assert "skipped: target eager has no tf32" in told.err
    content = json.loads(Path("rows.json").read_text())
    rows = {(r["batch"], r["target"], r["precision"]): r for r in content["rows"]}
    for batch in (1, 6):
        plain = rows[batch, "pytorch", "fp32"]
        for target, precision, error in (("eager", "fp32", 1e-5), ("eager", "bf16", 0.1), ("pytorch", "bf16", 0.1)):
            row = rows[batch, target, precision]
            assert row["timing"]["median_ms"] > 0
            assert row["speedup"] == pytest.approx(plain["timing"]["median_ms"] / row["timing"]["median_ms"], rel=0.01)
            assert 0 < row["error"] < error
            assert row["items_per_second"] == pytest.approx(batch * 1e3 / row["timing"]["median_ms"], rel=0.01)
        assert rows[batch, "eager", "bf16"]["error"] > rows[batch, "eager", "fp32"]["error"]
        assert rows[batch, "eager", "fp32"]["build_seconds"] > 0
        assert rows[batch, "eager", "fp32"]["origin"] == "compiled"
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["torch_threads"] == torch.get_num_threads()
    assert len([line for line in told.out.splitlines() if " eager " in line]) == 4


def test_bench_goes_on_after_a_failed_build(
    models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_ = Eager.compile

    def failing(self: Eager, graph: object, inputs: object, context: object) -> object:
        if context.precision.name == "bf16":  # type: ignore[attr-defined]
            raise LoweringError("no bf16 on Mondays")
        return compile_(self, graph, inputs, context)  # type: ignore[arg-type]

    monkeypatch.setattr(Eager, "compile", failing)
    arguments = ["bench", f"{models}:make", "--target", "eager", "--precision", "bf16,fp32", "--seconds", "0.05"]
    assert main([*arguments, "--json", "rows.json", "--no-cache"]) == 1
    assert "error: eager bf16 at batch 1: " in capsys.readouterr().err
    rows = {(r["target"], r["precision"]): r for r in json.loads(Path("rows.json").read_text())["rows"]}
    assert "no bf16 on Mondays" in rows["eager", "bf16"]["failure"]
    assert rows["eager", "bf16"]["timing"] is None
    assert rows["eager", "fp32"]["timing"]["median_ms"] > 0


def test_a_difference_within_the_spread_is_marked() -> None:
    from accelkit.measure import timing_of

    rows = [
        bench.Row(1, "pytorch", "fp32", timing_of([10.0, 11.0, 12.0, 13.0, 14.0])),
        bench.Row(1, "close", "fp32", timing_of([10.5, 11.5, 11.6, 12.5, 13.0])),
        bench.Row(1, "faster", "fp32", timing_of([3.9, 4.0, 4.1])),
    ]
    bench.compare_with_plain(rows)
    assert [row.no_difference for row in rows] == [True, True, False]
    assert rows[2].speedup == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--json", "no_such_folder/rows.json"], "the folder no_such_folder does not exist"),
        (["--json", "."], "it is a folder"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bench_checks_its_arguments_first(
    models: str, extra: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in extra and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["bench", f"{models}:must_not_be_built", "--target", "eager", *extra]) == 1
    assert reason in only_line(capsys.readouterr().err)


def test_a_model_without_inputs_is_told_what_to_do(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{models}:without_inputs", "--target", "eager"]) == 1
    assert "let the callable return (module, inputs)" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["bench", "optimize"])
def test_quiet_switches_progress_off(
    command: str, models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    from accelkit.progress import Progress

    def recorded(enabled: bool = True) -> Progress:
        asked.append(enabled)
        return Progress(enabled)

    monkeypatch.setattr("accelkit.cli.bench.Progress", recorded)
    monkeypatch.setattr("accelkit.pipeline.Progress", recorded)
    extra = ["--seconds", "0.01"] if command == "bench" else ["--output", "m.accel"]
    arguments = [command, f"{models}:make", "--target", "eager", *extra]
    assert main([*arguments, "--quiet"]) == 0
    assert asked
    assert not any(asked)
    asked.clear()
    assert main(arguments) == 0
    assert any(asked)


# --- optimize


def test_optimize_writes_what_load_reads(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimize", f"{models}:make", "--target", "eager", "--batch", "3"]
    assert main([*arguments, "--output", "m.accel", "--report", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "remove_dropout" in out
    assert "wrote m.accel" in out
    (variant,) = json.loads(Path("report.json").read_text())["variants"]
    assert variant["accuracy"][0]["error"] < 1e-5
    model, x = sys.modules[models].make(3)
    with torch.no_grad():
        torch.testing.assert_close(accelkit.load("m.accel")(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_optimize_wants_the_suffix(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", f"{models}:must_not_be_built", "--output", "m.bin"]) == 1
    assert "the name has to end in .accel" in only_line(capsys.readouterr().err)


# --- tables

ROWS = [("one", 1.5, None), ("twenty-two [b]", 22, "x")]


def test_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name", "ms", "note"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "name             ms  note",
        "--------------  ---  ----",
        "one             1.5  -",
        "twenty-two [b]   22  x",
    ]


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table(("name", "ms", "note"), ROWS, "a title")
    text = capsys.readouterr().out
    assert "\u2500" in text, "no line of rich's"
    assert "twenty-two [b]" in text, "cells are text, not markup"


def test_table_on_a_terminal_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    output.print_table(("name", "ms", "note"), ROWS)
    assert "twenty-two [b]   22  x" in capsys.readouterr().out
