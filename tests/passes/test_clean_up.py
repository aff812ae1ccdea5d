"""The default clean-up over whole models: the same bits, fewer nodes, and quick."""

from __future__ import annotations

import time

import pytest
import torch
from pass_checks import BATCH, assert_same_bits
from torch import nn

import accelkit_passes
from accelkit.errors import InputError
from accelkit.pass_api import GraphPass
from accelkit.pass_runner import count_operators, run_passes
from accelkit.testing import run, trace

CLEAN_UP = (
    "canonicalise",
    "remove_dropout",
    "remove_no_ops",
    "fold_constants",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
)


def clean_up() -> list[GraphPass]:
    passes = accelkit_passes.default_passes()
    return [p for p in passes if isinstance(p, GraphPass) and p.name in CLEAN_UP]


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.relu(self.norm(self.conv(x))))
        y += x
        return self.relu(y)


def convolutional() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8), *head)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


def bert(layers: int = 2, **options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, **sizes, **options))


def tokens(batch: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, 8, dtype=torch.int64)
    mask[-1, 5:] = 0
    return {"input_ids": torch.randint(0, 100, (batch, 8)), "attention_mask": mask}


MODELS = {  # model, inputs for a batch, operators that at least go
    "bert, sdpa": (bert, tokens, 29),
    "bert, eager": (lambda: bert(attn_implementation="eager"), tokens, 30),
    "nn.TransformerEncoder": (encoder, lambda batch: {"src": torch.randn(batch, 4, 16)}, 6),
    "convolutions": (convolutional, lambda batch: {"input": torch.randn(batch, 3, 12, 12)}, 0),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str, dynamic: bool) -> None:
    make, inputs, fewer = MODELS[name]
    model, example = make().eval(), inputs(2)
    shapes = {key: {0: BATCH} for key in example} if dynamic else None
    graph = trace(model, **example, dynamic_shapes=shapes)
    calls = [example, inputs(1), inputs(5)] if dynamic else [example]
    expected = [run(graph, *call.values()) for call in calls]
    operators = count_operators(graph)
    run_passes(graph, clean_up())
    assert count_operators(graph) <= operators - fewer
    for call, results in zip(calls, expected, strict=True):
        for old, new in zip(results, run(graph, *call.values()), strict=True):
            assert_same_bits(old, new)
    assert [r.rewrites for r in run_passes(graph, clean_up())] == [()] * len(CLEAN_UP)


def test_weights_stay_shared() -> None:
    model = bert().eval()
    graph = trace(model, **tokens(2))
    run_passes(graph, clean_up())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {
        b.untyped_storage().data_ptr() for b in model.buffers()
    }
    copied = [b for b in graph.state_dict().values() if b.untyped_storage().data_ptr() not in own]
    # embedded position and token-type ids; the weights are 200 kB
    assert sum(b.numel() * b.element_size() for b in copied) < 4000


def test_time_does_not_explode() -> None:
    """As many operators as BERT-base, which take 0.25 s on 2 CPU cores; with room for a busy machine."""
    graph = trace(bert(layers=12).eval(), **tokens(2))
    assert count_operators(graph) > 300
    started = time.perf_counter()
    run_passes(graph, clean_up())
    assert time.perf_counter() - started < 2.5


def test_default_order() -> None:
    in_fp32 = [p.name for p in accelkit_passes.default_passes("fp32")]
    assert in_fp32 == [name for name in accelkit_passes.DEFAULT if name not in ("set_precision", "calibrate_int8")]
    assert set(CLEAN_UP) <= set(in_fp32)
    in_bf16 = [p.name for p in accelkit_passes.default_passes("bf16")]
    assert in_bf16 == [name for name in accelkit_passes.DEFAULT if name != "calibrate_int8"]


def test_unknown_precision() -> None:
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        accelkit_passes.default_passes("bf61")
