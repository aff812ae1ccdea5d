"""What a pass is: the public interface for pass authors.

    graph -> graph that computes the same, plus what was rewritten and what was refused and why

A pass is an immutable value: a frozen dataclass whose fields are its options. Most passes are a `RewritePass`: a pattern, a
replacement and a check. A `GraphPass` is the general case, an `OnnxPass` works on the ONNX model that the ONNX-based targets
make. The runner (`accelkit.pass_runner`) checks every pass's work; an author need not.

Example:
    >>> import torch
    >>> from dataclasses import dataclass
    >>> aten = torch.ops.aten
    >>> @dataclass(frozen=True)
    ... class DoubleToAdd(RewritePass):
    ...     '''x * 2 -> x + x'''
    ...     def pattern(self, x):
    ...         return aten.mul.Tensor(x, 2)
    ...     def replacement(self, x):
    ...         return aten.add.Tensor(x, x)
    ...     def check(self, match):
    ...         match.require(match.value("x").is_floating_point(), "x is not floating point")
    >>> DoubleToAdd().name
    'double_to_add'
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from accelkit import graph as graphs

if TYPE_CHECKING:
    import onnx
    import torch


@dataclass(frozen=True)
class Refusal:
    """A place where a pass could have acted and did not.

    Attributes:
        node: the node's name in the graph.
        reason: why not, in words a user understands.
    """

    node: str
    reason: str


class Refused(Exception):
    """Raised by `Match.require`; caught by the pass machinery, never seen by users."""


@dataclass(frozen=True)
class OpenResult:
    """Where an output holds something else than the model's own, by a pass's design: it is not compared there.

    Attributes:
        output: its number.
        kept: the graph's inputs -> a boolean tensor of the output's leading dimensions, True where it is to be compared.
        reason: why, in words a user understands.
    """

    output: int
    kept: Callable[..., torch.Tensor]
    reason: str


@dataclass(frozen=True)
class Range:
    """How large a node's values became in the float32 run (see `GraphPass.wants_ranges`).

    Attributes:
        largest: the largest magnitude among the finite values that count; 0 where there were none.
        special: "NaN" where there was one, else "infinity" where there was one, else empty.
        inside: a bound on what the operator computes on its way to the result: the scores of an attention operator
            (largest norm of a query times largest norm of a key times the scale, by Cauchy and Schwarz).
    """

    largest: float
    special: str = ""
    inside: float = 0.0


@dataclass
class PassResult:
    """What one run of a pass did; `GraphPass.run` fills it in through `rewrote`, `refused` and `leaves_open`."""

    rewrites: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    open: list[OpenResult] = field(default_factory=list)

    def rewrote(self, what: fx.Node | str) -> None:
        """Count one rewrite; `what` is the node (or words) that the report shows."""
        self.rewrites.append(what.name if isinstance(what, fx.Node) else what)

    def refused(self, where: fx.Node | str, reason: str) -> None:
        """Record one refusal with its reason."""
        self.refusals.append(Refusal(where.name if isinstance(where, fx.Node) else where, reason))

    def leaves_open(self, output: int, kept: Callable[..., torch.Tensor], reason: str) -> None:
        """Declare that an output is the model's own only where `kept` is True (see OpenResult); the report says so."""
        self.open.append(OpenResult(output, kept, reason))

    @property
    def changed(self) -> bool:
        return bool(self.rewrites)


def snake_case(name: str) -> str:
    """`FuseConvBatchNorm` -> `fuse_conv_batch_norm`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class _Pass(ABC):
    """What all passes share: a name that is the class's in snake_case, and options as fields."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def __str__(self) -> str:
        """`fold_constants(limit_bytes=1024)`: the name with the options that differ from their defaults."""
        value: Any = self
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        changed = [f for f in fields if f.default is dataclasses.MISSING or getattr(value, f.name) != f.default]
        options = [f"{f.name}={getattr(value, f.name)!r}" for f in changed]
        return f"{self.name}({', '.join(options)})" if options else self.name


class GraphPass(_Pass):
    """A pass over the fx graph: the general case.

    Attributes:
        calibrates: whether it quantises by what calibration inputs show: `optimize` leaves them for it just before `run`
            (`accelkit.quantization.collect.Source.taken_from(graph)`), and plain PyTorch's run of the graph that it leaves is
            what targets' errors are held to.
    """

    calibrates: ClassVar[bool] = False

    @property
    def changes_meaning(self) -> str | None:
        """What the graph computes afterwards, in words for the report, where by design that is not what it did before; else
        None. Errors are then measured against the graph after the pass, and all other passes as ever against the model."""
        return None

    def wants_ranges(self, graph: fx.GraphModule) -> Mapping[fx.Node, float]:
        """The nodes of which the pass has to know how large their values become, each with the magnitude from which on
        values do not count (`math.inf`: all finite ones do).

        `optimize` then runs the graph on the example and on `calibration=`, just before `run`, and puts a `Range` into
        each one's `node.meta["range"]`. A pass has to do without as well: others (tests, tools) may run it on a graph alone.
        """
        return {}

    @abstractmethod
    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite `graph` in place and say what was done.

        New nodes need no metadata: the runner infers their fake tensors afterwards and compares the outputs' dtypes and shapes.
        """


class OnnxPass(_Pass):
    """A pass over the ONNX model that an ONNX-based target (onnxruntime, tensorrt) makes from the graph.

    Large weights are not in the model: they are initializers with external data that the engine gets from the live
    parameters. A pass must keep such initializers' names, and must not read their values.
    """

    @abstractmethod
    def run(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
        """The rewritten model (the argument may be changed in place) and what was done.

        Raises:
            PassError: the package that the pass is built on is missing.
        """


class Match:
    """One place where a pattern fits.

    Attributes:
        arguments: what the pattern's parameters stand for here, by name: a node, or a plain value where the graph has one.
        nodes: the graph nodes that the pattern's operators fit, in the pattern's order.
        root: the node that the pattern's (first) result fits.
        graph: the graph module, for looking at parameters (`match.tensor(name)`).
    """

    def __init__(
        self, graph: fx.GraphModule, arguments: dict[str, Any], nodes: tuple[fx.Node, ...], results: tuple[fx.Node, ...]
    ) -> None:
        self.graph, self.arguments, self.nodes, self.results = graph, arguments, nodes, results

    @property
    def root(self) -> fx.Node:
        return self.results[0]

    def require(self, condition: bool, reason: str) -> None:
        """Refuse this match with `reason` unless `condition` holds: the only way to refuse."""
        if not condition:
            raise Refused(reason)

    def node(self, name: str) -> fx.Node:
        """The node that the pattern's parameter `name` stands for; refuses where the graph has a plain value there."""
        value = self.arguments[name]
        if not isinstance(value, fx.Node):
            raise Refused(f"{name} is the number {value!r}, not a tensor")
        return value

    def value(self, name: str) -> Any:
        """The fake tensor (dtype, shape, device) of the pattern's parameter `name`, or the plain value."""
        argument = self.arguments[name]
        return graphs.val(argument) if isinstance(argument, fx.Node) else argument

    def tensor(self, name: str) -> Any:
        """The real tensor of a parameter that is a weight or constant; refuses where it is computed at run time."""
        node = self.node(name)
        if node.op != "get_attr":
            raise Refused(f"{name} ({node.name}) is computed at run time, not a weight")
        return graphs.attribute(self.graph, str(node.target))


class RewritePass(GraphPass):
    """before -> after: `pattern` and `replacement` are plain functions of the same parameters.

    The pattern is written with operator overloads (`aten.linear.default(x, w, b)`); missing arguments mean the schema's
    defaults. A parameter fits any node, or any plain value (check with `match.node`). Several results are given as a tuple: the
    first must depend on all the others. The replacement is called with the matched values (fx proxies for nodes, plain
    values as they are) and its operators are recorded into the graph where the pattern's first result stood.

    A match whose inner nodes are used outside of it is refused by the machinery, with the reason.
    """

    @abstractmethod
    def pattern(self, *arguments: Any) -> Any:
        """The graph to look for."""

    @abstractmethod
    def replacement(self, *arguments: Any) -> Any:
        """What to put there: as many results as the pattern has."""

    def check(self, match: Match) -> None:
        """Refuse, by `match.require`, what only looks alike."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        """The patterns to look for, in order; by default the one. Their parameters are all the replacement's."""
        return (self.pattern,)

    def run(self, graph: fx.GraphModule) -> PassResult:
        from accelkit.matcher import rewrite

        return rewrite(self, graph)
