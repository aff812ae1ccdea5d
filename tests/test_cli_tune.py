"""`accelkit tune`: what it prints, where, and with which exit code; the measuring is tested in tests/tuning."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels to choose among need Triton")

from accelkit.backends.fastertransformer import tune as tuning_of_graphs
from accelkit.cli import main
from accelkit.cli import tune as command
from accelkit.kernels.linear import CUBLAS, LinearConfig, LinearProblem
from accelkit.precision import FP16
from accelkit.tuning import files
from accelkit.tuning.measuring import Result
from accelkit.tuning.problems.linear import LinearTask
from accelkit.tuning.tuner import Outcome

ENVIRONMENT = files.Environment("NVIDIA H200", "9.0", "580.1", "2.11", "13.0", "3.6", "0123abcd")
TILES = LinearConfig("tiles", 64, 64, 64, 4, 5)
TASK = LinearTask(LinearProblem(577, 3072, 768, torch.float16, "gelu", False, False), torch.device("cuda", 0))
RESULT = Result(
    TASK, CUBLAS, TILES, 0.0152, 0.0101, {CUBLAS: 0.0152, TILES: 0.0101}, {LinearConfig("hopper"): "wrong: 1"}
)
ROW = [
    "linear",
    "577",
    "x",
    "768",
    "to",
    "3072",
    "float16,",
    "gelu",
    "15.2",
    "10.1",
    "1.50x",
    "tiles",
    "64",
    "64",
    "64",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that is not there; the calls that would have tuned."""
    asked: list[Any] = []

    def tune_tasks(tasks: list[Any], seconds: float, device: torch.device, progress: Any, again: bool) -> Outcome:
        progress(0, 1, "linear")
        asked.append((tasks, seconds, device, again))
        return Outcome([RESULT], [], {"attention": "the time budget was spent"}, 3.0)

    def tasks_of_model(model: Any, inputs: Any, precision: Any) -> list[Any]:
        return [(inputs[0].shape[0], str(precision))]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(command, "on_device", lambda inputs, device: inputs)
    monkeypatch.setattr(files, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(tuning_of_graphs, "tune_tasks", tune_tasks)
    monkeypatch.setattr(tuning_of_graphs, "tasks_of_model", tasks_of_model)
    return asked


def test_on_a_cpu_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "mlp", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("nothing to tune on a CPU: fused operators run their plain definitions there\n", "")


def test_without_a_gpu_cuda_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "mlp", "--device", "cuda"]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "one of the arguments MODEL --list --clear is required"),
        (["mlp", "--list"], "not allowed with"),
        (["--list", "--clear"], "not allowed with"),
        (["mlp", "--batch", "0"], "'0' is not a batch size"),
        (["mlp", "--budget", "0"], "above zero"),
    ],
)
def test_wrong_command_line_is_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_unknown_precision_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "mlp", "--precision", "fp15"]) == 1
    assert "unknown precision 'fp15'" in capsys.readouterr().err


def test_a_table_of_what_was_gained(gpu: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "mlp", "--batch", "1", "2,4", "--precision", "fp16", "--budget", "7", "--again"]
    assert main(arguments) == 0
    assert gpu == [([(1, "fp16"), (2, "fp16"), (4, "fp16")], 7.0, torch.device("cuda", 0), True)]
    told = capsys.readouterr()
    (row,) = (line.split() for line in told.out.splitlines() if line.startswith("linear"))
    assert row[: len(ROW)] == ROW
    assert told.out.strip().endswith(f"kept in {os.environ['ACCELKIT_CACHE_DIR']}/tuning/{ENVIRONMENT.name}.json")
    assert "warning: not tuned: attention: the time budget was spent" in told.err
    assert "passed over: wrong: 1" in told.err


def test_a_progress_bar_on_a_terminal(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command.tune_model("mlp", [1], FP16, torch.device("cuda", 0), 1.0, False, True)
    assert len(gpu) == 1


def test_list_and_clear(capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.folder()
    assert folder is not None
    assert main(["tune", "--list"]) == 0
    assert capsys.readouterr().out == f"nothing is tuned yet in {folder}\n"
    files.merge(folder / "h200.json", ENVIRONMENT, [RESULT.to_json()])
    assert main(["tune", "--list"]) == 0
    told = capsys.readouterr().out
    assert "gpu NVIDIA H200, capability 9.0, driver 580.1" in told
    (row,) = (line.split() for line in told.splitlines() if line.startswith("linear"))
    assert row[: len(ROW)] == ROW
    assert f"1 problem in {folder / 'h200.json'}" in told
    assert main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 1 file of tuned choices from {folder}\n"
    assert not list(Path(folder).glob("*.json"))


def test_a_damaged_file_is_listed_as_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.folder()
    assert folder is not None
    folder.mkdir(parents=True)
    (folder / "h200.json").write_text("{")
    assert main(["tune", "--list"]) == 0
    told = capsys.readouterr()
    assert "tuned choices cannot be read from" in told.err
    assert "0 problems in" in told.out
