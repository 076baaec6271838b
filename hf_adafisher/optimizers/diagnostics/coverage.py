"""Coverage of a model's parameters by layer rules, and a summary of the diagonals in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_adafisher.fisher.diagonals import DiagonalTerm, mean_of_terms
from hf_adafisher.optimizers.base.trained_parameter import TrainedParameter
from hf_adafisher.optimizers.diagnostics.diagonal_numbers import floor_share
from hf_adafisher.optimizers.factory.param_groups import roles

GRADIENT_FACTORS = "gradient factors"
MOMENTUM = "momentum's rows and columns"


@dataclass(frozen=True)
class ParameterCoverage:
    """Source of one trainable parameter's curvature; a row of ``coverage()``.

    Attributes:
        name: The parameter's name in the model.
        rule: Name of the layer rule (several joined by ``+`` for a tied parameter), ``"gradient factors"``, or, of
            what SpectralAdaFisher moves by its polar factor, ``"momentum's rows and columns"``.
        modules: Names of the modules that own the parameter.
        numel: Number of values.
        share: ``numel`` divided by the number of values of all parameters listed.
        provisional: Whether its factors are those of the last step's gradient alone, until the next refresh.
        role: What it is taken for where that matters (``step_size="root"``, SpectralAdaFisher, Muon): ``"hidden
            matrix"``, ``"input"`` (the first convolution), ``"table"``, ``"head"``, ``"table and head"``, or nothing.
    """

    name: str
    rule: str
    modules: tuple[str, ...]
    numel: int
    share: float
    provisional: bool = False
    role: str = ""


def owner_names(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own each parameter, by ``id(parameter)``."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return owners


def coverage_of(model: nn.Module, parameters: Sequence[TrainedParameter]) -> list[ParameterCoverage]:
    """One row for every trainable parameter, in the given order.

    After the first step it shows only rules that have statistics, and gradient factors where a layer recorded nothing.
    """
    owners, role_of = owner_names(model), roles(model)
    trainable = [t for t in parameters if t.param.requires_grad]
    total = max(sum(t.param.numel() for t in trainable), 1)
    rows = []
    for t in trainable:
        recorded = [use for use in t.uses if t.state and not use.average(t.state, t.param.shape).is_empty]
        rules = {use.tracked.rule.name: None for use in recorded or t.uses if use.tracked is not None}
        rule = GRADIENT_FACTORS if t.on_gradient_factors else "+".join(rules) or MOMENTUM
        size = t.param.numel()
        modules = tuple(owners.get(id(t.param), ()))
        rows.append(
            ParameterCoverage(t.name, rule, modules, size, size / total, t.provisional, role_of.get(id(t.param), ""))
        )
    return rows


@torch.no_grad()
def curvature_summary(
    model: nn.Module,
    parameters: Sequence[TrainedParameter],
    damping_of: Callable[[Mapping[str, Any], Sequence[DiagonalTerm]], float],
) -> dict[str, float]:
    """A few numbers about the diagonals in use, for logs.

    Args:
        model: The model.
        parameters: Its trained parameters.
        damping_of: Damping of the diagonal that these terms of a parameter in a group make.

    Returns:
        ``fisher_mean``: mean of the damped diagonal over all values with statistics;
        ``floor_share``: share of those values whose Fisher is below the damping, which then decides their step, found
        without forming a diagonal (``floor_share``);
        ``gradient_factor_share``: share of values on gradient factors;
        ``refreshes``, ``dropped_refreshes``: how often factors were updated, and not updated for being non-finite.
        The first two are missing before the first step.
    """
    mean_sum = floor_sum = values = 0.0
    for t in parameters:
        if t.terms:
            damping = damping_of(t.group, t.terms)
            mean_sum += (mean_of_terms(t.terms).item() + damping) * t.param.numel()
            floor_sum += floor_share(t.terms, t.param, damping) * t.param.numel()
            values += t.param.numel()
    summary = {"fisher_mean": mean_sum / values, "floor_share": floor_sum / values} if values else {}
    trainable = [t for t in parameters if t.param.requires_grad]
    on_gradient = sum(t.param.numel() for t in trainable if t.on_gradient_factors)
    first = parameters[0].group
    return {
        **summary,
        "gradient_factor_share": on_gradient / max(sum(t.param.numel() for t in trainable), 1),
        "refreshes": float(first["refreshes"]),
        "dropped_refreshes": float(first["dropped_refreshes"]),
    }
