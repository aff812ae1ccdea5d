"""What was seen of a model's values, kept apart from what is made of it: collected once, used by every scheme and target.

    calibration = Calibration.collect(model, loader)        calibration.save("bert.calibration")
    accelkit.optimize(model, x, target="onnxruntime", precision="int8", calibration=Calibration.load("bert.calibration"))

A file is a zip of JSON and tensors; no pickle is read or written.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from accelkit.errors import InputError
from accelkit.quantization.calibrators import Calibrator, as_calibrator
from accelkit.quantization.histogram import Histogram

if TYPE_CHECKING:
    from torch import nn

FORMAT = "accelkit calibration 1"


@dataclass(frozen=True)
class Calibration:
    """Histograms of a model's activations.

    Attributes:
        model: digest of the graph and weights that it is of; another model refuses it.
        histograms: by `<layer>.<quantiser>` (`encoder.layer.0.output.dense.input`).
        batches: how many were used.
        channels: the largest magnitude of each input channel of linear layers, [width] by layer; for SmoothQuant.
        smooth: SmoothQuant's alpha that was folded in before the histograms were taken, or None.
    """

    model: str
    histograms: Mapping[str, Histogram]
    batches: int
    channels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    smooth: float | None = None

    @staticmethod
    def collect(
        model: nn.Module,
        batches: Iterable[Any],
        example_inputs: Any = None,
        *,
        smooth: float | None = None,
        dynamic_shapes: Any = None,
        keep: tuple[str, ...] = (),
        progress: bool = True,
    ) -> Calibration:
        """Run the model on batches and count the values of all tensors that any scheme quantises.

        Args:
            model: as for `optimize`; it is not changed.
            batches: an iterable of inputs (a DataLoader will do), each as `example_inputs`; one is held at a time.
            example_inputs: what the model is captured with; None: the first batch.
            smooth: SmoothQuant's alpha, which then has to be the precision's; batches are gone through twice.
            dynamic_shapes: as for `optimize`; batches whose shapes are not covered are left out.
            keep: layers that will not be quantised, as `Int8(keep=...)`: they may give NaN or infinity.
            progress: show a progress line on a terminal.

        Raises:
            InputError: no batches, one that does not fit, or NaN or infinity in a layer, which is named.
        """
        from accelkit.quantization.collect import collect

        return collect(model, batches, example_inputs, smooth, dynamic_shapes, keep, progress)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it knows, `<layer>.<quantiser>`."""
        return tuple(self.histograms)

    def histogram(self, name: str) -> Histogram:
        """The histogram of one tensor.

        Raises:
            InputError: it was not observed.
        """
        if name not in self.histograms:
            near = [n for n in self.histograms if n.startswith(name)] or list(self.histograms)
            raise InputError(
                f"the calibration has nothing of {name!r}; it has {', '.join(near[:8])}{' ...' if len(near) > 8 else ''}"
            )
        return self.histograms[name]

    # --- files

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        with open(path, "wb") as stream:
            self.write(stream)

    def write(self, stream: IO[bytes]) -> None:
        """The same, to an open file."""
        from accelkit.tensors_io import tensors_to_bytes

        described = {
            "format": FORMAT,
            "model": self.model,
            "batches": self.batches,
            "smooth": self.smooth,
            "histograms": {
                name: {k: v for k, v in dataclasses.asdict(h).items() if k != "counts"}
                for name, h in self.histograms.items()
            },
        }
        tensors = {f"counts/{name}": h.counts for name, h in self.histograms.items()}
        tensors |= {f"channels/{name}": t for name, t in self.channels.items()}
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (("calibration.json", json.dumps(described, indent=1).encode()),
                                  ("tensors", tensors_to_bytes(tensors))):  # fmt: skip
                # a fixed date: the same calibration is the same file
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """One from a file.

        Raises:
            InputError: damaged, or not a calibration.
        """
        with open(path, "rb") as stream:
            return Calibration.read(stream, str(path))

    @staticmethod
    def read(stream: IO[bytes], what: str) -> Calibration:
        """The same, from an open file that messages call `what`."""
        from accelkit.errors import ArtifactError
        from accelkit.tensors_io import tensors_from_bytes

        try:
            with zipfile.ZipFile(stream) as archive:
                described = json.loads(archive.read("calibration.json"))
                tensors = tensors_from_bytes(archive.read("tensors"))
            if described["format"] != FORMAT:
                raise InputError(f"{what} is of the form {described['format']!r}; this accelkit reads {FORMAT!r}")
            smooth = described["smooth"]
            return Calibration(
                str(described["model"]),
                {
                    name: Histogram(
                        tensors[f"counts/{name}"], int(h["exponent"]), float(h["minimum"]), float(h["maximum"]),
                        int(h["non_finite"]),
                    )
                    for name, h in described["histograms"].items()
                },
                int(described["batches"]),
                {n.removeprefix("channels/"): t for n, t in tensors.items() if n.startswith("channels/")},
                None if smooth is None else float(smooth),
            )  # fmt: skip
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, ArtifactError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{what} is damaged, or not a calibration ({type(error).__name__}: {error})") from error

    # --- a look

    def plot(self, name: str, path: str | Path | None = None, calibrator: str | Calibrator = "percentile") -> Any:
        """Draw one tensor's histogram with the calibrator's limits.

        Args:
            name: of the tensor, one of `names`. path: where to save the picture; None: nowhere.
            calibrator: whose limits are drawn, and those of `Max` beside them.

        Returns:
            matplotlib's Figure.

        Raises:
            InputError: unknown name or calibrator, or matplotlib is not installed.
        """
        histogram, calibrator = self.histogram(name), as_calibrator(calibrator)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plot() needs matplotlib, which is not installed; pip install matplotlib") from error
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        used = histogram.counts.nonzero().reshape(-1)
        centres, counts = histogram.centres()[used], histogram.counts[used]
        axes.bar(centres.tolist(), counts.tolist(), width=histogram.width, color="tab:blue")
        low, high = calibrator.limits(histogram)
        for edge, text in ((low, f"{calibrator}: {low:.4g} to {high:.4g}"), (high, None)):
            axes.axvline(edge, color="tab:red", linestyle="--", label=text)
        axes.set_yscale("log")
        axes.set(title=f"{name}, {self.batches} batches", xlabel="value", ylabel="count")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure
