"""Benchmarks over many GPUs and on TensorRT, on a CPU: jobs, parts joined, exports and engines by hand, their tables."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import ROOT, load, results, scripts_folders  # noqa: F401 - the fixture is for every test here

TINY = ["--tiny", "--device", "cpu", "--target", "eager", "--batch", "2"]
SCRIPTS = ("fastertransformer_vit", "vision_language_vit", "xformers_vit", "fx2ait_encoder", "bert_gpu")


# --- jobs


def test_every_job_is_one_that_its_script_takes() -> None:
    jobs, run = load("gpu_jobs"), load("gpu_run")
    names = [job.name for found in jobs.LISTS.values() for job in found]
    assert len(set(names)) == len(names) - len(jobs.KERNELS), "a part's name is used twice"
    for name, found in jobs.LISTS.items():
        for job in found:
            assert (ROOT / "benchmarks" / job.script).exists()
            script = {"bert_tools.py": "bert_gpu"}.get(job.script, job.script.removesuffix(".py"))
            if script in SCRIPTS:
                options = run.parse(load(script).EXPERIMENTS, "", [*job.arguments, "--part", job.name, "--run", name])
                assert options.part == job.name
            elif script == "tensorrt_build":
                load(script).parse(list(job.arguments))


def test_fused_list_has_every_cell_of_every_table() -> None:
    jobs, run = load("gpu_jobs"), load("gpu_run")
    found: set[tuple[str, int, str]] = set()
    experiments = [e for script in SCRIPTS for e in load(script).EXPERIMENTS]
    for job in jobs.FUSED:
        script = {"bert_tools.py": "bert_gpu"}.get(job.script, job.script.removesuffix(".py"))
        options = run.parse(load(script).EXPERIMENTS, "", list(job.arguments))
        for e in load(script).EXPERIMENTS:
            if e.model in options.model:
                for table in (e, *e.also):
                    found |= {(table.name, b, p) for b in options.batch for p in options.precision}
    wanted = {(e.name, b, p) for e in experiments for b in e.batches for p in e.precisions}
    few = {c for c in wanted if c[0] == "bert_tools" and c[2] != "fp16" and c[1] not in (1, 8, 64)}
    assert wanted - few <= found
    assert not wanted - few - found


class Script:
    """Jobs of a small Python script in place of a benchmark's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.launcher = load("on_all_gpus")
        (folder / "script.py").write_text(text)
        monkeypatch.setattr(self.launcher, "HERE", folder)
        monkeypatch.setattr(self.launcher, "POLL_S", 0.01)
        monkeypatch.setattr(self.launcher, "CLEAN_UP_S", 0.0)
        self.output = folder / "out"

    def go(self, names: str, budget_s: float, slots: int, **facts: Any) -> dict[str, dict[str, Any]]:
        job = load("gpu_jobs").Job
        jobs = [job(name, "script.py", (name,), seconds=facts.get(name, 0.1)) for name in names.split()]
        found = self.launcher.Launcher("fused", jobs, [""] * slots, self.output, budget_s)
        found.go()
        return {outcome["job"]: outcome for outcome in found.outcomes}


def test_launcher_records_what_became_of_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import os, sys, time
if sys.argv[1] == "fails":
    sys.exit("no such model")
if sys.argv[1] == "hangs":
    time.sleep(60)
print(os.environ["OMP_NUM_THREADS"], os.environ["ACCELKIT_CACHE_DIR"], *sys.argv)
"""
    script = Script(tmp_path, monkeypatch, text)
    found = script.go("works fails hangs never", 1.5, 2, never=60.0, hangs=1.0)
    assert found["works"]["status"] == "done"
    assert found["fails"]["status"] == "failed, exit code 1: no such model"
    assert found["hangs"]["status"] == "ended: the budget was used up"
    assert found["never"]["status"] == "not started: too little of the budget was left"
    said = (script.output / "logs" / "works.log").read_text()
    assert "--part works --run fused --at-once 2" in said
    assert not Path(said.split()[1]).exists(), "the job's cache folder was left"


def test_launcher_ends_a_job_at_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(tmp_path, monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(load("gpu_jobs").Job, "limit_s", property(lambda job: 0.3))
    assert script.go("slow", 20.0, 1)["slow"]["status"] == "ended: its time limit"


def test_choosing_jobs() -> None:
    launcher, jobs = load("on_all_gpus"), load("gpu_jobs").FUSED
    assert all(j.name.startswith("fx2ait") for j in launcher.chosen(jobs, ["fx2ait*"], None))
    slices = [launcher.chosen(jobs, None, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(j.name for part in slices for j in part) == sorted(j.name for j in jobs)
    with pytest.raises(SystemExit, match="no job has such a name"):
        launcher.chosen(jobs, ["nothing*"], None)
    with pytest.raises(SystemExit, match="it should be such as 1/4"):
        launcher.chosen(jobs, None, "5/4")
    assert launcher.parse(["fused", "--list", "--", "--tiny"]).more == ["--tiny"]


# --- parts


def part(name: str, batch: int, ms: float | None, run: str = "fused", *candidates: str, **facts: Any) -> dict[str, Any]:
    rows = [
        {"candidate": c, "batch": batch, "precision": "fp16", "failure": None if ms else "no GPU",
         **({"median_ms": ms, "low_ms": ms, "high_ms": ms, "error": 1e-3} if ms else {})}
        for c in candidates or ("eager", "accelkit")
    ]  # fmt: skip
    return {
        "name": f"table@{name}", "part": name, "run": run, "date": "2026-02-01", "machine": "NVIDIA H200, 140 GiB",
        "versions": {"torch": "2.11.0"}, "target": "fastertransformer", "gpus_at_once": 8, "threads": 16, "tiny": False,
        "gpu_title": "A title", "description": "a model", "labels": {c: c for c in ("eager", "accelkit", *candidates)},
        "sparse": [], "ceilings": {"tflops": {"fp16": 700.0 + batch}, "copy_tb_s": 4.2, "size": 8192}, "rows": rows,
        **facts,
    }  # fmt: skip


def old(**facts: Any) -> dict[str, Any]:
    """A file from before there were parts."""
    found = part("", 1, 3.0) | {"name": "table", "date": "2026-01-01", "versions": {"torch": "2.10.0"}}
    found["rows"] += part("", 8, 4.0)["rows"]
    for key in ("part", "run", "gpus_at_once", "threads"):
        del found[key]
    return found | facts


def test_rows_that_were_measured_anew_replace_the_old_ones_and_all_say_where_they_are_from() -> None:
    merge = load("merge_results").merge
    merged, notes = merge(old(), [part("b8", 8, 2.0), part("b32", 32, 6.0)])
    assert merged["name"] == "table"
    assert [(r["batch"], r["median_ms"]) for r in merged["rows"]] == [(1, 3.0)] * 2 + [(8, 2.0)] * 2 + [(32, 6.0)] * 2
    torches = [merged["sets"][r["set"]]["versions"]["torch"] for r in merged["rows"]]
    assert torches == ["2.10.0"] * 2 + ["2.11.0"] * 4
    assert {s["gpus_at_once"] for s in merged["sets"].values() if "gpus_at_once" in s} == {8}
    assert not notes
    again, _ = merge(merged, [part("b8", 8, 2.0), part("b32", 32, 6.0)])
    assert again["rows"] == [{**row, "set": again["rows"][i]["set"]} for i, row in enumerate(merged["rows"])]
    assert len(again["sets"]) == len(merged["sets"]), "sets that no row is from are left out"


def test_a_group_without_a_measurement_replaces_none_and_lost_candidates_are_told() -> None:
    merge = load("merge_results").merge
    merged, notes = merge(old(), [part("b8", 8, None)])
    assert [r["median_ms"] for r in merged["rows"]] == [3.0, 3.0, 4.0, 4.0]
    assert notes == ["fused, batch 8, fp16: nothing was measured; the rows that were there stay"]
    _, notes = merge(old(), [part("b8", 8, 1.0, "fused", "eager")])
    assert notes == ["fused, batch 8, fp16: measured anew without accelkit"]


def test_runs_stand_beside_each_other_and_tables_compare_within_one() -> None:
    merge, tables = load("merge_results").merge, load("gpu_tables")
    engines = ("eager", "tensorrt-torchscript", "accelkit", "accelkit-tensorrt")
    merged, _ = merge(old(), [part("t8", 8, 2.0, "tensorrt", *engines)])
    first, second = tables.by_run(merged)
    assert (tables.run_of(first), tables.run_of(second)) == ("fused", "tensorrt")
    assert len(first["rows"]) == len(second["rows"]) == 4
    titles = [t.title for t in tables.tables(merged, {})]
    assert titles[0] == "fp16: accelkit, the best peer of the run, and the floor"
    assert "TensorRT: accelkit beside engines built by hand in the same run (run tensorrt)" in titles
    assert tables.ceilings(merged).startswith("Ceilings of this run: fp16 701 to 708 TFLOP/s")
    origin = load("gpu_page").origin(Path("results/h200/table.json"), merged)
    assert (
        "run fused; NVIDIA H200, 140 GiB; accelkit's target `fastertransformer`; torch 2.10.0; 2026-01-01; and"
        in origin
    )
    assert "run tensorrt; NVIDIA H200, 140 GiB; 8 GPUs at once, each with 16 processor threads;" in origin
    lines = load("gpu_plots").lines(merged)
    assert lines["tensorrt-torchscript"] == [(8, 1.0)]
    assert [batch for batch, _ in lines["accelkit"]] == [1, 8]


def test_a_folder_of_parts_is_joined_with_what_is_recorded(tmp_path: Path) -> None:
    merger = load("merge_results")
    parts, recorded = tmp_path / "parts" / "h200", tmp_path / "results"
    for folder in (parts, recorded / "h200"):
        folder.mkdir(parents=True)
    (recorded / "h200" / "table.json").write_text(json.dumps(old()))
    (parts / "table@b8.json").write_text(json.dumps(part("b8", 8, 2.0)))
    (parts / "choices@all.json").write_text(
        json.dumps(part("all", 8, 2.0) | {"name": "choices@all", "rows": [{"us": 1}]})
    )
    jobs = {"date": "2026-02-01", "rows": [{"job": "a", "status": "done"}]}
    (parts / "jobs_fused.json").write_text(json.dumps(jobs))
    assert merger.main([str(tmp_path / "parts"), "--into", str(recorded)]) == 0
    assert [r["median_ms"] for r in results(recorded, "table")["rows"]] == [3.0, 3.0, 2.0, 2.0]
    assert results(recorded, "choices")["rows"] == [{"us": 1}]
    (parts / "jobs_fused.json").write_text(json.dumps({**jobs, "rows": [{"job": "b", "status": "failed"}]}))
    merger.main([str(tmp_path / "parts"), "--into", str(recorded)])
    assert [(r["job"], r["date"]) for r in results(recorded, "jobs_fused")["rows"]] == [
        ("a", "2026-02-01"),
        ("b", "2026-02-01"),
    ]
    assert merger.main([str(tmp_path), "--into", str(recorded)]) == 1


def test_a_part_is_recorded_in_every_table_of_its_model(tmp_path: Path) -> None:
    arguments = [*TINY, "--model", "vit-b16-224", "--peers", "eager", "--output", str(tmp_path), "--part", "b2"]
    load("fastertransformer_vit").run([*arguments, "--run", "tensorrt", "--at-once", "8", "--own-stream"])
    for name in ("fastertransformer_vit_b16_224", "vision_language_vit"):
        found = results(tmp_path, f"{name}@b2")
        assert (found["run"], found["part"], found["gpus_at_once"]) == ("tensorrt", "b2", 8)
        assert found["own_stream"]
    assert "vision-language" in found["gpu_title"]


# --- TensorRT


def test_without_tensorrt_its_candidates_are_rows_with_the_reason(tmp_path: Path) -> None:
    peers = "eager,tensorrt-torchscript,tensorrt-torchscript-graph,tensorrt-dynamo,accelkit-tensorrt"
    load("fx2ait_encoder").run([*TINY, "--peers", peers, "--output", str(tmp_path)])
    rows = {r["candidate"]: r for r in results(tmp_path, "fx2ait_encoder")["rows"]}
    assert list(rows) == peers.split(",")
    if "tensorrt" not in sys.modules:
        assert "TensorRT is missing" in rows["tensorrt-torchscript"]["failure"]
        assert "TensorRT is missing" in rows["tensorrt-torchscript-graph"]["failure"]
    assert "this model is on cpu" in rows["accelkit-tensorrt"]["failure"]
    assert rows["eager"]["failure"] is None
    load("tensorrt_build").main(
        ["--tiny", "--device", "cpu", "--model", "encoder-block", "--batch", "1", "--output", str(tmp_path)]
    )
    (row,) = results(tmp_path, "tensorrt_build")["rows"]
    assert set(row["failures"]) == set(load("tensorrt_build").STEPS)
    assert row["failure"] == row["failures"]["cold"]


@pytest.mark.parametrize("name", ["vit-b16-224", "bert-base-128-padded", "encoder-block"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@torch.no_grad()
def test_exports_by_hand_are_the_model(name: str, exporter: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    by_hand, trt = load("by_hand"), load("tensorrt_by_hand")
    spec = load("gpu_models").subject(name, tiny=True)
    model, inputs = spec.make(), spec.make_inputs(2)
    names, outputs = trt.export(model, inputs, exporter, tmp_path / "model.onnx")
    feed = dict(zip(names, (t.numpy() for t in trt.names_of(inputs)[1]), strict=True))
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(outputs, feed)
    for one, right in zip(found, by_hand.flat_call(model, inputs)(), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), right, rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("version", ["8.6", pytest.param("10.16", marks=pytest.mark.exhaustive), "11.4"])
@torch.no_grad()
def test_an_engine_by_hand_uses_only_what_the_version_has(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "backends"))
    import fake_tensorrt

    trt, by_hand, module = fake_tensorrt.load(version), load("tensorrt_by_hand"), load("by_hand")
    spec = load("gpu_models").subject("encoder-block", tiny=True)
    model, inputs = spec.make(), spec.make_inputs(2)
    path = tmp_path / "model.onnx"
    names, outputs = by_hand.export(model, inputs, "torchscript", path)
    for precision in ("fp32", "tf32", "fp16"):
        plan, seconds, cache = by_hand.build(trt, path, precision, dict.fromkeys(names, torch.float16), b"")
        assert set(seconds) == {"parse", "build"}
        assert cache
    engine, _runtime = by_hand.load(trt, plan)
    call = by_hand.bind(engine, dict(zip(names, inputs, strict=True)), outputs)
    torch.testing.assert_close(call()[0], module.flat_call(model, inputs)()[0], rtol=1e-3, atol=1e-3)
    assert call.facts["device_memory_bytes"] > 0
    refusing = fake_tensorrt.load(version, refuse=["Softmax"])
    with pytest.raises(RuntimeError, match=r"TensorRT's parser refuses the file: .*Softmax"):
        by_hand.build(refusing, path, "fp16", {})


def test_tactic_sources_whose_libraries_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "backends"))
    import fake_tensorrt

    trt, by_hand = fake_tensorrt.load("8.6"), load("tensorrt_by_hand")
    bits = {name: 1 << int(member) for name, member in trt.TacticSource.__members__.items()}
    monkeypatch.setattr(by_hand, "_works", lambda file, symbol: False)
    assert by_hand.usable_sources(trt, sum(bits.values())) == bits["EDGE_MASK_CONVOLUTIONS"] | bits["JIT_CONVOLUTIONS"]
    monkeypatch.setattr(by_hand, "_works", lambda file, symbol: True)
    assert by_hand.usable_sources(trt, sum(bits.values())) == sum(bits.values())


def test_builds_are_recorded_where_the_target_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.tensorrt import backend, building
    from accelkit.backends.tensorrt.job import BuildJob, BuildResult

    result = BuildResult(seconds={"parse": 1.0, "build": 2.0})
    for module in (backend, building):
        monkeypatch.setattr(module, "build_plan", _built := lambda *_, **__: (b"plan", result))
    monkeypatch.setattr(backend, "build_plan", building.build_plan)
    with load("tensorrt_ours").recorded_builds() as builds:
        assert backend.build_plan(BuildJob("x"))[0] == b"plan"
    assert builds == [(b"plan", result)]
    assert backend.build_plan is building.build_plan is _built
    backend.build_plan(BuildJob("x"))
    assert len(builds) == 1


# --- TensorRT's tables


def engine(candidate: str, ms: float, batch: int = 32, **facts: Any) -> dict[str, Any]:
    timing = {"median_ms": ms, "low_ms": ms * 0.99, "high_ms": ms * 1.01, "error": 1e-3}
    return {"candidate": candidate, "batch": batch, "precision": "fp16", "failure": None, **timing, **facts}


def test_table_of_engines_says_whether_the_goals_were_reached() -> None:
    table = load("tensorrt_tables").engines
    rows = [
        engine("eager", 10.0), engine("tensorrt-torchscript", 11.8, engine_bytes=2**20, seconds={"parse": 1.0, "build": 50.0}),
        engine("tensorrt-dynamo", 21.5), engine("tensorrt-dynamo-half", 11.5),
        engine("accelkit-tensorrt", 10.4, error=1.9e-3, seconds={"optimize": 60.0, "tensorrt": 57.0}, engine_bytes=2**21),
    ]  # fmt: skip
    result = {"name": "fastertransformer_vit_b16_384", "rows": rows}
    (line,) = table(result).rows
    assert line[:7] == ["fp16", 32, "10.0", "11.8", "11.5", "10.4", "1.11x"]
    assert line[7:] == ["at least 10% faster", "no", "1.90", "yes", "51", "60", "1", "2"], "11.5 * 0.9 is 10.35"
    (line,) = table({**result, "name": "another"}).rows
    assert line[7:9] == ["no slower", "yes"]
    rows[-1] |= {"median_ms": 11.6, "error": 2.1e-3}
    (line,) = table({**result, "name": "another"}).rows
    assert line[8:11] == ["yes", "2.10", "no"], "slower by less than the spread"
    rows[-1]["median_ms"] = 12.0
    assert table({**result, "name": "another"}).rows[0][8] == "no"
    rows[-1] = {"candidate": "accelkit-tensorrt", "batch": 32, "precision": "fp16", "failure": "LoweringError: no"}
    assert table(result).rows[0][8] == "no"
    assert not table({**result, "rows": [engine("eager", 1.0)]}).rows


def test_tables_of_builds(tmp_path: Path) -> None:
    row = {
        "model": "encoder-block", "batch": 1, "precision": "fp16", "failure": None, "failures": {"plain": "RuntimeError: no"},
        "cold": {"seconds": {"optimize": 10.8, "tensorrt": 10.0, "own": 0.8}, "engine_bytes": 2**20},
        "warm": {"seconds": {"optimize": 3.0, "tensorrt": 2.5, "own": 0.5}},
        "cached": {"seconds": {"optimize": 0.4, "tensorrt": 0.0, "own": 0.4}, "memory_bytes": 2**21},
        "overhead": {"raw_us": 40.0, "accelkit_us": 75.0, "overhead_us": 35.0, "device_memory_bytes": 2**19},
        "refit": {"refit_seconds": 0.2, "built": {"tensorrt": 11.0}, "error": 1e-3, "plain_error": 1e-3},
    }  # fmt: skip
    found = {t.title: t.rows for t in load("tensorrt_tables").builds({"rows": [row]})}
    assert found["Build"][0][3:11] == ["10.0", "0.8", "8%", "yes", "2.5", "4.0x", "yes", "0.4"]
    assert found["A call, on the host"] == [["encoder-block", 1, "fp16", "yes", "40.0", "75.0", "35.0", "no"]]
    assert found["Other weights for a refittable engine"][0][3:] == ["0.20", "11.0", "1.00"]
    assert found["Not measured"] == [["encoder-block", 1, "fp16", "plain", "RuntimeError: no"]]
    file = part("b1", 1, 2.0) | {"name": "tensorrt_build", "build_title": "Builds", "rows": [row]}
    del file["gpu_title"]
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "tensorrt_build.json").write_text(json.dumps(file))
    text = load("gpu_page").document(tmp_path, load("generate_tables").markdown_table)
    assert text.startswith("## Builds\n\nrun fused; NVIDIA H200")
    assert re.search(r"\| encoder-block \| 1 \| fp16 \| 10.0 \| 0.8 \| 8% \| yes \|", text)
