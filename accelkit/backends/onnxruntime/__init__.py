"""ONNX Runtime: fx graph -> ONNX without weights -> session that gets the live weights.

    graph --export_onnx, OnnxPass values--> small ModelProto --+ weights from torch's memory--> InferenceSession

    backend.py   the target: options, what it refuses, compile and load
    session.py   sessions on the CPU and CUDA providers
    engine.py    runs a session on tensors in the CPU's memory
    cuda.py      runs one on tensors in a GPU's memory, on the caller's stream, in a CUDA graph where asked for

The session copies or prepacks every weight as it is created (nothing is shared with the model afterwards: changing a
parameter in place does not change the engine; a refit makes a new session from the same bytes). Inputs and outputs
are not copied. How this form was chosen, with numbers: docs/decisions/0002-onnx-runtime-weights.md.
"""

from accelkit.backends.onnxruntime.backend import OnnxRuntime
from accelkit.backends.onnxruntime.engine import OnnxRuntimeEngine

__all__ = ["OnnxRuntime", "OnnxRuntimeEngine"]
