"""What calls look up: loaded once from disk, one dict access afterwards; and its form in files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fake_problems import ENVIRONMENT, GPU, Config, Inner, Problem

from accelkit.errors import AccelkitWarning
from accelkit.tuning import choices, files
from accelkit.tuning.choices import Choices, from_json, to_json


def keep(problem: Any, choice: Any, kind: str = "fake") -> None:
    files.keep(GPU, [{"kind": kind, "problem": to_json(problem), "choice": to_json(choice)}])


def test_the_file_is_read_by_the_first_lookup_only(
    kind: Choices[Problem, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(Problem(4), Config("fast"))
    reads = []
    read = files.entries_of
    monkeypatch.setattr(files, "entries_of", lambda device: reads.append(device) or read(device))
    assert [kind[GPU, Problem(4)] for _ in range(3)] == [Config("fast")] * 3
    assert kind[GPU, Problem(5)] is None
    assert reads == [GPU]
    assert dict.get(kind, (GPU, Problem(5)), "not there") is None  # the next look-up finds it at once
    kind.forget()
    assert kind[GPU, Problem(4)] == Config("fast")
    assert len(reads) == 2


def test_nothing_is_read_on_a_cpu(kind: Choices[Problem, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "entries_of", lambda device: pytest.fail("read a file"))
    assert kind[torch.device("cpu"), Problem(4)] is None


def test_lengths_without_end_are_not_remembered(
    kind: Choices[Problem, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MOST", 3)
    keep(Problem(1), Config("fast"))
    assert [kind[GPU, Problem(rows)] for rows in range(2, 20)] == [None] * 18
    assert len(kind) == 3
    assert kind[GPU, Problem(1)] == Config("fast")


def test_what_this_version_does_not_write_is_passed_over(kind: Choices[Problem, Config]) -> None:
    keep(Problem(1), Config("fast"))
    keep(Problem(2), Config("never a candidate"))
    keep(Problem(3), Problem(3))
    files.keep(GPU, [{"kind": "fake", "problem": {"rows": "many", "dtype": "float16"}, "choice": {}}])
    files.keep(GPU, [{"kind": "fake"}])
    with pytest.warns(AccelkitWarning, match="4 tuned fake choices in .* are passed over"):
        assert kind[GPU, Problem(1)] == Config("fast")
    assert [kind[GPU, Problem(rows)] for rows in (2, 3)] == [None, None]


def test_a_damaged_file_is_one_warning_and_no_choice(kind: Choices[Problem, Config]) -> None:
    keep(Problem(1), Config("fast"))
    path = files.path_of(GPU)
    assert path is not None
    path.write_text(path.read_text()[:-40])
    other = Choices("other", Problem, Config, lambda device, problem: [])
    with pytest.warns(AccelkitWarning, match="tuned choices cannot be read from") as told:
        found = [kind[GPU, Problem(1)], other[GPU, Problem(1)]]
    assert found == [None, None]
    assert len(told) == 1
    keep(Problem(1), Config("slow"))
    kind.forget()
    assert kind[GPU, Problem(1)] == Config("slow")


@pytest.mark.parametrize("value", [Problem(3, torch.bfloat16), Config("x"), Config("x", Inner(4))])
def test_json_and_back(value: Any) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (Problem, []),
        (Problem, {"rows": 1}),
        (Problem, {"rows": 1, "dtype": "float16", "more": 1}),
        (Problem, {"rows": True, "dtype": "float16"}),
        (Problem, {"rows": 1.0, "dtype": "float16"}),
        (Problem, {"rows": 1, "dtype": "nn"}),
        (Config, {"name": "x", "inner": {"warps": "4"}}),
        (Config, {"name": None, "inner": None}),
    ],
)
def test_json_of_another_form(cls: Any, data: Any) -> None:
    with pytest.raises(TypeError):
        from_json(cls, data)


def test_every_part_of_the_environment_is_in_the_name() -> None:
    names = {ENVIRONMENT._replace(**{field: "other"}).name for field in ENVIRONMENT._fields}
    assert len(names | {ENVIRONMENT.name}) == len(ENVIRONMENT._fields) + 1
    assert ENVIRONMENT.name.startswith("nvidia-h200-")


def test_the_operators_kinds_are_registered() -> None:
    pytest.importorskip("triton")
    from accelkit.kernels import attention, linear, norms, split
    from accelkit.ops import attention_choice

    known = [module.chosen for module in (attention, linear, norms, split, attention_choice)]
    assert {choices.KINDS[one.kind] is one for one in known} == {True}
    assert len({one.kind for one in known}) == len(known)
