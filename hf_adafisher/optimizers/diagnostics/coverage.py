"""What an AdaFisher optimizer can tell about itself: where each parameter's curvature comes from, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_adafisher.fisher.diagonals import diagonal_of
from hf_adafisher.fisher.parameter_uses import ON_GRADIENT
from hf_adafisher.optimizers.diagnostics.layer_curvature import at_floor

if TYPE_CHECKING:
    from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer

GRADIENT_FACTORS = "gradient factors"


@dataclass(frozen=True)
class ParameterCoverage:
    """How one trainable parameter gets its curvature; a row of ``coverage()``.

    Attributes:
        name: The parameter's name in the model.
        rule: Name of the layer rule (several joined by ``+`` for a tied parameter), or ``"gradient factors"``.
        modules: Names of the modules that own the parameter.
        numel: Number of values.
        share: ``numel`` divided by the number of values of all parameters listed.
    """

    name: str
    rule: str
    modules: tuple[str, ...]
    numel: int
    share: float


def owner_names(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own each parameter, by ``id(parameter)``."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return owners


def coverage_of(optimizer: KroneckerDiagonalOptimizer) -> list[ParameterCoverage]:
    """One row for every trainable parameter of ``optimizer``, in the order of its groups.

    After the first step it shows only rules that have statistics, and gradient factors where a layer recorded nothing.
    """
    owners = owner_names(optimizer.model)
    params = [p for p in optimizer._params() if p.requires_grad]
    total = sum(p.numel() for p in params)
    rows = []
    for p in params:
        uses, state = optimizer._statistics.uses_of(p), optimizer.state.get(p)
        recorded = [use for use in uses if state and not use.average(state, p.shape).is_empty]
        rules = {use.tracked.rule.name: None for use in recorded or uses if use.tracked is not None}
        rule = GRADIENT_FACTORS if not rules or (state and state[ON_GRADIENT].item()) else "+".join(rules)
        rows.append(
            ParameterCoverage(
                optimizer._statistics.name_of(p),
                rule,
                tuple(owners.get(id(p), ())),
                p.numel(),
                p.numel() / max(total, 1),
            )
        )
    return rows


@torch.no_grad()
def curvature_summary(optimizer: KroneckerDiagonalOptimizer) -> dict[str, float]:
    """A few numbers about the curvature in use, for logs.

    Returns:
        ``fisher_mean``: mean of the damped diagonal over all values with statistics;
        ``floor_share``: share of those values whose Fisher is below the damping, which then decides their step (but
        not that of SpectralAdaFisher's hidden matrices, whose sides are damped each for itself);
        ``gradient_factor_share``: share of values on gradient factors;
        ``refreshes``, ``dropped_refreshes``: how often factors were updated, and not updated for being non-finite.
        The first two are missing before the first step.
    """
    mean_sum = floor_sum = values = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            terms = optimizer._statistics.known_terms(p, state) if state else []
            if terms:
                damping = optimizer.damping_of(group, terms)
                diagonal = diagonal_of(terms, p, damping)
                mean_sum += diagonal.sum(dtype=torch.float64).item()
                floor_sum += at_floor(diagonal, damping).sum().item()
                values += p.numel()
    summary = {"fisher_mean": mean_sum / values, "floor_share": floor_sum / values} if values else {}
    on_gradient = sum(row.share for row in coverage_of(optimizer) if row.rule == GRADIENT_FACTORS)
    first = optimizer.param_groups[0]
    return {
        **summary,
        "gradient_factor_share": on_gradient,
        "refreshes": float(first["refreshes"]),
        "dropped_refreshes": float(first["dropped_refreshes"]),
    }
