"""AdaHessian and Sophia with Hutchinson estimates of the Hessian's diagonal, averaged over processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor

from hf_adafisher.fisher.reduce import num_ranks, sum_over_ranks

logger = logging.getLogger(__name__)

_MISSING = ("derivative for aten::_", "is not implemented")


class Hutchinson:
    """Mixin for optimizers of pytorch_optimizer that estimate the Hessian's diagonal.

    If ``needs_graph`` is true, the gradients of the next step must come from ``loss.backward(create_graph=True)``.
    AdaFisherTrainer does so. In your own loop:

        >>> loss.backward(create_graph=optimizer.needs_graph)  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP

    DistributedDataParallel cannot average such gradients. Run these forward and backward passes within
    ``model.no_sync()``, and call ``average_gradients`` after the last one of a step. With several micro-batches, each
    backward pass needs ``create_graph``; one without it does not contribute to the estimate.

    A parameter that is first used between two estimates is not updated before the next one, with a warning. Without
    curvature, its first steps would be divided by almost zero.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    update_period: int
    _estimating = True
    _remote_only: frozenset[int] = frozenset()
    _warned: frozenset[str] = frozenset()

    @property
    def needs_graph(self) -> bool:
        """True if the next ``step()`` estimates the Hessian, so that its gradients need their graph."""
        return self.param_groups[0].get("step", 0) % self.update_period == 0

    def step(self, closure: Callable[[], float] | None = None, hessian: list[Tensor] | None = None) -> Any:
        """Take the library's step, then detach the gradients from their graph, which holds the activations.

        Args:
            closure: Function that evaluates the model again and returns the loss. Default None.
            hessian: Estimate of the Hessian's diagonal for every parameter, to use instead of a new one. Default None.

        Returns:
            The loss from ``closure``, else None.

        Raises:
            RuntimeError: The gradients have no graph, or a layer has no second derivative.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._estimating = hessian is None and self.needs_graph
        waiting = [] if hessian is not None or self._estimating else self._without_estimate()
        held = [(p, p.grad) for p in waiting]
        for p in waiting:
            p.grad = None
        self._library_step(hessian)
        for p, grad in held:
            p.grad = grad
        for p in self._params():
            if p.grad is not None and p.grad.requires_grad:
                p.grad = p.grad.detach()
        self._remote_only = frozenset()
        return loss

    def _library_step(self, hessian: list[Tensor] | None) -> None:
        super().step(None, hessian=hessian)  # type: ignore[misc]

    def _without_estimate(self) -> list[Tensor]:
        """Parameters with a gradient and no estimate of their curvature yet."""
        waiting = [p for p in self._params() if p.grad is not None and "hessian" not in self.state.get(p, {})]
        self._warn_once(
            "waiting", waiting, f"wait for the next estimate of the Hessian (every {self.update_period} steps)"
        )
        return waiting

    def _warn_once(self, topic: str, params: list[Tensor], text: str) -> None:
        if params and topic not in self._warned:
            self._warned |= {topic}
            shapes = ", ".join(str(tuple(p.shape)) for p in params[:3])
            more = f" and {len(params) - 3} more" if len(params) > 3 else ""
            logger.warning("%s: parameters of shape %s%s %s.", type(self).__name__, shapes, more, text)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients over all processes; each process keeps the graph of its own gradients.

        Call it on every process, after the last backward of a step and before clipping. Without a process group it does
        nothing.
        """
        if num_ranks() == 1:
            return
        params = self._params()
        flags = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params]
        buffer = sum_over_ranks(torch.cat([flags.to(parts[0].dtype), *parts])) / num_ranks()
        for p, flag, part in zip(params, buffer, _unflatten(buffer[len(params) :], params), strict=False):
            if p.grad is not None:
                p.grad.copy_(part)
            elif flag > 0:  # used by another process only
                p.grad = part.clone()
                self._remote_only |= {id(p)}

    @torch.no_grad()
    def compute_hutchinson_hessian(
        self, param_groups: Any, state: Any, num_samples: int = 1, alpha: float = 1.0, distribution: str = "gaussian"
    ) -> None:
        """Add the mean of ``z * Hz`` over random vectors z and over processes to each ``state[p]["hessian"]``.

        Args:
            param_groups: Not used; the optimizer's own groups are.
            state: State by parameter.
            num_samples: Number of random vectors. Default 1.
            alpha: Factor of the estimate. Default 1.
            distribution: "gaussian" or "rademacher". Default "gaussian".

        Raises:
            RuntimeError: The gradients have no graph, or a layer has no second derivative.
        """
        grads = [(p, p.grad) for p in self._params() if p.grad is not None]
        used = [p for p, grad in grads if grad.requires_grad]
        if grads and not used:
            raise RuntimeError(
                f"{type(self).__name__} needs second derivatives, but the gradients have no graph: call "
                "loss.backward(create_graph=True), or train with AdaFisherTrainer, which does (a stock Trainer cannot)"
            )
        silent = [p for p, grad in grads if not grad.requires_grad and id(p) not in self._remote_only]
        self._warn_once(
            "silent",
            silent,
            "have gradients without a graph, which count as a Hessian of zero; right only where the loss is linear in "
            "them. Otherwise use activation checkpointing with use_reentrant=False",
        )
        for sample in range(num_samples if used else 0):
            vectors = [_random(p, distribution) for p in used]
            for p, z, product in zip(used, vectors, _products(used, vectors, sample + 1 < num_samples), strict=True):
                if product is not None:  # else nothing that was differentiated depends on it
                    state[p]["hessian"].addcmul_(product, z, value=alpha / num_samples)
        if num_ranks() > 1:
            known = [p for p in self._params() if p.requires_grad]
            estimates = [state.get(p, {}).get("hessian") for p in known]
            parts = [torch.zeros_like(p) if h is None else h for p, h in zip(known, estimates, strict=True)]
            buffer = sum_over_ranks(torch.cat([part.flatten() for part in parts])) / num_ranks()
            for estimate, part in zip(estimates, _unflatten(buffer, known), strict=True):
                if estimate is not None:
                    estimate.copy_(part)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _random(p: Tensor, distribution: str) -> Tensor:
    if distribution == "rademacher":
        return torch.randint_like(p, 0, 2).mul_(2.0).sub_(1.0)
    return torch.randn_like(p)


def _products(params: list[Tensor], vectors: list[Tensor], retain_graph: bool) -> tuple[Tensor | None, ...]:
    """Products of the Hessian with the vectors, by differentiating the gradients' graph."""
    grads = [p.grad for p in params]
    try:
        return torch.autograd.grad(grads, params, vectors, retain_graph=retain_graph, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        if all(part in str(error) for part in _MISSING):
            raise RuntimeError(
                f"a layer of the model has no second derivative ({error}): use attn_implementation='eager', or "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the model's forward"
            ) from error
        if "use_reentrant" in str(error):
            raise RuntimeError(
                "reentrant activation checkpointing has no second derivatives: set use_reentrant=False in its call"
            ) from error
        raise


def _unflatten(buffer: Tensor, params: list[Tensor]) -> Iterator[Tensor]:
    for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
        yield part.view_as(p)


class AdaHessian(Hutchinson, pytorch_optimizer.AdaHessian):
    """AdaHessian of pytorch_optimizer (Yao et al. 2021, arXiv 2006.00719); see ``Hutchinson`` for its gradients.

    With ``update_period`` > 1 the latest estimate enters the average at every step, as in the authors' code. The
    library averages at estimates only, but corrects the bias by steps, so its steps grow with the period.
    """

    def _library_step(self, hessian: list[Tensor] | None) -> None:
        period, self.update_period = self.update_period, 1
        try:
            super()._library_step(hessian)
        finally:
            self.update_period = period

    def zero_hessian(self, param_groups: Any, state: Any, pre_zero: bool = True) -> None:  # type: ignore[override]
        """Reset the estimates before a new one; keep the latest on the other steps."""
        super().zero_hessian(param_groups, state, pre_zero and self._estimating)

    def compute_hutchinson_hessian(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Estimate the Hessian's diagonal, on the steps that do so."""
        if self._estimating:
            super().compute_hutchinson_hessian(*args, **kwargs)


class Sophia(Hutchinson, pytorch_optimizer.SophiaH):
    """SophiaH of pytorch_optimizer (Liu et al. 2023, arXiv 2305.14342); see ``Hutchinson`` for its gradients."""
