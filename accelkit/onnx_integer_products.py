"""MatMul(dequantize(x), dequantize(w)) -> MatMulIntegerToFloat(x, w): products of 8-bit integers, for ONNX Runtime's CPU kernels

    1. MatMul or Gemm of a dequantised activation and a dequantised constant, with its bias   ->  MatMulIntegerToFloat
    2. the same where the activation's range is taken at run time                              ->  DynamicQuantizeMatMul
    3. MatMul of two dequantised activations (attention's products)                            ->  MatMulIntegerToFloat
    4. what nothing reads any more goes

ONNX Runtime (1.31) makes these of Q/DQ nodes by itself only where no Add follows the MatMul: with a bias it first makes a Gemm of
both, whose bias would have to be an int32 constant, and then runs it in float32 on weights that it dequantises at each call.
Transposes between a DequantizeLinear and its product are made on the integers. Only uint8 activations: the CPU provider
multiplies int8 ones in its slow reference code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelkit.onnx_weights import all_nodes

if TYPE_CHECKING:
    import onnx

_UINT8 = 2


@dataclass
class Operand:
    """A product's factor: 8-bit integers, their scale and zero point (empty: none), all names of values.

    `dynamic` is the floating-point value whose range is taken at run time.
    """

    values: str
    scale: str
    zero_point: str
    constant: bool
    dynamic: str = ""


@dataclass
class Products:
    """What was done: products that run on integers, and those with dequantised factors that do not."""

    integer: int = 0
    left: list[str] = field(default_factory=list)


def integer_products(model: onnx.ModelProto) -> Products:
    """All of them, in place."""
    return _Rewriter(model).run()


class _Rewriter:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.made_by = {name: node for node in self.graph.node for name in node.output if name}
        self.initializers = {i.name: i for i in self.graph.initializer}
        self.new: dict[int, list[onnx.NodeProto]] = {}  # before which node
        self.transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self.erased: set[int] = set()

    def run(self) -> Products:
        done = Products()
        if not any(node.op_type == "DequantizeLinear" for node in self.graph.node):
            return done
        readers = _readers(self.model)
        for node in list(self.graph.node):
            if node.op_type not in ("MatMul", "Gemm") or node.domain:
                continue
            factors = [self._operand(name, node) for name in node.input[:2]]
            if any(f is None for f in factors):
                if any(self._dequantised(name) for name in node.input[:2]):
                    done.left.append(node.name or node.output[0])
                continue
            left, right = factors
            assert left is not None
            assert right is not None
            if self._multiply(node, left, right, readers):
                done.integer += 1
            else:
                done.left.append(node.name or node.output[0])
        self._write()
        remove_unread(self.model)
        if done.integer and all(entry.domain != "com.microsoft" for entry in self.model.opset_import):
            self.model.opset_import.add(domain="com.microsoft", version=1)
        return done

    def _dequantised(self, name: str) -> bool:
        node = self.made_by.get(name)
        while node is not None and node.op_type == "Transpose":
            node = self.made_by.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def _operand(self, name: str, before: onnx.NodeProto) -> Operand | None:
        node = self.made_by.get(name)
        if node is None:
            return None
        if node.op_type == "Transpose":
            inner = self._operand(node.input[0], before)
            if inner is None or inner.dynamic:
                return None
            order = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())
            inner.values = self._transpose(inner.values, order, before)
            return inner
        if node.op_type != "DequantizeLinear":
            return None
        values, scale, *zero = node.input
        constant = values in self.initializers
        found = Operand(values, scale, zero[0] if zero else "", constant)
        source = self.made_by.get(values)
        if not constant and (source is None or source.op_type != "QuantizeLinear"):
            return None
        if source is not None and self._origin(source.input[1]) == "DynamicQuantizeLinear":
            found.dynamic = source.input[0]
        return found

    def _origin(self, name: str) -> str:
        """The operator that a value comes from, casts and shape changes aside."""
        node = self.made_by.get(name)
        while node is not None and node.op_type in ("Cast", "Reshape"):
            node = self.made_by.get(node.input[0])
        return node.op_type if node is not None else ""

    def _transpose(self, values: str, order: tuple[int, ...], before: onnx.NodeProto) -> str:
        from onnx import helper

        key = (values, order)
        if key not in self.transposed:
            self.transposed[key] = f"{values}_transposed_{'_'.join(map(str, order))}"
            made = helper.make_node("Transpose", [values], [self.transposed[key]], perm=list(order) or None)
            self.new.setdefault(id(before), []).append(made)
        return self.transposed[key]

    def _multiply(self, node: onnx.NodeProto, left: Operand, right: Operand, readers: Counter[str]) -> bool:
        from onnx import helper

        if left.constant or not self._is_unsigned(left.zero_point):
            return False
        attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        result, bias = node.output[0], ""
        if node.op_type == "Gemm":
            if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
                return False
            if attributes.get("transB"):
                right.values = self._transpose(right.values, (1, 0), node)
            bias = node.input[2] if len(node.input) > 2 else ""
            if bias and not self._is_vector(bias):
                return False
        elif right.constant and readers[result] == 1:
            add = next((n for n in self.graph.node if result in n.input), None)
            if add is not None and add.op_type == "Add" and not add.domain:
                other = next((i for i in add.input if i != result), "")
                if self._is_vector(other):
                    bias, result = other, add.output[0]
                    self.erased.add(id(add))
        if left.dynamic:
            if not right.constant:
                return False
            inputs = [left.dynamic, right.values, right.scale, right.zero_point, bias]
            kind = "DynamicQuantizeMatMul"
        else:
            inputs = [
                left.values, right.values, left.scale, right.scale, left.zero_point, right.zero_point, bias,
            ]  # fmt: skip
            kind = "MatMulIntegerToFloat"
        while inputs and not inputs[-1]:
            inputs.pop()
        made = helper.make_node(kind, inputs, [result], name=node.name, domain="com.microsoft")
        self.new.setdefault(id(node), []).append(made)
        self.erased.add(id(node))
        return True

    def _is_unsigned(self, zero_point: str) -> bool:
        """Whether a zero point says uint8 (one computed at run time is, in DynamicQuantizeLinear)."""
        if zero_point in self.initializers:
            return bool(self.initializers[zero_point].data_type == _UINT8)
        node = self.made_by.get(zero_point)
        if node is not None and node.op_type == "Constant":
            return bool(node.attribute[0].t.data_type == _UINT8)
        return self._origin(zero_point) == "DynamicQuantizeLinear"

    def _is_vector(self, name: str) -> bool:
        return name in self.initializers and len(self.initializers[name].dims) == 1

    def _write(self) -> None:
        nodes = []
        for node in self.graph.node:
            nodes += self.new.get(id(node), [])
            if id(node) not in self.erased:
                nodes.append(node)
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)


def remove_unread(model: onnx.ModelProto) -> None:
    """Case 4."""
    while True:
        readers = _readers(model)
        unread = [node for node in model.graph.node if not any(readers[name] for name in node.output)]
        if not unread:
            break
        for node in unread:
            model.graph.node.remove(node)
    kept = [i for i in model.graph.initializer if readers[i.name]]
    if len(kept) < len(model.graph.initializer):
        copies = [type(i).FromString(i.SerializeToString()) for i in kept]
        del model.graph.initializer[:]
        model.graph.initializer.extend(copies)


def _readers(model: onnx.ModelProto) -> Counter[str]:
    names = [name for node in all_nodes(model.graph) for name in node.input]
    return Counter([*names, *(o.name for o in model.graph.output)])
