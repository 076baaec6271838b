"""Shampoo whose full matrices are kept to weights of a moderate size; the rest takes AdamW's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import Shampoo as FullShampoo
from torch.optim import AdamW, Optimizer

_SAFE_EPS = 1e-4


class Shampoo(Optimizer):
    """pytorch_optimizer's Shampoo for the groups with ``use_shampoo=True``, torch's AdamW for the others.

    Shampoo keeps, and decomposes at every step, a full matrix for each side of a weight. Along a vocabulary that is
    neither affordable nor useful, so embeddings and large sides belong to groups with ``use_shampoo=False``, whose
    learning rate is ``adamw_lr``. One ``weight_decay`` acts in two ways: in Shampoo's groups it is added to the
    gradient (unless ``weight_decouple``), in AdamW's it is always decoupled.

    Args:
        params: Parameter groups, each with ``use_shampoo``.
        lr: Learning rate of Shampoo's groups.
        momentum: Of the preconditioned gradient, as the library has it. Default 0.
        matrix_eps: Initial diagonal of the matrices.
        preconditioning_compute_steps: Steps between two decompositions; none is made, and nothing moves, before the
            first of these steps. More than one needs ``matrix_eps >= 1e-4``: directions first seen between two
            decompositions are otherwise multiplied by up to 1000.
        weight_decay: For groups that name none.
        weight_decouple: In Shampoo's groups, decay the weights themselves instead of adding the decay to the gradient.
        fixed_decay: With ``weight_decouple``, in Shampoo's groups: decay that is not scaled by the learning rate.
        maximize: Maximize the objective instead of minimizing it.
        adamw_lr: Learning rate of AdamW's groups.
        adamw_betas: Decay rates of their moments.
        adamw_eps: Added to their denominator.
        fused: Whether AdamW uses its fused kernel.

    Raises:
        ValueError: An option is out of its range, or a group lacks ``use_shampoo``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        matrix_eps: float = 1e-6,
        preconditioning_compute_steps: int = 1,
        weight_decay: float = 0.0,
        weight_decouple: bool = False,
        fixed_decay: bool = False,
        maximize: bool = False,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        if preconditioning_compute_steps > 1 and matrix_eps < _SAFE_EPS:
            raise ValueError(
                f"preconditioning_compute_steps={preconditioning_compute_steps} needs matrix_eps >= {_SAFE_EPS}, got "
                f"{matrix_eps}: directions that are new since the last decomposition would be multiplied by up to "
                f"{matrix_eps**-0.5:.0f}"
            )
        full = FullShampoo(
            [{"params": []}],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decouple=weight_decouple,
            fixed_decay=fixed_decay,
            preconditioning_compute_steps=preconditioning_compute_steps,
            matrix_eps=matrix_eps,
            maximize=maximize,
        )
        adamw = AdamW(
            [{"params": []}],
            lr=adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
        )
        self._parts: dict[bool, Optimizer] = {True: full, False: adamw}
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it lacks take the defaults of the optimizer that its ``use_shampoo`` names.

        Raises:
            ValueError: It does not say ``use_shampoo``.
        """
        if "use_shampoo" not in param_group:
            raise ValueError("each parameter group of Shampoo needs use_shampoo: True (full matrices) or False (AdamW)")
        for name, value in self._parts[bool(param_group["use_shampoo"])].defaults.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of either optimizer on its own groups.

        Args:
            closure: Optionally, a function that evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for full, part in self._parts.items():
            # Linked anew at every step: loading a checkpoint replaces the groups and the state.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if bool(group["use_shampoo"]) == full]
            part.step()
        return loss
