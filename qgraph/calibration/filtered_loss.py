# SPDX-License-Identifier: Apache-2.0
"""Teacher-student objectives: what ``loss=`` of compile takes, and the filtered global loss.

An objective maps (the quantized network's outputs, the float network's) to a scalar. No labels are
used. `FilteredGlobalLoss` is Reg-PTQ's (CVPR 2024, equations 4 and 6 to 8): class entropy over all
boxes, box distance only over those that the float network believes in and both agree on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraph.calibration.boxes import aligned_iou
from qgraph.errors import ConfigError, unknown_name

DISTANCES = ("power", "overlap")
NORMALIZERS = ("all", "kept")
CLASSES = ("sigmoid", "softmax")


class Objective(Protocol):
    """A loss between two networks; both arguments have the model's own output structure.

    Attributes:
        teacher_student: True; a plain callable given as ``loss=`` is a task's loss of
            (outputs, batch) instead.
    """

    @property
    def teacher_student(self) -> bool:
        """True."""

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """The scalar loss, differentiable in `student`."""


@dataclass(frozen=True, slots=True)
class TeacherStudent:
    """Any function of (quantized outputs, float outputs) as an objective.

    Attributes:
        function: returns the scalar, differentiable in its first argument.
    """

    function: Callable[[Any, Any], Tensor]
    teacher_student: ClassVar[bool] = True

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """The function's value."""
        return self.function(student, teacher)


def objective_of(loss: Any) -> Objective | None:
    """`loss` if it compares two networks; None for no loss, and for a task's loss."""
    return loss if getattr(loss, "teacher_student", False) else None


@dataclass(frozen=True, slots=True)
class Predictions:
    """Decoded outputs of one head, before suppression; row i of two networks is the same box.

    Attributes:
        logits: [B, N, classes]; pixels of a segmentation are rows too.
        boxes: [B, N, 4] corners divided by the image size; None without boxes.
        valid: bool [B, N], rows that count; None: all.
    """

    logits: Tensor
    boxes: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """How many rows survived the two steps of the filter; sums, so parts can be added.

    Attributes:
        rows: all rows; confident: those behind step 1; kept: behind step 2.
        overlap: sum over the confident rows of their overlap.
    """

    rows: int = 0
    confident: int = 0
    kept: int = 0
    overlap: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.rows + other.rows, self.confident + other.confident, self.kept + other.kept,
            self.overlap + other.overlap,
        )  # fmt: skip

    @property
    def mean_overlap(self) -> float:
        """Mean overlap of the confident rows."""
        return self.overlap / self.confident if self.confident else 0.0

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.rows:,} rows kept, {self.confident:,} confident, their mean"
            f" overlap {self.mean_overlap:.3f}"
        )


@runtime_checkable
class Filtering(Protocol):
    """An objective that can say what it kept."""

    def statistics(self, student: Any, teacher: Any) -> Kept:
        """What the filter keeps of these outputs."""


Decoded = Predictions | tuple[Tensor, ...] | list[Any]


@dataclass(frozen=True)
class FilteredGlobalLoss:
    """The loss of Reg-PTQ between decoded outputs of the quantized and the float detector.

    ``L = 1/n sum_i KL(y_i, y^_i) + lam |m_i (b_i - b^_i)|_p^p``, the mask m_i being 1 where the
    float score is at least `theta_c` and the two boxes overlap by at least `theta_i`. The entropy
    of y is subtracted from the cross entropy, so equal outputs give 0 and gradients stay the same.
    The class term is not masked; without boxes (segmentation, one row per pixel) it is, by score.
    ``distance="overlap"`` replaces the power by ``1 - IoU(b_i, b^_i)``, which weighs an error by
    the size of the box, as average precision does: a pixel decides over a small box, not a large.

    Attributes:
        decode: raw outputs -> `Predictions`, a (logits, boxes) tuple, or a list of them, one per
            head. Plain differentiable torch, boxes divided by the image size, no suppression.
        score: logits -> [B, N]; default: the largest probability of a (foreground) class.
        theta_c, theta_i: thresholds of score and overlap.
        lam, p: weight and exponent of the box term.
        distance: between two boxes, the ``power`` of the paper or their ``overlap``.
        confidence: boxes count by the float score to this power; 0: all that are kept alike.
        classes: ``sigmoid`` (dense heads), or ``softmax`` with class 0 as background.
        normalizer: divide by ``all`` rows, as the paper does, or by those ``kept``.

    Raises:
        ConfigError: a threshold outside [0, 1], an exponent below 1, a negative weight, an unknown
            name; when called, outputs whose shapes do not belong together.
    """

    teacher_student: ClassVar[bool] = True

    decode: Callable[[Any], Decoded]
    score: Callable[[Tensor], Tensor] | None = None
    theta_c: float = 2e-4
    theta_i: float = 0.1
    lam: float = 1.0
    p: float = 1.0
    distance: Literal["power", "overlap"] = "power"
    confidence: float = 0.0
    classes: Literal["sigmoid", "softmax"] = "sigmoid"
    normalizer: Literal["all", "kept"] = "all"

    def __post_init__(self) -> None:
        for name in ("theta_c", "theta_i"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                msg = f"{name} is {value!r}; allowed: 0 to 1"
                raise ConfigError(msg)
        if self.p < 1 or self.lam < 0 or self.confidence < 0:
            msg = (
                f"p is {self.p!r}, lam {self.lam!r}, confidence {self.confidence!r};"
                " allowed: p >= 1, the others >= 0"
            )
            raise ConfigError(msg)
        if self.distance not in DISTANCES:
            raise unknown_name("distance", self.distance, DISTANCES)
        if self.normalizer not in NORMALIZERS:
            raise unknown_name("normalizer", self.normalizer, NORMALIZERS)
        if self.classes not in CLASSES:
            raise unknown_name("class function", self.classes, CLASSES)

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """The loss, fp32 []: 0 when both agree, summed over heads; no gradient for `teacher`."""
        pairs = self._pairs(student, teacher)
        return torch.stack([self._head(mine, theirs) for mine, theirs in pairs]).sum()

    def statistics(self, student: Any, teacher: Any) -> Kept:
        """What the filter keeps of these outputs."""
        total = Kept()
        with torch.no_grad():
            for mine, theirs in self._pairs(student, teacher):
                confident = self._confident(theirs)
                overlap = _overlap(mine, theirs)
                total = total + Kept(
                    confident.numel(), int(confident.sum()),
                    int((confident & (overlap >= self.theta_i)).sum()),
                    float(overlap[confident].double().sum()),
                )  # fmt: skip
        return total

    def mask(self, mine: Predictions, theirs: Predictions) -> Tensor:
        """Rows that survive both steps, bool [B, N]."""
        return self._confident(theirs) & (_overlap(mine, theirs) >= self.theta_i)

    def _pairs(self, student: Any, teacher: Any) -> list[tuple[Predictions, Predictions]]:
        with torch.no_grad():
            theirs = [_detached(head) for head in _heads(self.decode(teacher))]
        mine = _heads(self.decode(student))
        if len(mine) != len(theirs) or any(
            a.logits.shape != b.logits.shape or (a.boxes is None) != (b.boxes is None)
            for a, b in zip(mine, theirs, strict=False)
        ):
            msg = "decode gives other heads or shapes for the quantized than for the float outputs"
            raise ConfigError(msg)
        return list(zip(mine, theirs, strict=True))

    @torch.no_grad()
    def _scores(self, theirs: Predictions) -> Tensor:
        """The float network's score of each row [B, N]."""
        if self.score is not None:
            return self.score(theirs.logits)
        if self.classes == "sigmoid":
            return theirs.logits.sigmoid().amax(-1)
        return theirs.logits.softmax(-1)[..., 1:].amax(-1)

    def _confident(self, theirs: Predictions) -> Tensor:
        found = self._scores(theirs) >= self.theta_c
        return found if theirs.valid is None else found & theirs.valid

    def _head(self, mine: Predictions, theirs: Predictions) -> Tensor:
        entropy = self._divergence(mine.logits.float(), theirs.logits.float())
        mask = self.mask(mine, theirs)
        if mine.boxes is None:
            entropy = entropy * mask
        elif theirs.valid is not None:
            entropy = entropy * theirs.valid
        count = mask.numel() if self.normalizer == "all" else max(1, int(mask.sum()))
        total = entropy.sum()
        if mine.boxes is not None and theirs.boxes is not None:
            # Masked rows are cut out before the distance, so they carry no gradient at all.
            away = self._distance(mine.boxes.float()[mask], theirs.boxes.float()[mask])
            if self.confidence:
                away = away * self._scores(theirs)[mask].pow(self.confidence)
            total = total + self.lam * away.sum()
        return total / count

    def _distance(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Between boxes [K, 4] and [K, 4], one number each."""
        if self.distance == "overlap":
            return 1 - aligned_iou(mine, theirs)
        return (mine - theirs).abs().pow(self.p).sum(-1)

    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """KL divergence of each row [B, N]."""
        if self.classes == "softmax":
            wanted = theirs.log_softmax(-1)
            return (wanted.exp() * (wanted - mine.log_softmax(-1))).sum(-1)
        # The target's own entropy is subtracted in the same form, so that equal logits give 0.
        target = theirs.sigmoid()
        cross = F.binary_cross_entropy_with_logits(mine, target, reduction="none")
        own = F.binary_cross_entropy_with_logits(theirs, target, reduction="none")
        return (cross - own).sum(-1)


def _detached(head: Predictions) -> Predictions:
    """The same numbers without a gradient: decode may hand its arguments through."""
    boxes = None if head.boxes is None else head.boxes.detach()
    return Predictions(head.logits.detach(), boxes, head.valid)


def _overlap(mine: Predictions, theirs: Predictions) -> Tensor:
    """Overlap of the boxes [B, N]; 1 without boxes."""
    if mine.boxes is None or theirs.boxes is None:
        return torch.ones(theirs.logits.shape[:2], device=theirs.logits.device)
    with torch.no_grad():
        return aligned_iou(mine.boxes.float(), theirs.boxes.float())


def _heads(decoded: Decoded) -> list[Predictions]:
    if isinstance(decoded, list):
        return [head for item in decoded for head in _heads(item)]
    if not isinstance(decoded, Predictions):
        decoded = Predictions(*decoded)
    logits, boxes = decoded.logits, decoded.boxes
    if logits.ndim != 3 or (
        boxes is not None and (boxes.shape[:2] != logits.shape[:2] or boxes.shape[-1] != 4)
    ):
        shape = None if boxes is None else tuple(boxes.shape)
        msg = f"decode gives logits {tuple(logits.shape)}, boxes {shape}; expected [B, N, classes]"
        raise ConfigError(msg + " and [B, N, 4]")
    return [decoded]


def pixel_predictions(logits: Tensor) -> Predictions:
    """Rows of a segmentation: logits [B, classes, H, W] to [B, H W, classes], without boxes."""
    return Predictions(logits.flatten(2).transpose(1, 2))
