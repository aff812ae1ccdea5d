"""Which tensors are rounded to 8 bits, and how finely: a scheme is a row of this table, nothing else.

| | ft1 | ft2 | qdq | dynamic |
|---|---|---|---|---|
| where it is from | FasterTransformer, int8_mode 1 | FasterTransformer, int8_mode 2 | what CPU engines run | no data needed |
| input, weight | yes | yes | yes | yes, ranges at run time |
| weight scale | per output channel | per tensor | per output channel | per output channel |
| aftergemm (before the bias) | no | yes | no | no |
| matmul_q_input, matmul_k_input, matmul_v_input, matmul_a_input | yes | yes | no | no |
| Q, K, V scales | separate | fused: the largest of the three | - | - |
| softmax_input | no | ViT: yes; BERT: no | no | no |
| residual_input | no | ViT: no; BERT: yes | no | no |
| layernorm_input, local_input | no | no | no | no |
| final_input (the classifier's) | no | no | yes | yes |
| convolutions | no | no | yes | no |
| activations | symmetric | symmetric | asymmetric where the target takes it | asymmetric |

The names are those of FasterTransformer's quantisers (examples/pytorch/vit/ViT-quantization and
examples/pytorch/bert/bert-quantization-sparsity, `quant_utils.py`): a scheme there is the set of quantisers that are on.
A ViT is a model that normalises before its sublayers, a BERT one that normalises after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from accelkit.errors import unknown_name

FAMILIES = ("vit", "bert")
"""`vit`: layers that normalise first (the residual sum is read on). `bert`: layers that normalise last."""

ATTENTION = frozenset({"matmul_q_input", "matmul_k_input", "matmul_v_input", "matmul_a_input"})
QUANTISERS = (
    frozenset(
        {
            "input",
            "weight",
            "aftergemm",
            "softmax_input",
            "residual_input",
            "layernorm_input",
            "local_input",
            "final_input",
        }
    )
    | ATTENTION
)
"""Every tensor that a scheme may quantise. matmul_a is the attention probabilities; final_input stands for the linear
layers behind the last residual sum: pooler, classifier."""


@dataclass(frozen=True)
class Scheme:
    """One row.

    Attributes:
        name: what `Int8(scheme=...)` takes. description: one sentence.
        quantisers: the tensors that are quantised in both families. by_family: those of one family only.
        per_channel: a weight scale for each output channel, instead of one for the tensor.
        fuse_qkv: Q, K and V share one activation scale and one weight scale, the largest of the three.
        symmetric: activation ranges are [-amax, amax]; else asymmetric where the target takes that.
        convolutions: whether convolutions are quantised too.
        dynamic: activation ranges are taken at run time, from each tensor: no calibration.
    """

    name: str
    description: str
    quantisers: frozenset[str]
    by_family: Mapping[str, frozenset[str]] = field(default_factory=dict)
    per_channel: bool = True
    fuse_qkv: bool = False
    symmetric: bool = True
    convolutions: bool = False
    dynamic: bool = False

    def on(self, family: str) -> frozenset[str]:
        """The quantisers that are on in a family."""
        return self.quantisers | self.by_family.get(family, frozenset())

    @property
    def anywhere(self) -> frozenset[str]:
        """The quantisers that are on in any family."""
        return self.quantisers.union(*self.by_family.values())


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "ft1",
            "FasterTransformer's int8_mode 1: INT8 products with INT32 results, weights per channel",
            frozenset({"input", "weight"}) | ATTENTION,
        ),
        Scheme(
            "ft2",
            "FasterTransformer's int8_mode 2: INT8 products with INT8 results, weights per tensor",
            frozenset({"input", "weight", "aftergemm"}) | ATTENTION,
            {"vit": frozenset({"softmax_input"}), "bert": frozenset({"residual_input"})},
            per_channel=False,
            fuse_qkv=True,
        ),
        Scheme(
            "qdq",
            "inputs and weights of linear layers and convolutions, as CPU engines run them",
            frozenset({"input", "weight", "final_input"}),
            symmetric=False,
            convolutions=True,
        ),
        Scheme(
            "dynamic",
            "inputs and weights of linear layers, with ranges taken at run time: no calibration",
            frozenset({"input", "weight", "final_input"}),
            symmetric=False,
            dynamic=True,
        ),
    )
}
"""By name."""


def scheme_named(name: object) -> Scheme:
    """The scheme of that name.

    Raises:
        InputError: there is none; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in SCHEMES:
        raise unknown_name("INT8 scheme", name, list(SCHEMES))
    return SCHEMES[name]
