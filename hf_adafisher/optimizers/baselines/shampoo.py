"""Shampoo (Gupta et al. 2018, arXiv 1802.09568) for weights of moderate size, with AdamW for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import Shampoo as FullShampoo
from torch.optim import AdamW, Optimizer

_SAFE_EPS = 1e-4


class Shampoo(Optimizer):
    """Shampoo of pytorch_optimizer for groups with ``use_shampoo=True``, torch's AdamW for the others.

    Shampoo keeps a full matrix for each side of a weight and decomposes it at every step, which is too expensive along
    a vocabulary. So embeddings and weights with long sides belong into groups with ``use_shampoo=False``, whose
    learning rate is ``adamw_lr``. Weight decay is added to the gradient in Shampoo's groups unless ``weight_decouple``
    is set, and always decoupled in AdamW's.

    Args:
        params: Parameter groups, each with ``use_shampoo``.
        lr: Learning rate of Shampoo's groups. Default 1e-3.
        momentum: Momentum of the preconditioned gradient, as in the library. Default 0.
        matrix_eps: Initial diagonal of the matrices. Default 1e-6.
        preconditioning_compute_steps: Steps between two decompositions; before the first one, at this step, nothing is
            updated. Default 1. More than 1 needs ``matrix_eps >= 1e-4``, since directions first seen between two
            decompositions are otherwise multiplied by up to 1000.
        weight_decay: Weight decay of groups that set none. Default 0.
        weight_decouple: Decouple the weight decay in Shampoo's groups. Default False.
        fixed_decay: With ``weight_decouple``, do not scale the decay of Shampoo's groups by the learning rate. Default
            False.
        maximize: Maximize the objective instead of minimizing it. Default False.
        adamw_lr: Learning rate of AdamW's groups. Default 1e-3.
        adamw_betas: Decay rates of AdamW's moments. Default (0.9, 0.999).
        adamw_eps: Epsilon in AdamW's denominator. Default 1e-8.
        fused: Use AdamW's fused kernel. Default False.

    Raises:
        ValueError: An option is outside its range, or a group lacks ``use_shampoo``.
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
        shampoo = FullShampoo(
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
        self._optimizers: dict[bool, Optimizer] = {True: shampoo, False: adamw}
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group with the defaults of the optimizer that its ``use_shampoo`` selects.

        Args:
            param_group: The group; ``use_shampoo`` is required.

        Raises:
            ValueError: The group lacks ``use_shampoo``.
        """
        if "use_shampoo" not in param_group:
            raise ValueError("each parameter group of Shampoo needs use_shampoo: True (full matrices) or False (AdamW)")
        for name, value in self._optimizers[bool(param_group["use_shampoo"])].defaults.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of each optimizer on its groups.

        Args:
            closure: Function that evaluates the model again and returns the loss. Default None.

        Returns:
            The loss from ``closure``, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_shampoo, optimizer in self._optimizers.items():
            # Linked anew at every step: loading a checkpoint replaces the groups and the state.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if bool(group["use_shampoo"]) == use_shampoo]
            optimizer.step()
        return loss
