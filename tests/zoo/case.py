"""What one model of the zoo is: a lazily built module, a maker of its inputs, and where each has its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from .inputs import MakeInputs

Attention = tuple[str, ...]
ONE: Attention = ("",)
BOTH: Attention = ("eager", "sdpa")
SEED = 20


@dataclass(frozen=True)
class Case:
    """One small model, built only when asked for.

    `kind` is text, vision, audio, multimodal, decoder, encoder-decoder or convolution; `attention` is the attention
    implementation that was asked of transformers ("eager" or "sdpa"), or "" where the model has only one.
    `fixed_batch` is empty, or says why the captured program cannot serve another batch size; `dynamic` is then empty.
    """

    kind: str
    make_model: Callable[[], nn.Module]
    make_inputs: MakeInputs
    dynamic: dict[str, int]
    attention: str = ""
    fixed_batch: str = ""

    def build(self) -> tuple[nn.Module, MakeInputs]:
        """The model (float32, CPU, eval mode, the same weights every time) and the maker of its inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.make_model().eval()
            spread_weights(model)
            settle_batch_norm(model, self.make_inputs(32))
        return model, self.make_inputs


def spread_weights(model: nn.Module) -> None:
    """Give every weight a size at which all parts of the model matter to its output.

    Freshly made models hide errors: weights of 0.02 make attention uniform, biases are zero, layer scales are 1e-6 and
    every norm is the identity. Here matrices keep the variance of what flows through (deviation fan_in ** -0.5),
    norms scale by 1 +- 0.1, biases and layer scales are not zero.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.ndim == 0 or "parametrizations" in name:
                continue  # temperatures and the two halves of weight_norm are sound as they are
            if id(parameter) in embeddings:
                parameter.normal_(0.0, 0.5)
            elif parameter.ndim > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.normal_(0.0, fan_in**-0.5)
            else:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(centre, 0.1)


def settle_batch_norm(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Give batch norm about the statistics of real activations, as training does.

    With 0 and 1, or random ones, the signal dies within a few layers and all inputs give one output. They are put off
    by a tenth or so, so that a fusion with slightly wrong statistics cannot hide behind mean 0 and variance 1.
    Biases around 0.5 leave most of a ReLU's inputs positive: around 0 every layer would bring different inputs closer
    and batch norm would pull them apart again, and float32's rounding with them, to a relative error above 1e-5.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.train().momentum = 1.0
            if norm.bias is not None:
                norm.bias.add_(0.5)
        model(**inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.eval().momentum = momentum
            norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt())
            # a channel that was nearly dead on these few inputs would blow up on others
            norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))


def transformers_model(class_name: str, attention: str = "", **options: Any) -> Callable[[], nn.Module]:
    """A maker of transformers' `class_name` with random weights; `options` are its config's arguments.

    One that is None is left out, for the few configs that refuse what the others share.
    """

    def make() -> nn.Module:
        import transformers

        if not hasattr(transformers, class_name):
            pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
        model_class = getattr(transformers, class_name)
        chosen = {name: value for name, value in options.items() if value is not None}
        if attention:
            chosen["attn_implementation"] = attention
        model: nn.Module = model_class(model_class.config_class(**chosen))
        return model

    return make


def batch_first(make_inputs: MakeInputs) -> dict[str, int]:
    """The usual batch description: dimension 0 of every input."""
    return dict.fromkeys(make_inputs(2), 0)


def transformers_cases(
    kind: str, name: str, class_name: str, make_inputs: MakeInputs, attention: Attention = ONE, **options: Any
) -> dict[str, Case]:
    """One Case per attention implementation, called `name`, or `name-eager` and `name-sdpa`."""
    return {
        f"{name}-{a}" if a else name: Case(
            kind, transformers_model(class_name, a, **options), make_inputs, batch_first(make_inputs), a
        )
        for a in attention
    }
