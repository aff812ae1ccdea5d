"""TensorRT: engines built from ONNX in a process of their own, run on PyTorch's streams and memory.

    fx graph --> ONNX in the forms that TensorRT fuses --> plan --> engine, with proof of the precision that it runs in

Nothing here imports `tensorrt` before it is needed. Versions from 8.6 on; what each has: docs/tensorrt.md.
"""

from accelkit.backends.tensorrt.backend import TensorRT

__all__ = ["TensorRT"]
