"""distillation_loss(student's logits, teacher's logits): what a quantised model is trained with to follow the float one."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from accelkit.errors import InputError


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    temperature: float = 3.0,
    soft: float = 0.5,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), and with targets the weighted mean with their cross entropy.

    T^2 keeps the size of the gradients independent of T. Sources: Hinton, Vinyals and Dean, Distilling the Knowledge in a
    Neural Network (arXiv 1503.02531), section 2; T = 3 is FasterTransformer's guide's.

    Args:
        student_logits, teacher_logits: [..., classes]; no gradient goes to the teacher's.
        targets: class indices [...], -100 where there is none, or None: the teacher alone is followed.
        temperature: above 0. soft: the teacher's share, from 0 to 1, where there are targets.

    Returns:
        a scalar: the mean over all leading dimensions.

    Raises:
        InputError: shapes that do not go together, or a temperature or share out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> float(distillation_loss(logits, logits))
        0.0
    """
    if student_logits.shape != teacher_logits.shape or not student_logits.dim():
        raise InputError(
            f"logits are [..., classes] of one shape, not {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature={temperature!r}: above 0, such as 3.0")
    if not 0 <= soft <= 1:
        raise InputError(f"soft={soft!r}: the teacher's share is from 0 to 1")
    classes = student_logits.shape[-1]
    student = F.log_softmax(student_logits.reshape(-1, classes).float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.detach().reshape(-1, classes).float() / temperature, -1)
    distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    if targets is None:
        return distance
    if targets.shape != student_logits.shape[:-1]:
        raise InputError(f"targets are class indices {list(student_logits.shape[:-1])}, not {list(targets.shape)}")
    return soft * distance + (1 - soft) * F.cross_entropy(student_logits.reshape(-1, classes), targets.reshape(-1))
