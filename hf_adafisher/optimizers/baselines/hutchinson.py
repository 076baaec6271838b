"""AdaHessian and Sophia: random estimates of the Hessian's diagonal, checked and averaged over processes."""

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
    """What both need beside their library's step.

    The gradients of a step for which ``needs_graph`` is true must come from
    ``loss.backward(create_graph=True)``; AdaFisherTrainer sees to it. In your own loop:

        >>> loss.backward(create_graph=optimizer.needs_graph)  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP

    With DistributedDataParallel, whose own averaging does not work on such gradients, run these forward and backward
    passes within ``model.no_sync()`` and call ``average_gradients`` after the last of a step. With several
    micro-batches each of their backward passes needs ``create_graph``: one without it has no part in the estimate.

    A parameter that is first used between two estimates waits for the next one, and a warning says so: without any
    curvature its first steps would be divided by next to nothing.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    update_period: int
    _estimating = True
    _from_others: frozenset[int] = frozenset()
    _warned: frozenset[str] = frozenset()

    @property
    def needs_graph(self) -> bool:
        """Whether the next ``step()`` estimates the Hessian, so that its gradients need their graph."""
        return self.param_groups[0].get("step", 0) % self.update_period == 0

    def step(self, closure: Callable[[], float] | None = None, hessian: list[Tensor] | None = None) -> Any:
        """The library's step; afterwards the gradients let go of their graph, which would keep the model's activations.

        Args:
            closure: Optionally, a function that evaluates the model again and returns the loss.
            hessian: Optionally, an estimate of the Hessian's diagonal for every parameter, instead of an own one.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: The gradients have no graph, or a layer has no second derivative; the message says what to do.
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
        self._from_others = frozenset()
        return loss

    def _library_step(self, hessian: list[Tensor] | None) -> None:
        super().step(None, hessian=hessian)  # type: ignore[misc]

    def _without_estimate(self) -> list[Tensor]:
        """Parameters with a gradient whose curvature has never been estimated."""
        found = [p for p in self._params() if p.grad is not None and "hessian" not in self.state.get(p, {})]
        self._warn_once(
            "waiting", found, f"wait for the next estimate of the Hessian (every {self.update_period} steps)"
        )
        return found

    def _warn_once(self, what: str, params: list[Tensor], text: str) -> None:
        if params and what not in self._warned:
            self._warned |= {what}
            shapes = ", ".join(str(tuple(p.shape)) for p in params[:3])
            more = f" and {len(params) - 3} more" if len(params) > 3 else ""
            logger.warning("%s: parameters of shape %s%s %s.", type(self).__name__, shapes, more, text)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients over all processes; each keeps the graph of its own, for its share of the Hessian.

        Call it between the last backward of a step and clipping, on every process. Without a process group, nothing
        happens.
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
                self._from_others |= {id(p)}

    @torch.no_grad()
    def compute_hutchinson_hessian(
        self, param_groups: Any, state: Any, num_samples: int = 1, alpha: float = 1.0, distribution: str = "gaussian"
    ) -> None:
        """Adds the mean of ``z * Hz`` over random vectors z, and over processes, to each ``state[p]["hessian"]``.

        Raises:
            RuntimeError: As ``step``.
        """
        grads = [(p, p.grad) for p in self._params() if p.grad is not None]
        used = [p for p, grad in grads if grad.requires_grad]
        if grads and not used:
            raise RuntimeError(
                f"{type(self).__name__} needs second derivatives, but the gradients have no graph: call "
                "loss.backward(create_graph=True), or train with AdaFisherTrainer, which does (a stock Trainer cannot)"
            )
        silent = [p for p, grad in grads if not grad.requires_grad and id(p) not in self._from_others]
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


def _products(params: list[Tensor], vectors: list[Tensor], again: bool) -> tuple[Tensor | None, ...]:
    """The Hessian of the loss, as the gradients' graph has it, times the vectors."""
    grads = [p.grad for p in params]
    try:
        return torch.autograd.grad(grads, params, vectors, retain_graph=again, allow_unused=True)  # type: ignore[arg-type]
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
    """pytorch_optimizer's AdaHessian; see ``Hutchinson`` for what its gradients need.

    With ``update_period`` > 1 the latest estimate enters the average at every step, as in the authors' code. (The
    library averages at estimates only, but corrects the bias by steps, so that steps grow with the period.)
    """

    def _library_step(self, hessian: list[Tensor] | None) -> None:
        period, self.update_period = self.update_period, 1
        try:
            super()._library_step(hessian)
        finally:
            self.update_period = period

    def zero_hessian(self, param_groups: Any, state: Any, pre_zero: bool = True) -> None:  # type: ignore[override]
        """Make room for an estimate; on the other steps, keep the latest."""
        super().zero_hessian(param_groups, state, pre_zero and self._estimating)

    def compute_hutchinson_hessian(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """A new estimate on the steps that make one."""
        if self._estimating:
            super().compute_hutchinson_hessian(*args, **kwargs)


class Sophia(Hutchinson, pytorch_optimizer.SophiaH):
    """pytorch_optimizer's SophiaH; see ``Hutchinson`` for what its gradients need."""
