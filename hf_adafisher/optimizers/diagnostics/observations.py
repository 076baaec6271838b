"""Observations of a run after a few of its steps: rates, steps, gradient norms, roles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.diagnostics.coverage import GRADIENT_FACTORS
from hf_adafisher.optimizers.diagnostics.layer_curvature import layer_curvature
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.optimizers.factory.learning_rates import usual_learning_rates
from hf_adafisher.optimizers.factory.records import RECORDS
from hf_adafisher.optimizers.sharding import full_tensor
from hf_adafisher.optimizers.update import LEAST_RMS

_HIDDEN = "hidden matrix"


@dataclass(frozen=True)
class LayerStep:
    """The last step of a parameter with more than one axis.

    Attributes:
        name: Its name in the model.
        relative: Norm of the step, decay left out, in units of the parameter's norm (a root mean square below 0.02
            counts as 0.02).
        peak: The same at the full learning rate, of which a schedule gives only a share; None at a rate of zero.
        floor_share: Share of its values at the floor of the paper's diagonal; None where it is not divided by, and for
            what is no matrix of a linear layer: of a table most rows are rare, and convolutions want a large damping.
        values: Number of its values.
    """

    name: str
    relative: float
    peak: float | None
    floor_share: float | None
    values: int


class Observations:
    """Everything that is known of a run.

    Under FSDP2 every process must make one: norms of sharded parameters are reduced.

    Args:
        optimizer: The optimizer.
        grad_norms: Norms of the gradient before it was clipped, as many as are known.
        max_grad_norm: What it is clipped to, 0 for no clipping, None where it is not known.
        skipped: Number of steps that a loss scaler skipped.
    """

    def __init__(
        self,
        optimizer: KroneckerDiagonalOptimizer,
        grad_norms: Sequence[float],
        max_grad_norm: float | None,
        skipped: int,
    ) -> None:
        self.optimizer = optimizer
        self.grad_norms = [float(norm) for norm in grad_norms if math.isfinite(norm)]
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.skipped = skipped
        self.made = int(optimizer.param_groups[0]["steps"])
        self.parameters = [t for t in optimizer.trained_parameters() if t.param.requires_grad]
        self.coverage = optimizer.coverage()
        self.rate = max(_full_rate(group) for group in optimizer.param_groups)
        self.layers, self.broken = self._last_steps()

    @property
    def is_papers(self) -> bool:
        """The paper's form: hooks, a normalised diagonal, steps as long as the gradient."""
        return not self.optimizer.divides_by_root

    @cached_property
    def source(self) -> str | None:
        """Origin of pretrained weights, empty for random ones, None where the model does not say."""
        return getattr(self.optimizer.model, "name_or_path", None)

    @property
    def clipping(self) -> list[float]:
        """Length of each gradient in units of the allowed one, at least 1; empty where that is not known."""
        return [max(norm / self.max_grad_norm, 1.0) for norm in self.grad_norms] if self.max_grad_norm else []

    @cached_property
    def floor_share(self) -> float | None:
        """Share of the values of all matrices at the floor of the paper's diagonal."""
        known = [(layer.floor_share, layer.values) for layer in self.layers if layer.floor_share is not None]
        values = sum(count for _, count in known)
        return sum(share * count for share, count in known) / values if values else None

    @cached_property
    def usual_rates(self) -> dict[str, float]:
        """Usual learning rates by their meaning: several where the model does not say which one applies."""
        paths = [f"{cls.__module__}:{cls.__qualname__}" for cls in type(self.optimizer).__mro__]
        names = {record.path: name for name, record in RECORDS.items()}
        record = optimizer_record(next(names[path] for path in paths if path in names))
        group = self.optimizer.param_groups[0]
        options: dict[str, Any] = {name: group[name] for name in ("step_size", "damping") if name in group}
        usual = usual_learning_rates(record.name, options, weights=self.source)
        return {meaning: rate for rate, meaning in usual.items()}

    def _last_steps(self) -> tuple[list[LayerStep], list[str]]:
        """The last steps from the smallest to the largest, and the names of the parameters that are not finite."""
        optimizer = self.optimizer
        linear = {row.name for row in self.coverage if row.role in (_HIDDEN, "head")}
        moved = [t for t in self.parameters if t.state and t.param.numel()]
        norms = [full_tensor(torch.linalg.vector_norm(t.param.detach(), dtype=torch.float64)).item() for t in moved]
        curvature = {} if optimizer.divides_by_root else layer_curvature(optimizer)
        squares = optimizer.root_steps() if optimizer.divides_by_root else {}
        layers, broken = [], []
        for t, norm in zip(moved, norms, strict=True):
            if t.name in curvature:
                step = curvature[t.name]["update_rms"] * math.sqrt(t.param.numel())
            elif id(t.param) in squares:
                step = math.sqrt(squares[id(t.param)])
            else:  # of a state that was just loaded
                continue
            if not math.isfinite(norm + step):
                broken.append(t.name)
            elif t.param.dim() > 1:
                relative = step / max(norm, LEAST_RMS * math.sqrt(t.param.numel()))
                now = float(t.group["lr"])
                peak = relative * _full_rate(t.group) / now if now else None
                counts = t.name in curvature and t.name in linear and t.param.dim() == 2
                share = curvature[t.name]["floor_share"] if counts else None
                layers.append(LayerStep(t.name, relative, peak, share, t.param.numel()))
        return sorted(layers, key=lambda layer: layer.relative), broken

    def numbers(self) -> dict[str, Any]:
        """Everything that was measured, for people and for JSON."""
        layers, norms = self.layers, self.grad_norms
        roles: dict[str, list[str]] = {}
        for row in self.coverage:
            if row.role and row.role != _HIDDEN:
                roles.setdefault(row.role, []).append(row.name)
        steps = None
        if layers:
            steps = {
                "smallest": layers[0].relative,
                "smallest_in": layers[0].name,
                "median": statistics.median(layer.relative for layer in layers),
                "largest": layers[-1].relative,
                "largest_in": layers[-1].name,
            }
        papers = {
            "floor_share_of_matrices": self.floor_share,
            "share_on_gradient_factors": sum(row.share for row in self.coverage if row.rule == GRADIENT_FACTORS),
            "dropped_refreshes": int(self.optimizer.param_groups[0]["dropped_refreshes"]),
        }
        return {
            "learning_rate": self.rate,
            "usual_learning_rate": self.usual_rates,
            "gradient_norm": {"median": statistics.median(norms), "largest": max(norms)} if norms else None,
            "max_grad_norm": self.max_grad_norm,
            "share_of_clipped_steps": sum(one > 1 for one in self.clipping) / len(norms) if self.clipping else None,
            "step_relative_to_weights": steps,
            **(papers if self.is_papers else {}),
            "taken_for": roles,
            "skipped_steps": self.skipped,
        }


def _full_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of which a schedule gives a share."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
