"""OpenVINO's CPU runtime: fx graph -> ONNX without weights -> ov.Model with the live weights -> compiled model.

    graph --export_onnx, OnnxPass values--> small ModelProto --read_model, weights as constants--> ov.Model --> CompiledModel

    backend.py   the target: options, what it refuses, compile and load
    model.py     from the ONNX model and torch's tensors to a compiled model
    quantised.py weights that the graph quantises, as int8 tensors
    proof.py     which precision each layer really got, read from the compiled model
    engine.py    runs it on tensors: a request per concurrent call, memory of torch's on both sides

The types in the graph decide what runs in which precision: OpenVINO keeps bfloat16 where the CPU has it, and computes
integer products where QuantizeLinear and DequantizeLinear surround them. Why by way of ONNX, why the file holds no
compiled code, and which weights are shared: docs/decisions/0015-openvino.md.
"""

from accelkit.backends.openvino.backend import OpenVINO
from accelkit.backends.openvino.engine import OpenVinoEngine

__all__ = ["OpenVINO", "OpenVinoEngine"]
