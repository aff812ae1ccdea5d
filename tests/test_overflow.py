"""float16's overflow is seen in a float32 run of the example and calibration inputs, and what overflows stays in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, optimize
from torch import fx, nn
from torch.utils.data import DataLoader

import accelkit
from accelkit import Dim, InputError
from accelkit.fingerprint import graph_fingerprint
from accelkit.overflow import measure
from accelkit.pass_api import GraphPass, PassResult, Range
from accelkit.report import Report
from accelkit.testing import float64_reference, relative_error, trace
from accelkit_passes.set_precision import SetPrecision

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")  # tiny models gain nothing
F = nn.functional


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Pre-norm blocks whose residual stream has a channel of `peak`, as large language models' have."""

    def __init__(self, peak: float = 2e5) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(16)
        self.set_peak(peak)

    @torch.no_grad()
    def set_peak(self, peak: float) -> None:
        self.first.bias[3] = peak

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.first(x))))


class Scores(nn.Module):
    """Softmax of a product: `gain` times beyond what float16 holds."""

    def __init__(self, gain: float = 200.0, fused: bool = False) -> None:
        super().__init__()
        self.gain, self.fused = gain, fused
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.query(x) * self.gain, self.key(x) * self.gain
        if self.fused:
            return F.scaled_dot_product_attention(query, key, x)
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ x


def half(model: nn.Module, **options: Any) -> Callable[..., accelkit.CompiledModel]:
    return lambda example: optimize(model.eval(), example, precision="fp16", passes=None, **options)


def stays(report: Report) -> dict[str, str]:
    """What set_precision left in float32, and why."""
    (record,) = (r for r in report.variants[0].ledger if r.name.startswith("set_precision"))
    return {refusal.node: refusal.reason for refusal in record.refusals}


def operators(fast: accelkit.CompiledModel, name: str) -> list[torch.dtype]:
    """The result dtypes of an operator in the graph after the passes."""
    assert fast._built is not None
    graph = fast._built.variants[0].lowered.graph
    assert graph is not None
    return [n.meta["val"].dtype for n in graph.graph.nodes if name in str(n.target)]


def test_a_large_channel_of_the_residual_stream() -> None:
    model, x = Residual(), torch.randn(3, 5, 16)
    truth = float64_reference(model, x)[0]
    fast = half(model)(x)
    result = fast(x)
    assert result.dtype == torch.float32
    assert relative_error(result, truth) < 4 * torch.finfo(torch.float16).eps
    kept = stays(fast.report())
    assert list(kept) == ["linear", "layer_norm", "add", "layer_norm_1", "add_1", "layer_norm_2"]  # no other linear
    assert kept["linear"] == (
        "its largest value on the inputs tried is 2e+05, beyond float16's 65504: stays in float32"
    )  # fmt: skip
    assert kept["layer_norm"] == (
        "it reads linear, whose largest value on the inputs tried is 2e+05, beyond float16's 65504: stays in float32"
    )
    assert operators(fast, "linear.default") == [torch.float32] + [torch.float16] * 3
    assert "ranges" in fast.report().variants[0].seconds
    assert "add_1: its largest value" in str(fast.report())
    with torch.no_grad():
        assert not model.half()(x.half()).isfinite().any()  # plain PyTorch: NaN


def test_in_range_nothing_stays() -> None:
    fast = half(Residual(peak=2e4))(torch.randn(3, 5, 16))
    assert stays(fast.report()) == {}
    assert set(operators(fast, "linear")) == {torch.float16}


def test_headroom_for_inputs_that_go_a_little_higher() -> None:
    reasons = stays(half(Residual(peak=5e4))(torch.randn(3, 5, 16)).report())
    assert "is 5e+04, within a factor of 2 of float16's 65504" in reasons["linear"]


@pytest.mark.parametrize("fused", [False, True], ids=["softmax", "attention operator"])
def test_scores_beyond_the_range(fused: bool) -> None:
    model, x = Scores(2000.0 if fused else 500.0, fused), torch.randn(2, 6, 16)
    truth = float64_reference(model, x)[0]
    fast = half(model, tolerance=0.02)(x)
    assert relative_error(fast(x), truth) < 0.02
    kept = stays(fast.report())
    if fused:
        assert "its scores may reach" in kept["scaled_dot_product_attention"]
        return
    assert "its largest value" in kept["matmul"]
    assert "it reads matmul, whose largest value" in kept["softmax"]
    assert "matmul_1" not in kept
    with torch.no_grad():
        assert not model.half()(x.half()).isfinite().all()


def test_bfloat16_is_not_measured() -> None:
    report = optimize(Residual().eval(), torch.randn(3, 5, 16), precision="bf16", passes=None).report()
    assert "ranges" not in report.variants[0].seconds
    assert stays(report) == {}


def test_dynamic_sizes_and_buckets() -> None:
    model, shapes = Residual(), {"x": {0: Dim("batch", min=1, max=8)}}
    for buckets in (None, {"batch": (1, 4)}):
        loader = DataLoader(torch.randn(7, 5, 16), batch_size=3)
        fast = half(model, dynamic_shapes=shapes, buckets=buckets, calibration=loader)(torch.randn(3, 5, 16))
        assert "linear" in stays(fast.report())
        for size in (1, 4):
            x = torch.randn(size, 5, 16)
            assert relative_error(fast(x), float64_reference(model, x)[0]) < 4e-3
        for variant in fast.report().variants:
            assert "float16's range was checked on the example and 3 calibration batches" in variant.notes


def test_captured_in_pieces() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y * 2 if y.sum() > 1e9 else y

    model, x = Branch().eval(), torch.randn(3, 5, 16)
    torch._dynamo.reset()
    fast = half(model, calibration=[x])(x)
    assert fast(x).isfinite().all()
    report = fast.report()
    assert any("beyond float16's 65504" in reason for reason in stays(report).values())
    assert any("calibration is not used" in note for note in report.variants[0].notes)


# --- calibration


def test_calibration_finds_what_the_example_does_not() -> None:
    model, example = Scores(1.0), torch.randn(2, 6, 16)
    large = example * 800
    assert stays(half(model)(example).report()) == {}
    fast = half(model, calibration=[example, large])(example)
    assert "matmul" in stays(fast.report())
    assert fast(large).isfinite().all()
    assert "float16's range was checked on the example and 2 calibration batches" in fast.report().variants[0].notes


@pytest.mark.parametrize("form", ["tuple", "dict", "DataLoader", "generator"])
def test_forms_of_batches(form: str) -> None:
    model, x = Scores(1.0), torch.randn(4, 6, 16)
    data = torch.cat([x, x, x[:2] * 1000])  # the last batch is smaller than the captured one
    batches: dict[str, Any] = {
        "tuple": [(x * 1000,)],
        "dict": [{"x": x * 1000}],
        "DataLoader": DataLoader(data.flip(0), batch_size=4),
        "generator": (x * scale for scale in (1, 1000)),
    }
    fast = half(model, calibration=batches[form])(x)
    assert "matmul" in stays(fast.report())
    said = {"DataLoader": "2 calibration batches; 1 left out, of shapes that are not covered", "generator": "2 cal"}
    (note,) = (n for n in fast.report().variants[0].notes if n.startswith("float16's range"))
    assert said.get(form, "and 1 calibration batch") in note


def test_batches_are_taken_one_at_a_time() -> None:
    alive: list[Any] = []

    def batches() -> Iterator[torch.Tensor]:
        import weakref

        for _ in range(4):
            assert sum(ref() is not None for ref in alive) <= 1  # the one before, at most
            batch = torch.randn(2, 6, 16)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    half(Scores(1.0), calibration=batches())(torch.randn(2, 6, 16))
    assert len(alive) == 4


X = torch.randn(2, 6, 16)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"calibration": 3}, "calibration is an iterable of inputs .* not int"),
    "one tensor": ({"calibration": X}, r"not one tensor: calibration=\[x\]"),
    "one dict": ({"calibration": {"x": X}}, r"not a dict: calibration=\[inputs\]"),
    "empty": ({"calibration": []}, "calibration is empty: it gave no batch"),
    "no batch": ({"calibration": [3]}, "calibration batch 0 must be a tensor, .* not int"),
    "dtype": ({"calibration": [X, X.double()]}, "calibration batch 1: x is torch.float64, captured as torch.float32"),
    "labels": ({"calibration": [(X, X)]}, r"batch 0 does not fit the model: .*calibration=\[x for x, _ in loader\]"),
    "name": ({"calibration": [{"y": X}]}, "batch 0 does not fit the model: .*missing a required argument"),
    "no shape": ({"calibration": [X[:1], X[:, :2]]}, r"none of the 2 batches .*batch 0: x has shape \[1, 6, 16\]"),
    "precision": ({"calibration": [X], "precision": "bf16"}, "for precisions that need it; bf16 does not"),
    "iterator": (
        {"calibration": iter([X]), "dynamic_shapes": {"x": {0: Dim("n", max=4)}}, "buckets": {"n": (1, 2)}},
        "calibration is an iterator, and buckets go through it once each",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calibration(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        optimize(Scores().eval(), X, **{"precision": "fp16", "passes": None, **options})


def test_a_batch_on_which_the_model_fails() -> None:
    ids = torch.randint(0, 5, (2, 3))
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2)).eval()
    with pytest.raises(InputError, match="the model fails on the batch used as number 2: IndexError"):
        optimize(model, ids, precision="fp16", passes=None, calibration=[ids, ids + 50])


def test_calibration_without_a_pass_that_asks_is_told() -> None:
    report = optimize(nn.Linear(16, 2).eval(), X, precision="fp16", calibration=[X]).report()
    assert "calibration is not used: no pass asked for ranges" in report.variants[0].notes


# --- what follows


def test_keys_of_engines_follow() -> None:
    prints, keys = [], []
    for calibration in (None, [X * 1000]):
        torch.manual_seed(0)
        fast = half(Scores(1.0).eval(), calibration=calibration, target=Planted())(X)
        assert fast._built is not None
        lowered = fast._built.variants[0].lowered
        keys.append(tuple(piece.key for piece in lowered.pieces))
        prints.append(graph_fingerprint(lowered.graph, embeds_weights=False))
    assert prints[0] != prints[1]
    assert keys[0] != keys[1]


def test_refit_looks_anew() -> None:
    model, x = Residual(peak=1.0).eval(), torch.randn(3, 5, 16)
    fast = half(model)(x)
    assert stays(fast.report()) == {}
    model.set_peak(2e5)
    fast.refit(model.state_dict())
    assert "linear" in stays(fast.report())
    assert relative_error(fast(x), float64_reference(model, x)[0]) < 4e-3


def test_refit_with_a_used_up_iterator_says_so() -> None:
    model = Scores(1.0).eval()
    fast = half(model, calibration=iter([X]))(X)
    with pytest.raises(InputError, match="An iterator can be gone through only once: give a list or a DataLoader"):
        fast.refit(model.state_dict())


@pytest.mark.parametrize("target", ["eager", "fastertransformer"])
def test_a_saved_model_keeps_what_calibration_found(target: str, tmp_path: Path) -> None:
    model = Scores(1.0).eval()
    fast = half(model, target=target, calibration=[X * 1000])(X)
    kept = stays(fast.report())
    fast.save(tmp_path / "model.accel")
    loaded = accelkit.load(tmp_path / "model.accel", cache=False, progress=False)
    assert stays(loaded.report()) == kept
    assert kept
    assert loaded(X * 1000).isfinite().all()
    loaded.refit(model.state_dict())  # on the sample: the calibration inputs are not in the file
    assert stays(loaded.report()) == {}


# --- measure


class Wants(GraphPass):
    def __init__(self) -> None:
        self.found: dict[str, Range] = {}

    def wants_ranges(self, graph: fx.GraphModule) -> dict[fx.Node, float]:
        return {n: float("inf") for n in graph.graph.nodes if n.op == "call_function"}

    def run(self, graph: fx.GraphModule) -> PassResult:
        self.found = {n.name: n.meta["range"] for n in graph.graph.nodes if "range" in n.meta}
        return PassResult()


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.count.add_(1)
        y = x.view(2, 4).transpose(0, 1) * 3
        first, second = y.split(2)
        return first, second.log(), x[:0] * 2, self.count * 1


def test_ranges_over_several_batches() -> None:
    model, one = Parts(), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    graph = trace(model, one)
    wants = Wants()
    wanted = wants.wants_ranges(graph)
    measure(graph, wanted, [(one,), (-one * 10,), (one * 2,)])
    wants.run(graph)
    assert wants.found["mul"] == Range(240.0)
    assert wants.found["log"] == Range(pytest.approx(math.log(48)), "NaN")
    assert wants.found["mul_1"] == Range(0.0)  # empty
    assert float(model.count) == 0  # as it was


def test_masks_do_not_count_and_infinities_are_no_numbers() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 1, -torch.inf) + 1

    graph = trace(Masked(), x := torch.tensor([0.5, 7.0, -3.0]))
    nodes = {n.name: n for n in graph.graph.nodes}
    measure(graph, {nodes["masked_fill"]: float("inf"), nodes["add"]: 2.0}, [(x,)])
    assert nodes["masked_fill"].meta["range"] == Range(3.0, "infinity")
    assert nodes["add"].meta["range"] == Range(1.5, "infinity")


def test_nan_of_the_float_run_is_told_and_named() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ x.transpose(0, 1)
            return torch.where(y > 0, y.log(), 0.0).sum(-1)

    x = torch.tensor([[1.0, 2], [-1, -2]])
    report = optimize(Log(), x, precision="fp16", passes=(SetPrecision("fp16"),)).report()
    (note,) = (n for n in report.variants[0].notes if "float32 itself" in n)
    assert note.startswith("float32 itself gives NaN in log (aten.log.default -> f32[2, 2])")
    assert stays(report) == {}


def test_an_exception_of_the_models_own_is_the_one_to_see() -> None:
    with pytest.raises(IndexError, match="out of range"):
        optimize(nn.Embedding(3, 2).eval(), torch.tensor([7]), precision="fp16", passes=None)
