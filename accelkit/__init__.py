"""accelkit: a PyTorch model in, the same model out, faster, with proof.

import accelkit

fast = accelkit.optimize(model, example_inputs, target="onnxruntime")
y = fast(x)
print(fast.report())
"""

from __future__ import annotations

from accelkit.backend_api import Backend as Backend
from accelkit.backend_api import Engine as Engine
from accelkit.compiled import CompiledModel as CompiledModel
from accelkit.dims import Dim as Dim
from accelkit.errors import AccelkitError as AccelkitError
from accelkit.errors import AccelkitWarning as AccelkitWarning
from accelkit.errors import AccuracyError as AccuracyError
from accelkit.errors import ArtifactError as ArtifactError
from accelkit.errors import BackendUnavailableError as BackendUnavailableError
from accelkit.errors import CacheError as CacheError
from accelkit.errors import CaptureError as CaptureError
from accelkit.errors import InputError as InputError
from accelkit.errors import LoweringError as LoweringError
from accelkit.errors import PassError as PassError
from accelkit.pass_api import GraphPass as GraphPass
from accelkit.pass_api import OnnxPass as OnnxPass
from accelkit.pass_api import RewritePass as RewritePass
from accelkit.persistence import load as load
from accelkit.pipeline import optimize as optimize
from accelkit.precision import Fp8 as Fp8
from accelkit.precision import Int8 as Int8
from accelkit.precision import Precision as Precision

__version__ = "0.1.0"
