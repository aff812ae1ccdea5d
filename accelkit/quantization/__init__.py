"""Quantisation: what is rounded to 8 bits (schemes), between which limits (calibrators), and on what data (Calibration).

accelkit.optimize(model, x, precision=Int8(scheme="ft2", calibrator=MSE()), calibration=loader)
"""

from __future__ import annotations

from accelkit.quantization.calibration import Calibration
from accelkit.quantization.calibrators import MSE, Calibrator, Entropy, Max, Percentile, as_calibrator
from accelkit.quantization.distillation import distillation_loss
from accelkit.quantization.histogram import Histogram
from accelkit.quantization.qat import QatModel, prepare_qat
from accelkit.quantization.schemes import SCHEMES, Scheme, scheme_named
from accelkit.quantization.sensitivity import LayerSensitivity, Sensitivity, sensitivity

__all__ = [
    "MSE",
    "SCHEMES",
    "Calibration",
    "Calibrator",
    "Entropy",
    "Histogram",
    "LayerSensitivity",
    "Max",
    "Percentile",
    "QatModel",
    "Scheme",
    "Sensitivity",
    "as_calibrator",
    "distillation_loss",
    "prepare_qat",
    "scheme_named",
    "sensitivity",
]
