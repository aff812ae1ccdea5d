"""New nodes with their fake tensors at once, sizes included: what the attention passes build graphs with."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.graph import inferred, is_pure, is_size, memory_family, val
from accelkit.pass_api import Refused
from accelkit_passes._attention_layout import Layout, layout_of, source_of
from accelkit_passes._attention_views import Step, steps
from accelkit_passes._proofs import contiguous, proved, written_memory

aten = torch.ops.aten


class Editor:
    """Adds nodes to one graph, and takes away those that nothing reads any more.

    Attributes:
        live: the nodes that an output or an effect depends on.
        written: the nodes whose memory the graph may write to.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.live = _live(graph)
        self.created: list[fx.Node] = []
        written = frozenset[fx.Node]().union(*written_memory(graph).values())
        nodes = graph.graph.nodes if written else ()
        self.written = frozenset(node for node in nodes if not written.isdisjoint(memory_family(node)))
        self.mode = next(
            v.fake_mode for n in graph.graph.nodes if isinstance(v := val(n), torch._subclasses.FakeTensor)
        )

    # --- questions

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The users that an output depends on."""
        return [user for user in node.users if user in self.live]

    def constant(self, node: Any) -> torch.Tensor | None:
        """The weight, buffer or constant that a node is, unless the graph writes to it."""
        if not isinstance(node, fx.Node) or node.op != "get_attr" or node in self.written:
            return None
        value = graphs.attribute(self.graph, str(node.target))
        return value.detach() if isinstance(value, torch.Tensor) else None

    def number(self, value: Any) -> float | None:
        """A Python number, or the constant tensor of one element that holds it."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        constant = self.constant(value)
        return float(constant) if constant is not None and constant.dim() == 0 else None

    # --- new nodes

    def call(
        self, target: Any, args: tuple[Any, ...], before: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A new node in front of `before`, its fake tensor inferred."""
        with self.graph.graph.inserting_before(before):
            node = self.graph.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace")}
        values = fx.node.map_arg((node.args, node.kwargs), val)
        node.meta["val"] = inferred(target, *values, self.mode)
        self.live.add(node)
        self.created.append(node)
        return node

    def buffer(self, hint: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
        """A new constant in front of `before`."""
        with self.graph.graph.inserting_before(before):
            node = self.graph.graph.get_attr(graphs.set_attribute(self.graph, hint, value))
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        self.live.add(node)
        self.created.append(node)
        return node

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take away what was added inside, where it ends in a refusal."""
        before = len(self.created)
        try:
            yield
        except Refused:
            while len(self.created) > before:
                node = self.created.pop()
                self.live.discard(node)
                self.graph.graph.erase_node(node)
            raise

    def emit(self, layout: Layout, before: fx.Node) -> fx.Node:
        """The nodes that make `layout`'s view of its root.

        Raises:
            Refused: a size is known only at run time and no node computes it.
        """
        node = layout.root
        for step in steps(layout):
            node = self.call(step.target, (node, *self._arguments(step, node, before)), before)
        return node

    def _arguments(self, step: Step, node: fx.Node, before: fx.Node) -> tuple[Any, ...]:
        if step.target is aten.select.int:
            return tuple(step.argument)
        if step.target is aten.permute.default:
            return (list(step.argument),)
        sizes = list(step.argument)
        symbolic = [i for i, size in enumerate(sizes) if type(size) is not int]
        if step.target is aten.reshape.default and len(symbolic) == 1 and all(sizes):
            sizes[symbolic[0]] = -1
            return (sizes,)
        return ([self.size(size, node, before) for size in sizes],)

    def size(self, size: Any, node: fx.Node, before: fx.Node) -> Any:
        """A number, or a node that computes this symbolic size."""
        if type(size) is int:
            return size
        for other in self.graph.graph.nodes:
            if other is before:
                break
            if is_size(other) and isinstance(val(other), torch.SymInt) and proved(val(other) == size):
                return other
        for tensor in (node, *self.graph.graph.find_nodes(op="placeholder")):
            for dim, other_size in enumerate(val(tensor).shape if isinstance(val(tensor), torch.Tensor) else ()):
                if proved(other_size == size):
                    return self.call(aten.sym_size.int, (tensor, dim), before)
                if type(other_size) is not int and proved(size % other_size == 0) and type(size // other_size) is int:
                    factor = self.call(aten.sym_size.int, (tensor, dim), before)
                    return self.call(operator.mul, (factor, size // other_size), before)
        raise Refused(f"the size {size} is known only at run time, and nothing in the graph computes it")

    # --- views

    def layout(self, node: fx.Node, root: fx.Node | None = None) -> Layout:
        """`layout_of`, not looking through copies of memory that the graph writes to."""
        return layout_of(node, root, self.written)

    def stand_in(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` be read where `old` was; an output keeps its layout, on which the model's caller may rely."""
        outputs = [user for user in old.users if user.op == "output"]
        if outputs and contiguous(val(old)) and not contiguous(val(new)):
            copy = self.call(aten.contiguous.default, (new,), old)
            old.replace_all_uses_with(copy, delete_user_cb=lambda user: user in outputs)
        old.replace_all_uses_with(new)

    def shorten_views(self, root: fx.Node) -> None:
        """Write what is made of `root` by views alone as the fewest views."""
        views = _views_of(root)
        returned = [view for view in (root, *views) if any(user.op == "output" for user in view.users)]
        for view, length in views.items():
            others = [user for user in self.readers(view) if not _reads_as_view(user, view)]
            if not others or (view in returned and len(returned) > 1):  # two outputs might come to share memory
                continue
            layout = self.layout(view, root)
            if layout.root is root and len(steps(layout)) < length:
                with (
                    contextlib.suppress(Refused),
                    self.all_or_nothing(),
                ):  # a size that nothing computes: it stays as it is
                    self.stand_in(view, self.emit(layout, view))

    def erase_dead(self) -> None:
        """Take away every pure node that nothing reads: the rewrites' left-overs, and what read those alone."""
        for node in reversed(list(self.graph.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and is_pure(node):
                self.graph.graph.erase_node(node)


def _live(graph: fx.GraphModule) -> set[fx.Node]:
    stack = [
        n for n in graph.graph.nodes if n.op in ("output", "placeholder") or (n.op != "get_attr" and not is_pure(n))
    ]
    live = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in live:
                live.add(source)
                stack.append(source)
    return live


def _views_of(root: fx.Node) -> dict[fx.Node, int]:
    """What is made of root by views alone, with the number of views on the way."""
    found: dict[fx.Node, int] = {}
    stack = [(root, 0)]
    while stack:
        node, length = stack.pop()
        for user in node.users:
            views = [v for v in (user, *user.users) if source_of(v) is node]  # pieces are views of what was split
            for view in views:
                if view not in found:
                    found[view] = length + 1
                    stack.append((view, length + 1))
    return found


def _reads_as_view(user: fx.Node, node: fx.Node) -> bool:
    return source_of(user) is node or any(source_of(piece) is node for piece in user.users)
