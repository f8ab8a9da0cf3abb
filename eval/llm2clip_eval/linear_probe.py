"""Multinomial logistic regression on frozen features, its weight decay chosen on validation images.

Minimised is mean cross-entropy + weight_decay / 2 * ||W||^2, the bias left free: what scikit-learn's
`LogisticRegression` calls C is 1 / (weight_decay * images), and twice that for two classes. The sweep is CLIP's
(Radford et al. 2021, appendix A.3).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

Solver = Literal["sklearn", "torch"]
MAX_ITERATIONS = 1000
"""Of L-BFGS; CLIP, appendix A.3."""
TOLERANCE = 1e-5
"""Largest entry of the gradient at which it stops."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier."""

    weight: torch.Tensor
    """(classes, dim) float32."""
    bias: torch.Tensor
    """(classes,) float32; minus infinity for a class that training never showed."""

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(images, dim) -> (images, classes) logits, finite: a class never shown is far behind the others."""
        logits = features @ self.weight.T + self.bias
        floor = logits.masked_fill(logits.isinf(), torch.inf).amin(dim=1, keepdim=True) - 1
        return torch.where(logits.isinf(), floor, logits)


def fit(features: torch.Tensor, labels: np.ndarray, num_classes: int, weight_decay: float, solver: Solver) -> Probe:
    """Fit to convergence.

    Args:
        features: (images, dim) float32, on the CPU.
        labels: (images,), of two classes at least.
        num_classes: the classes there are; training need not show all.
        weight_decay: see above.
        solver: scikit-learn on the CPU, or L-BFGS in torch, on a GPU if there is one. Both find the same optimum.

    Raises:
        ValueError: if training shows less than two classes.
    """
    shown, targets = np.unique(labels, return_inverse=True)
    center = features.mean(dim=0)  # the bias is free, so this moves no optimum; L-BFGS gets there sooner
    if len(shown) < 2:
        raise ValueError(f"a probe needs images of at least two classes, got {len(labels)} images of {len(shown)}")
    fitted = _fit_sklearn if solver == "sklearn" else _fit_torch
    rows, offsets = fitted(features - center, targets, len(shown), weight_decay)
    weight = torch.zeros(num_classes, features.shape[1])
    bias = torch.full((num_classes,), -torch.inf)
    weight[shown], bias[shown] = rows, offsets - rows @ center
    return Probe(weight, bias)


def choose_weight_decay(
    train: tuple[torch.Tensor, np.ndarray],
    val: tuple[torch.Tensor, np.ndarray],
    num_classes: int,
    weight_decays: Sequence[float],
    solver: Solver,
) -> tuple[float, dict[str, float]]:
    """Fit with every weight decay and take the best on validation; of equally good ones the largest.

    Returns:
        The weight decay, and the accuracy of each on the validation images, in percent.
    """
    from llm2clip_eval.classification import label_ranks

    found: dict[float, float] = {}
    for weight_decay in sorted(weight_decays):
        probe = fit(*train, num_classes, weight_decay, solver)
        found[weight_decay] = float(100 * np.mean(label_ranks(probe.scores(val[0]), val[1]) == 0))
    best = max(found, key=lambda weight_decay: (found[weight_decay], weight_decay))
    if len(found) > 1 and best in (min(found), max(found)):
        logger.warning("the best weight decay, %g, is the last of those tried: try more on that side", best)
    return best, {f"{weight_decay:g}": accuracy for weight_decay, accuracy in found.items()}


def _fit_sklearn(
    features: torch.Tensor, targets: np.ndarray, num_classes: int, weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # Of two classes it fits the difference w of their rows, -w/2 and w/2, whose squares add up to half of ||w||^2.
    penalty = weight_decay * len(targets) / (2 if num_classes == 2 else 1)
    regression = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(features.double().numpy(), targets)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("weight decay %g: not converged after %d iterations", weight_decay, MAX_ITERATIONS)
    rows = torch.from_numpy(regression.coef_)
    offsets = torch.from_numpy(regression.intercept_)
    if num_classes == 2:  # one row, of the second class against the first
        rows, offsets = torch.cat([-rows / 2, rows / 2]), torch.cat([-offsets / 2, offsets / 2])
    return rows.float(), offsets.float()


def _fit_torch(
    features: torch.Tensor, targets: np.ndarray, num_classes: int, weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = features.to(device, torch.float64)
    wanted = torch.from_numpy(targets).to(device)
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, wanted) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach().float().cpu(), bias.detach().float().cpu()
