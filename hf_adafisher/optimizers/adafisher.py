"""AdaFisher and AdaFisherW (ICLR 2025, arXiv 2405.16397)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.forms import Term, diagonal_of
from hf_adafisher.fisher.uses import new_state
from hf_adafisher.optimizers.checks import ADAFISHER_KEYS, check_options
from hf_adafisher.optimizers.checks import momentum_dtype as momentum_dtype_of
from hf_adafisher.optimizers.compiled import CompiledUpdate, whole
from hf_adafisher.optimizers.coverage import ParameterCoverage, coverage_of, curvature_summary
from hf_adafisher.optimizers.curvature import Curvature
from hf_adafisher.optimizers.layout import Parts
from hf_adafisher.optimizers.recording import ParamsT, RecordingOptimizer
from hf_adafisher.optimizers.sharding import is_sharded, local_part
from hf_adafisher.optimizers.update import Scratch, Vectors, cut, update_parameter, update_parts


class AdaFisher(RecordingOptimizer):
    """Momentum divided by a damped diagonal Kronecker Fisher, with L2 regularisation in the gradient.

    For a layer with inputs ``x`` and output gradients ``g`` the factors ``h = mean(x^2)`` and ``s = mean(g^2)`` over
    all positions are averaged over time every ``update_interval`` steps, and each weight is updated by

        ``F = minmax(S) (x) minmax(H) + damping``        (Eq. 4; vectors are normalised to [0, 1])
        ``m <- beta m + (1 - beta) (grad + weight_decay * theta)``
        ``theta <- theta - lr * m / (1 - beta^t) / F``

    ``F`` is never stored: the state is one tensor of the parameter's size (``exp_avg``) and a few vectors.
    A parameter that no layer rule reaches takes its factors from its own gradient (row and column means of grad^2).

    Because F lies in [damping, 1 + damping], ``lr`` and ``damping`` belong together: the largest step is
    ``lr / damping * m``. The defaults are the paper's; for training language models from scratch,
    ``lr`` and ``damping`` of :class:`hf_adafisher.AdaFisherTrainingArguments` are a better start.

    Args:
        model: The module to train. Forward hooks are put on its layers for the steps that refresh the factors.
        params: Parameters, named parameters or parameter groups, as for every torch optimizer; each must belong to
            ``model``. Default: all trainable parameters. Groups may set every option below but ``update_interval``.
        lr: Learning rate alpha, >= 0. Default 1e-3.
        beta: Decay of the first moment, in [0, 1). Default 0.9.
        damping: lambda, > 0. Default 1e-3.
        ema_decay: Decay gamma of the factors' moving average, in [0, 1). Default 0.8.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 100.
        weight_decay: kappa, >= 0. Default 0.
        momentum_dtype: Dtype of the first moment, as a torch dtype or its name. Default None: the parameter's own;
            ``"float32"`` is worth its memory where the weights are bfloat16. Factors are float32 in any case.
        compiled: Update large parameters with kernels made by ``torch.compile``: faster steps, after some seconds of
            compiling in the first one. Default False. Where no compiler works, one warning says so, and the update is
            the same as without; so it is for parameters that FSDP2 has sharded.

    Raises:
        TypeError: ``model`` is not a module (``AdaFisherW(model.parameters())``).
        ValueError: An option is outside its range, a parameter does not belong to the model, nothing is trainable, or
            the model is wrapped or split in a way that hides layers or parameters (DataParallel, FSDP1, DeepSpeed,
            tensor, context or pipeline parallelism).

    Example:
        >>> import torch
        >>> from hf_adafisher import AdaFisherW
        >>> model = torch.nn.Linear(4, 2)
        >>> with AdaFisherW(model, lr=1e-3) as optimizer:
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
    """

    checkpoint_keys = ADAFISHER_KEYS
    compared_on_load = ("beta", "damping", "ema_decay", "update_interval", "weight_decay", "momentum_dtype")
    decoupled: ClassVar[bool | None] = False
    momentum_key = "exp_avg"
    _curvature: Curvature

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = 1e-3,  # alpha
        beta: float = 0.9,
        damping: float = 1e-3,  # lambda
        ema_decay: float = 0.8,  # gamma
        update_interval: int = 100,  # T_cov
        weight_decay: float = 0.0,  # kappa
        momentum_dtype: torch.dtype | str | None = None,
        compiled: bool = False,
    ) -> None:
        if not isinstance(compiled, bool):
            raise ValueError(f"compiled must be True or False, got {compiled!r}")
        self._compiled = CompiledUpdate() if compiled else None
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "ema_decay": ema_decay,
            "update_interval": update_interval,
            "weight_decay": weight_decay,
            "momentum_dtype": momentum_dtype,
            "decoupled_weight_decay": self.decoupled,
        }
        super().__init__(model, params, defaults)

    def close(self) -> None:
        """Remove every hook from the model; what the optimizer knows stays readable, but it makes no more steps."""
        super().close()
        self._curvature.parts.clear()

    def _new_tracker(self) -> Curvature:
        return Curvature(self.model)

    def _check_group(self, group: dict[str, Any], first: dict[str, Any]) -> None:
        check_options(group, first, type(self).__name__)
        if group["momentum_dtype"] is not None:  # as a word, which every kind of checkpoint can hold
            group["momentum_dtype"] = str(momentum_dtype_of(group)).removeprefix("torch.")

    def _take_statistics(self) -> bool | None:
        updates = self._curvature.collect(self._with_gradient(), self._state_of)
        if updates is None:
            return None
        for update in updates:
            update.apply(self._state_of(update.group, update.param), self._curvature.uses_of(update.param))
        if updates:
            self._curvature.forget()
        return bool(updates)

    def _update_parameters(self) -> None:
        scratch = Scratch()
        vectors: dict[tuple[int, int], Vectors] = {}
        members = [(group, p, grad, self._state_of(group, p)) for group, p, grad in self._with_gradient()]
        if members:
            torch._foreach_add_([state["step"] for *_, state in members], 1.0)
        for group, p, grad, state in members:
            step, terms = int(state["step"].item()), self._curvature.local_terms(p, state, grad)
            alike = vectors.get((id(group), step))
            if alike is None:
                alike = vectors[id(group), step] = Vectors(self._numbers(group, step))
            tensors = (p, grad, state["exp_avg"])
            if is_sharded(p):
                local = (local_part(p), local_part(grad), local_part(state["exp_avg"]))
                update_parameter(*local, terms, **alike.numbers, scratch=scratch)
            elif not alike.take(*tensors, terms):  # vectors are updated below, with their like
                if self._compiled is not None and self._compiled.takes(p):
                    if self._compiled(self._parts_of(*tensors, terms, whole), grad, alike.numbers):
                        continue
                    self._curvature.parts.clear()  # no compiler works: from now on everything is eager
                update_parts(self._parts_of(*tensors, terms, cut), grad, alike.numbers, scratch)
        for alike in vectors.values():
            alike.update_()

    def _parts_of(
        self, p: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[Term], make: Callable[..., Parts]
    ) -> Parts:
        """The parameter as its update takes it, kept for the next steps where that is safe."""
        kept = self._curvature.parts
        parts = kept.get(id(p))
        if parts is None or not parts.fits(p, grad, exp_avg, terms):
            parts = make(p, grad, exp_avg, terms)
            kept.pop(id(p), None)
            if parts.lasting:
                kept[id(p)] = parts
        return parts

    def _numbers(self, group: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {
            "step": step,
            "lr": float(group["lr"]),
            "beta": group["beta"],
            "damping": group["damping"],
            "weight_decay": group["weight_decay"],
            "decoupled": bool(self.decoupled),
        }

    def _state_of(self, group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The parameter's state, created at its first gradient: wrappers (FSDP2) replace parameters before that."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            dtype = momentum_dtype_of(group, p.dtype)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state.update(new_state(self._curvature.uses_of(p), p))
        return state

    def _track(self) -> None:
        """Follow the model and the groups as they are now, also in the states that exist."""
        super()._track()
        for p in self._params():
            state = self.state.get(p)
            if state:
                fresh = new_state(self._curvature.uses_of(p), p)
                known = {key: value for key, value in state.items() if key not in ("step", self.momentum_key)}
                if not known.keys() <= fresh.keys():  # another rule reaches it now: its factors mean something else
                    for key in known:
                        del state[key]
                for key, value in fresh.items():
                    state.setdefault(key, value)

    def state_shapes(self, p: Any) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of a parameter's state; they depend on the model alone."""
        factors = new_state(self._curvature.uses_of(p), p)
        return {"step": (), "exp_avg": tuple(p.shape)} | {k: tuple(v.shape) for k, v in factors.items()}

    def _restored_dtype(self, group: Any, p: Tensor, key: str, saved: torch.dtype) -> Any:
        """Momentum has the dtype that its group names; statistics keep their own."""
        return momentum_dtype_of(group, p.dtype) if key == self.momentum_key else saved

    @torch.no_grad()
    def fisher_diagonal(self, param: Tensor, *, normalized: bool = True) -> Tensor:
        """The damped diagonal F by which the last step divided this parameter's momentum (Eq. 4).

        Args:
            param: A parameter that this optimizer trains.
            normalized: False gives the Kronecker products of the averaged factors instead, neither normalised nor
                damped: an estimate of the Fisher's diagonal, exact for a batch of one position in layers that do not
                rescale their output.

        Returns:
            Tensor in the parameter's shape, float32 (float64 for a float64 parameter); whole, also where FSDP2 has
            sharded the parameter.

        Raises:
            ValueError: The parameter is not trained by this optimizer.
            RuntimeError: There are no statistics yet, since it had no gradient in any step so far.
        """
        group = next((g for g in self.param_groups if any(q is param for q in g["params"])), None)
        name = self._curvature.name_of(param)
        if group is None:
            raise ValueError(f"{name} is not trained by this optimizer: it is in none of its parameter groups")
        state = self.state.get(param)
        terms = self._curvature.known_terms(param, state, normalized) if state else []
        if not terms:
            raise RuntimeError(f"no curvature of {name} is known yet: call step() after a backward first")
        return diagonal_of(terms, param, group["damping"] if normalized else 0.0)

    def coverage(self) -> list[ParameterCoverage]:
        """For every trainable parameter: its rule or ``"gradient factors"``, its modules, its share of all values."""
        return coverage_of(self)

    def curvature_summary(self) -> dict[str, float]:
        """A few numbers about the curvature in use, for logs.

        See :func:`hf_adafisher.optimizers.coverage.curvature_summary`.
        """
        return curvature_summary(self)


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, as AdamW is to Adam.

    ``theta <- theta - lr (m^ / F + weight_decay * theta)``, and the gradient alone enters ``m``. Arguments, defaults
    and errors are those of :class:`AdaFisher`. This is the form for transformers.
    """

    decoupled = True
