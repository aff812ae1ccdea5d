"""The GPU benchmarks on a CPU: every script on tiny models, what becomes of candidates that fail, floors, tables, plots."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import ROOT, load, results, scripts_folders  # noqa: F401 - the fixture is for every test here
from torch import nn
from torch.nn import functional as F

TINY = ["--tiny", "--device", "cpu", "--target", "eager", "--batch", "2"]
SCRIPTS = {
    "fastertransformer_vit": (["--model", "vit-b16-224"], "fastertransformer_vit_b16_224"),
    "vision_language_vit": ([], "vision_language_vit"),
    "xformers_vit": (["--model", "vit-xformers-96"], "xformers_vit_small"),
    "fx2ait_encoder": ([], "fx2ait_encoder"),
    "bert_tools": (["--model", "bert-base-128"], "bert_tools"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_and_says_what_it_could_not_measure(script: str, tmp_path: Path) -> None:
    more, name = SCRIPTS[script]
    module = load(script)
    start = {"bert_tools": "main", "xformers_vit": "measure"}.get(script, "run")
    peers = ["--peers", "eager,graph,xformers,accelkit"]
    assert getattr(module, start)([*TINY, *more, *peers, "--output", str(tmp_path)]) == 0
    found = results(tmp_path, name)
    rows = {r["candidate"]: r for r in found["rows"]}
    assert list(rows) == ["eager", "graph", "xformers", "accelkit"]
    assert rows["graph"]["failure"] == "RuntimeError: CUDA graphs need a GPU"
    assert rows["xformers"]["failure"], "not installed, or without kernels for a CPU"
    for ours in (rows["eager"], rows["accelkit"]):
        assert ours["failure"] is None
        assert 1e-5 < ours["error"] < 1e-2
        assert ours["low_ms"] <= ours["median_ms"] <= ours["high_ms"]
        assert ours["share_of_floor"] == pytest.approx(ours["floor_ms"] / ours["median_ms"], abs=1e-3)
    assert found["tiny"]
    assert found["versions"]["torch"] == torch.__version__


def test_padded_rows_are_compared_on_their_text(tmp_path: Path) -> None:
    bert = load("bert_gpu")
    arguments = ["--model", "bert-base-128-padded", "--peers", "eager,accelkit-padded", "--output", str(tmp_path)]
    bert.run([*TINY, *arguments])
    rows = {r["candidate"]: r for r in results(tmp_path, "bert_tools_padded")["rows"]}
    assert rows["accelkit-padded"]["error"] < 2 * rows["eager"]["error"]


def test_sparse_candidates_are_checked_against_the_sparse_model(tmp_path: Path) -> None:
    arguments = ["--model", "vit-b16-1024", "--peers", "vanilla,sparse", "--output", str(tmp_path)]
    load("xformers_vit").measure([*TINY, *arguments])
    found = results(tmp_path, "xformers_vit_b16_1024")
    rows = {r["candidate"]: r for r in found["rows"]}
    assert rows["sparse"]["error"] < 1e-2
    assert "floor_ms" not in rows["sparse"], "the floor is the dense model's"
    assert found["sparse"] == ["sparse", "accelkit-sparse"]


def experiment(*peers: Any) -> Any:
    candidates = {f"peer{i}": p for i, p in enumerate(peers)}
    return load("gpu_run").Experiment("name", "title", "encoder-block", (1,), (1,), ("fp32",), candidates)


def test_failures_while_building_and_timing_and_a_spent_budget_are_rows(tmp_path: Path) -> None:
    run, peers = load("gpu_run"), load("gpu_peers")
    calls = iter(range(100))

    def breaks_later(case: Any) -> Any:
        good = peers.eager(case)
        return lambda: good() if next(calls) < 4 else 1 / 0  # built, checked, called once more; then timed

    def wrong_shape(case: Any) -> Any:
        return lambda: torch.zeros(3)

    given = [*TINY, "--output", str(tmp_path)]
    bad = experiment(peers.Peer("wrong", wrong_shape, wide=True), peers.Peer("late", breaks_later, wide=True))
    assert run.main([bad], "", given) == 0
    wrong, late = results(tmp_path, "name")["rows"]
    assert wrong["failure"] == "RuntimeError: outputs [(3,)], not [(2, 9, 64)]"
    assert late["failure"] == "the timed rounds stopped: ZeroDivisionError: division by zero"
    assert run.main([experiment(peers.PEERS["eager"])], "", [*given, "--budget", "0"]) != 0
    (late,) = results(tmp_path, "name")["rows"]
    assert late["failure"] == "the run's time budget of 0 s was used up"


def test_a_candidate_that_ends_the_process_takes_no_rows_along(tmp_path: Path) -> None:
    run, peers = load("gpu_run"), load("gpu_peers")
    good = peers.PEERS["eager"]

    def ends(case: Any) -> Any:
        raise KeyboardInterrupt

    def of(build: Any) -> Any:
        candidates = {"risky": peers.Peer("risky", build, wide=True, risky=True), "eager": good}
        return run.Experiment("name", "title", "encoder-block", (1, 2), (1, 2), ("fp32",), candidates)

    given = [*TINY, "--batch", "1,2", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        run.main([of(ends)], "", given)
    rows = results(tmp_path, "name")["rows"]
    assert [(r["batch"], r["candidate"], r["failure"]) for r in rows] == [
        (1, "risky", run.ENDED), (1, "eager", None), (2, "eager", None),
    ]  # fmt: skip
    assert all("median_ms" in r for r in rows if r["candidate"] == "eager")
    assert run.main([of(peers.eager)], "", given) == 0
    rows = results(tmp_path, "name")["rows"]
    assert [(r["batch"], r["candidate"], r["failure"]) for r in rows] == [
        (b, c, None) for b in (1, 2) for c in ("risky", "eager")
    ]
    assert all(r["speedup"] is not None for r in rows)


def test_a_recording_keeps_what_its_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """An execution context that was collected took its memory along, and the engine its kernels: the replay crashed."""
    peers = load("gpu_peers")
    asked: dict[str, Any] = {}
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def capturing(graph: Any, **options: Any) -> Any:
        asked.update(options)
        return nullcontext()

    for name, value in (
        ("Stream", lambda: stream), ("current_stream", lambda: stream), ("stream", lambda one: nullcontext()),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)), ("graph", capturing),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    class Context:
        def __call__(self) -> str:
            return "output"

    context = Context()
    kept = weakref.ref(context)
    made = peers._recorded(context, "cuda")
    del context
    gc.collect()
    assert kept() is not None
    assert made() == "output"
    assert asked == {"stream": stream, "capture_error_mode": "thread_local"}


def test_peers_of_a_run(tmp_path: Path) -> None:
    run, vit = load("gpu_run"), load("fastertransformer_vit")

    def chosen(precision: str, *arguments: str) -> list[str]:
        options = run.parse(vit.EXPERIMENTS, "", [*TINY, *arguments])
        return list(run.Run(vit.EXPERIMENTS[0], options).peers(precision))

    wide = ["eager", "graph", "compile", "accelkit"]
    assert chosen("fp32") == wide
    assert chosen("fp16") == ["eager", "graph", "compile", "xformers", "xformers-graph", "onnxruntime", "accelkit"]
    assert chosen("fp32", "--peers", "+autotune") == ["eager", "graph", "compile", "autotune", "accelkit"]
    assert chosen("fp32", "--peers", "xformers,eager") == ["eager", "xformers"]
    with pytest.raises(SystemExit):
        run.parse(vit.EXPERIMENTS, "", ["--peers", "tensorflow"])


def test_compiled_peer_names_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("gpu_peers")
    asked: list[dict[str, Any]] = []

    def compiled(model: nn.Module, **options: Any) -> nn.Module:
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    for key in ("compile", "autotune"):
        torch.testing.assert_close(peers.PEERS[key].build(peers.Case(model, (x,), "fp32"))(), model(x))
    assert asked == [{"mode": m, "dynamic": False} for m in ("reduce-overhead", "max-autotune")]


def test_error_of_outputs() -> None:
    error = load("gpu_run").error
    truth = torch.randn(2, 3, 4, dtype=torch.float64)
    kept = torch.tensor([[True, True, True], [True, False, False]])
    garbage = truth.clone()
    garbage[1, 1:] = float("nan")
    assert error([garbage], [truth], None) == float("inf")
    assert error([garbage], [truth], kept) == 0.0
    assert error([truth, truth * 1.5], [truth, truth], kept) == pytest.approx(0.5)


# --- models, patterns, swapped attention


def test_lengths_have_the_mean_that_they_should() -> None:
    models = load("gpu_models")
    for batch in (1, 2, 7, 64):
        drawn = models.lengths(batch)
        assert drawn == models.lengths(batch)
        assert sum(drawn) == round(0.4 * 128 * batch)
        assert all(1 <= length <= 128 for length in drawn)
    inputs = models.padded_inputs(3)
    assert inputs["attention_mask"].sum(1).tolist() == models.lengths(3)
    assert bool((inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all())


def test_patterns() -> None:
    patterns = load("patterns")
    union = patterns.seed_pattern(14)
    assert torch.equal(union, patterns.seed_pattern(14))
    assert union[0].all()
    assert union[:, 0].all()
    assert union.diagonal().all()
    assert 0.78 < 1 - union.float().mean() < 0.84, "xFormers' notebook says 0.806 of its own union"


def fake_xformers(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    """What the package does, with its rule on biases."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")

    def attention(q: Any, k: Any, v: Any, attn_bias: Any = None, scale: float | None = None) -> Any:
        seen.append(attn_bias)
        if attn_bias is not None:
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.stride(-2) % 8 == 0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setattr(ops, "memory_efficient_attention", attention, raising=False)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("name", ["vit-b16-224", "bert-base-128", "bert-base-128-padded", "encoder-block"])
@torch.no_grad()
def test_attention_swapped_by_hand_is_the_same_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake_xformers(monkeypatch, seen)
    swapped, by_hand = load("swapped"), load("by_hand")
    spec = load("gpu_models").subject(name, tiny=True)
    model, inputs = spec.make(), spec.make_inputs(2)
    before = by_hand.flat_call(model, inputs)()
    twin = swapped.xformers_attention(model)
    after = by_hand.flat_call(twin, inputs)()
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert len(seen) == (1 if name == "encoder-block" else 2)
    assert [bias is not None for bias in seen] == [name.endswith("padded")] * len(seen)
    assert {t.data_ptr() for t in twin.parameters()} <= {t.data_ptr() for t in model.parameters()}
    seen.clear()
    by_hand.flat_call(model, inputs)()
    assert not seen, "the model itself was changed"


@torch.no_grad()
def test_sparse_by_hand_is_the_masked_model() -> None:
    swapped, patterns, spec = load("swapped"), load("patterns"), load("gpu_models").subject("vit-b16-224", tiny=True)
    model, inputs = spec.make(), spec.make_inputs(1)
    pattern = patterns.seed_pattern(2)
    pattern[1, 4] = False
    sparse, masked = (f(model, pattern)(**inputs)[0] for f in (swapped.sparse_attention, swapped.masked_attention))
    torch.testing.assert_close(sparse, masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, model(**inputs)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="Linear has no attention that could be exchanged"):
        swapped.sparse_attention(nn.Linear(2, 2), pattern)


# --- floors


def test_operations_and_bytes_of_an_encoder_block() -> None:
    floors = load("floors")
    spec = load("gpu_models").subject("encoder-block", tiny=True)
    model, length, width, inside = spec.make(), 9, 64, 128
    work = floors.work_of(model, spec.make_inputs(3), "fp16")
    assert work.operations == 3 * (length * 2 * (4 * width**2 + 2 * width * inside) + 4 * length**2 * width)
    assert work.bytes == 2 * (sum(p.numel() for p in model.parameters()) + 3 * length * width)
    assert torch.backends.mha.get_fastpath_enabled()


def test_padding_is_no_work() -> None:
    floors, models = load("floors"), load("gpu_models")
    spec = models.subject("bert-base-128-padded", tiny=True)
    model, inputs = spec.make(), spec.make_inputs(4)
    lengths = inputs["attention_mask"].sum(1).tolist()
    full, text = floors.work_of(model, inputs, "fp16"), floors.work_of(model, inputs, "fp16", lengths)
    assert sum(lengths) / 64 * 0.6 < text.operations / full.operations < sum(lengths) / 64 * 1.2
    assert text.bytes < full.bytes


def test_floor_is_the_larger_of_two_times() -> None:
    floors = load("floors")
    ceilings = floors.Ceilings({"fp16": 700.0}, 4.0)
    compute = floors.floor_of(floors.Work(1.4e12, 1e9), ceilings, "fp16")
    assert (compute.ms, compute.bound) == (pytest.approx(2.0), "operations")
    memory = floors.floor_of(floors.Work(1e9, 2e9), ceilings, "fp16")
    assert (memory.ms, memory.bound) == (pytest.approx(0.5), "bytes")


# --- tables, page, plot


def row(candidate: str, batch: int, ms: float | None, **more: Any) -> dict[str, Any]:
    timing = {} if ms is None else {"median_ms": ms, "low_ms": ms * 0.99, "high_ms": ms * 1.01, "error": 1e-3}
    return {"candidate": candidate, "batch": batch, "precision": "fp16", "failure": None, **timing, **more}


def recorded(name: str = "fx2ait_encoder", **changes: Any) -> dict[str, Any]:
    labels = {"eager": "PyTorch", "graph": "CUDA graph", "sparse": "sparse", "accelkit": "accelkit"}
    return {
        "name": name, "gpu_title": "A title", "description": "a model", "machine": "NVIDIA H200, 140 GiB",
        "date": "2026-01-31", "versions": {"torch": "2.11.0"}, "target": "fastertransformer", "tiny": False,
        "labels": labels, "sparse": ["sparse"], "ceilings": {"tflops": {"fp16": 736.2}, "copy_tb_s": 4.25, "size": 8192},
        "rows": [
            row("eager", 1, 0.4, floor_ms=0.02), row("graph", 1, 0.06, floor_ms=0.02, memory_bytes=3 * 2**20),
            row("sparse", 1, 0.01), row("accelkit", 1, 0.04, floor_ms=0.02, share_of_floor=0.5, error=1.5e-3),
            row("eager", 8, 0.5, floor_ms=0.03), row("graph", 8, None, failure="RuntimeError: no memory"),
            row("accelkit", 8, 0.1, floor_ms=0.03, share_of_floor=0.3),
        ],
        **changes,
    }  # fmt: skip


def test_tables_of_a_results_file() -> None:
    gpu_tables = load("gpu_tables")
    published = json.loads((ROOT / "benchmarks" / "published.json").read_text())
    made = {t.title: t for t in gpu_tables.tables(recorded(), published)}
    summary, goals, times, then, missing = made.values()
    assert summary.rows[0][1:] == ["0.0200", "0.400", "0.0600", "CUDA graph", "0.0400", "10.00x", "1.50x", "50 %"]
    assert summary.rows[1][3:5] == ["0.500", "PyTorch"], "sparse is another model and no peer"
    assert goals.rows[0] == ["batch 1", "at most 0.04 ms", "0.0400 ms", "yes"]
    assert goals.rows[1] == ["batch 1, over the best peer", "at least 1.35 x", "1.50 x", "yes"]
    assert goals.rows[2][-1] == "no"
    assert goals.rows[4] == ["batch 64", "at most 0.34 ms", None, "no"], "a goal that was not measured is not met"
    assert times.rows[1] == ["CUDA graph", "0.0600 (0.0594 to 0.0606)", None, "1.0e-03", "1.00", "3"]
    assert times.rows[3][3:5] == ["1.5e-03", "1.50"]
    assert times.rows[-1][:3] == ["the floor", "0.0200", "0.0300"]
    assert list(then.rows[1][:5]) == ["AITemplate (FX2AIT)", "then", None, "0.181", "0.222"]
    assert list(then.rows[-1][:5]) == ["accelkit", "now", "fp16", "0.0400", "0.100"]
    assert missing.rows == [["CUDA graph", "fp16", "8", "RuntimeError: no memory"]]
    elsewhere = gpu_tables.tables(recorded(machine="NVIDIA A100, 40 GiB"), published)
    assert "Goals, fp16" not in {t.title for t in elsewhere}, "the goals are for one H200"


def test_every_published_figure_belongs_to_an_experiment_and_names_its_source() -> None:
    scripts = ("fastertransformer_vit", "vision_language_vit", "xformers_vit", "fx2ait_encoder", "bert_gpu")
    experiments = {e.name: e for script in scripts for e in load(script).EXPERIMENTS}
    published = json.loads((ROOT / "benchmarks" / "published.json").read_text())
    assert set(published) <= set(experiments)
    for name, entry in published.items():
        assert entry["source"]
        for line in entry["rows"]:
            assert {int(b) for b in line.get("ms", {})} <= set(experiments[name].batches), name
    assert set(load("gpu_page").ORDER) == set(experiments)
    assert set(load("gpu_tables").GOALS) <= set(experiments)


def test_page_has_a_section_only_where_there_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, render = load("gpu_page"), load("generate_tables").markdown_table
    assert page.headline(tmp_path, render) == ""
    assert page.document(tmp_path, render) == "Nothing is recorded yet."
    path = tmp_path / "h200" / "fx2ait_encoder.json"
    path.parent.mkdir()
    path.write_text(json.dumps(recorded()))
    text = page.document(tmp_path, render)
    assert text.startswith("## A title\n\na model.\n\nNVIDIA H200, 140 GiB; accelkit's target `fastertransformer`;")
    assert "fp16 736 TFLOP/s" in text
    assert "from `benchmarks/results/h200/fx2ait_encoder.json`" in text
    assert "![" not in text
    assert load("gpu_plots").main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "(../benchmarks/results/h200/fx2ait_encoder.png)" in page.document(tmp_path, render)
    assert "| 1 | 0.0200 | 0.400 | 0.0600 | CUDA graph |" in page.headline(tmp_path, render)
    path.write_text(json.dumps(recorded(tiny=True)))
    with pytest.raises(SystemExit, match="measures nothing"):
        page.document(tmp_path, render)
    path.write_text(json.dumps(recorded(date=None)))
    with pytest.raises(SystemExit, match="lacks date"):
        page.headline(tmp_path, render)


def test_document_is_that_of_the_results_files() -> None:
    tables = load("generate_tables")
    text = tables.GPU_DOCUMENT.read_text()
    assert tables.render(text, tables.GPU_TABLES, "benchmarks-gpu.md") == text, "out of date: run `make tables`"


def test_plot_is_of_times_as_fast_as_plain_pytorch() -> None:
    lines = load("gpu_plots").lines(recorded())
    assert lines["accelkit"] == [(1, pytest.approx(10.0)), (8, pytest.approx(5.0))]
    assert lines["CUDA graph"] == [(1, pytest.approx(0.4 / 0.06))]
    assert lines["the floor"] == [(1, pytest.approx(20.0)), (8, pytest.approx(0.5 / 0.03))]
