"""prepare_qat(model, example, "int8") -> a module that computes the emulation and can be trained; then optimize(module, x)

    qat = prepare_qat(model, x, Int8(scheme="ft2"), calibration=batches)
    for x, y in loader:
        distillation_loss(qat.train()(x), model(x), y).backward(); optimizer.step()
    fast = accelkit.optimize(qat, x, target="onnxruntime")      # no calibration: the ranges travel with the module

It runs the captured and fused graph rather than hooks on the model's own modules: attention products, softmax inputs and
residuals have no module of their own, and merged layers share one range. docs/qat.md says what follows from that.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelkit.errors import InputError
from accelkit.quantization.calibration import Calibration

if TYPE_CHECKING:
    from accelkit.precision import Int8, Precision
    from accelkit.quantization.training_graph import TrainingGraph


class QatModel(nn.Module):
    """A copy of a model whose forward computes what its INT8 form will; made by `prepare_qat`.

    Parameters, buffers and sub-modules are the copy's own, under the same names: `load_state_dict` works both ways, and
    optimisers and parameter groups are made as for the model. Attributes of the model (`config`) can be read.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        precision: Int8,
        calibration: Calibration | None,
        observe: int,
        dynamic_shapes: Any,
    ) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules"):  # the very dictionaries: one state under both
            object.__setattr__(self, name, getattr(model, name))
        hidden = self.__dict__  # not through __setattr__, which would register the copy as a sub-module
        hidden["float_model"] = model
        hidden["_example"], hidden["_dynamic_shapes"] = example, dynamic_shapes
        hidden["_made"], hidden["_seen"], hidden["_observe"] = None, [], observe
        self.precision, self.calibration = precision, calibration
        self.train(model.training)
        if calibration is not None or not precision.takes_calibration:
            self._make()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's; in the model's own output type.

        Raises:
            InputError: inputs of shapes or dtypes that were not captured.
        """
        if self._made is None:
            return self._observed(args, kwargs)
        made: TrainingGraph = self._made
        tensors = made.signature.tensors_of(made.signature.leaves(args, kwargs))
        if (uncovered := made.signature.covers(tensors)) is not None:
            raise InputError(
                f"{uncovered}; prepare_qat(..., dynamic_shapes={{...}}) captures sizes that vary (a loader's last, smaller batch: "
                "drop_last=True), and a model is prepared on the device that it is trained on"
            )
        weights = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return made.signature.unflatten(made.run(weights, tensors, self.training))

    @property
    def quantised(self) -> tuple[str, ...]:
        """The layers that are quantised, as `keep` takes them; empty as long as ranges are being observed."""
        return () if self._made is None else self._made.layers

    @property
    def left_alone(self) -> tuple[tuple[str, str], ...]:
        """(layer, reason) of what is not quantised."""
        return () if self._made is None else self._made.refusals

    @property
    def without_dropout(self) -> tuple[str, ...]:
        """The model's randomness in training that is not done here, and why."""
        return () if self._made is None else tuple(self._made.silent)

    def _observed(self, args: Any, kwargs: Any) -> Any:
        """In float; the inputs of training are what ranges are taken from, once there are enough of them."""
        self.float_model.training = self.training
        if self.training:
            args_kept, kwargs_kept = torch.utils._pytree.tree_map(
                lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
            )
            self._seen.append({"args": args_kept, "kwargs": kwargs_kept})
        results = self.float_model(*args, **kwargs)
        if len(self._seen) >= self._observe:
            self._calibrate([_as_batch(self.float_model, one) for one in self._seen])
            self._seen.clear()
        return results

    def _calibrate(self, batches: Iterable[Any]) -> None:
        args, kwargs = self._example
        self.calibration = Calibration.collect(
            self.float_model,
            batches,
            args if args else kwargs,
            dynamic_shapes=self._dynamic_shapes,
            keep=self.precision.keep,
            progress=False,
        )
        self._make()

    def _make(self) -> None:
        from accelkit.quantization.training_graph import make

        args, kwargs = self._example
        made = make(self.float_model, args, kwargs, self.precision, self.calibration, self._dynamic_shapes)
        if self.calibration is not None:  # of these layers, whatever training makes of their weights
            self.calibration = dataclasses.replace(self.calibration, model=made.digest)
        self.__dict__["_made"] = made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "float_model":  # not there yet: while being copied
                raise
            return getattr(self.float_model, name)


def _as_batch(model: nn.Module, call: dict[str, Any]) -> Any:
    from accelkit.signature import Binder

    args, kwargs = Binder.of(model).bind(call["args"], call["kwargs"])
    return args if args else kwargs


def prepare_qat(
    model: nn.Module,
    example_inputs: Any,
    precision: str | Precision = "int8",
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    observe: int = 16,
    dynamic_shapes: Any = None,
) -> QatModel:
    """A trainable copy of a model with its INT8 rounding in the forward.

    Activations' ranges are fixed, those of the calibration; weights' ranges follow the weights. Gradients pass through the rounding
    (straight-through), and not where a value is clipped. Dropout is on in train() and off in eval(); batch norms use their
    running statistics in both, since they are folded into weights.

    Args:
        model: as for `optimize`; it is not changed.
        example_inputs: as for `optimize`, on the device that will be trained on.
        precision: "int8", or an Int8 value, smooth=None.
        calibration: a Calibration, or batches to collect one from. None: ranges are observed: the first `observe` batches of
            training run in float, and are calibrated on then. The inputs of so many batches are held that long.
        observe: at least 1.
        dynamic_shapes: as for `optimize`, where sizes vary in training.

    Returns:
        the module to train. With the same calibration, its state dict is all that a checkpoint needs.

    Raises:
        InputError: a precision that cannot be trained, or a calibration of another model.
        CaptureError: the model cannot be captured as one graph.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> qat = prepare_qat(model, x, "int8", calibration=[x])
        >>> qat.quantised
        ('0', '2')
        >>> list(qat.state_dict()) == list(model.state_dict())
        True
    """
    from accelkit.options import canonical_example
    from accelkit.precision import Int8, as_precision
    from accelkit.signature import Binder
    from accelkit.twin import require_usable

    wanted = as_precision(precision)
    if not isinstance(wanted, Int8):
        raise InputError(f"prepare_qat trains for int8, not {wanted}: precision='int8' or an Int8 value")
    if wanted.smooth is not None:
        raise InputError(
            f"{wanted} cannot be trained: SmoothQuant changes weights, which then would not fit the model; training finds "
            "such weights by itself: smooth=None"
        )
    if not isinstance(observe, int) or observe < 1:
        raise InputError(f"observe={observe!r}: a number of batches, at least 1")
    if isinstance(require_usable(model), QatModel):
        raise InputError("the model is prepared already")
    if calibration is not None and not wanted.takes_calibration:
        raise InputError(f"calibration is for precisions that need it; {wanted} does not. Leave calibration out")
    own = copy.deepcopy(model)
    args, kwargs = Binder.of(own).bind(*canonical_example(example_inputs))
    if calibration is None or isinstance(calibration, Calibration):
        return QatModel(own, (args, kwargs), wanted, calibration, observe, dynamic_shapes)
    made = QatModel(own, (args, kwargs), wanted, None, observe, dynamic_shapes)
    made._calibrate(calibration)
    return made


def unwrapped(model: Any, precision: str | Precision, calibration: Any) -> tuple[Any, str | Precision, Any]:
    """What `optimize` is to do for a model: for a trained one the float model, the precision that it was trained in and its
    ranges; any other as it is.

    Raises:
        InputError: a trained model is asked for in another INT8 form, or with another calibration.
    """
    if not isinstance(model, QatModel):
        return model, precision, calibration
    from accelkit.precision import INT8, Int8, as_precision

    wanted, trained = as_precision(precision), model.precision
    if not isinstance(wanted, Int8):
        return model.float_model, precision, calibration
    if wanted not in (INT8, trained, dataclasses.replace(trained, activations=wanted.activations)):
        raise InputError(f"the model was trained for {trained}, not {wanted}: leave precision at 'int8'")
    if model._made is None:
        raise InputError(
            "the model has not seen enough batches in train() to know its ranges: train it, or prepare_qat(calibration=)"
        )
    if calibration is not None:
        raise InputError("calibration is not needed: the ranges that the model was trained with travel with it")
    if trained.activations is None and not trained.table.symmetric:
        # symmetric ranges are the same numbers signed or unsigned; the others were trained as this
        trained = dataclasses.replace(trained, activations="u8")
    return model.float_model, trained, model.calibration


__all__ = ["QatModel", "prepare_qat", "unwrapped"]
