"""AdaFisher and AdaFisherW (ICLR 2025, arXiv 2405.16397)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_adafisher.fisher.forms import diagonal_of
from hf_adafisher.fisher.uses import new_state
from hf_adafisher.optimizers.checks import check_checkpoint, check_model, check_options, warn_changed_options
from hf_adafisher.optimizers.checks import momentum_dtype as momentum_dtype_of
from hf_adafisher.optimizers.coverage import ParameterCoverage, coverage_of, curvature_summary
from hf_adafisher.optimizers.curvature import Curvature
from hf_adafisher.optimizers.sharding import local_part
from hf_adafisher.optimizers.update import update_parameter

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class AdaFisher(Optimizer):
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

    _decoupled = False

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
    ) -> None:
        kind = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{kind} needs the model, not only its parameters, because it reads layer inputs and output gradients: "
                f"write {kind}(model, lr=...) or {kind}(model, groups, lr=...), and for a Trainer "
                f"optimizer_cls_and_kwargs=(OptimizerFactory, {{...}}); got {type(model).__name__}"
            )
        check_model(model, kind)
        self.model = model
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    f"{type(model).__name__} has no trainable parameter: set requires_grad=True on what {kind} should "
                    "train"
                )
        self._curvature = Curvature(model)
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "ema_decay": ema_decay,
            "update_interval": update_interval,
            "weight_decay": weight_decay,
            "momentum_dtype": momentum_dtype,
            "decoupled_weight_decay": self._decoupled,
            **dict.fromkeys(("steps", "next_refresh", "refreshes", "dropped_refreshes"), 0),
        }
        super().__init__(params, defaults)
        if not any(p.requires_grad for p in self._params()):
            raise ValueError(
                f"none of the parameters given to {kind} is trainable: set requires_grad=True on some of them"
            )
        self._curvature.track(self._params())
        self._curvature.arm(self.refresh_due)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Refresh the factors if this step is due, then update every parameter that has a gradient.

        Args:
            closure: Optionally, a function that evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: After :meth:`close`, or for a sparse gradient.
        """
        self._curvature.open_recorder()  # raises after close(), before the closure does any work
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self.refresh_due:
                self._refresh()
            for group, p, grad in self._with_gradient():
                self._update(group, p, grad)
            for group in self.param_groups:
                group["steps"] += 1
        self._curvature.arm(self.refresh_due)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        state = self._state_of(group, p)
        state["step"] += 1
        update_parameter(
            local_part(p),
            local_part(grad),
            local_part(state["exp_avg"]),
            self._curvature.local_terms(p, state, grad),
            step=int(state["step"].item()),
            lr=float(group["lr"]),
            beta=group["beta"],
            damping=group["damping"],
            weight_decay=group["weight_decay"],
            decoupled=self._decoupled,
        )

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and gradient of every parameter that has one."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError(
                            f"{self._curvature.name_of(p)} has a sparse gradient: build its Embedding with sparse=False"
                        )
                    yield group, p, p.grad

    def _state_of(self, group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The parameter's state, created at its first gradient: wrappers (FSDP2) replace parameters before that."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            dtype = momentum_dtype_of(group, p.dtype)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state.update(new_state(self._curvature.uses_of(p), p))
        return state

    @property
    def refresh_due(self) -> bool:
        """Whether the next ``step()`` refreshes the factors, so that the backward passes before it are recorded.

        Hooks cannot run inside compiled graphs. With ``torch.compile``, run the forward and backward of such a step
        under ``torch.compiler.set_stance("force_eager")``; AdaFisherTrainer does so by itself.
        """
        first = self.param_groups[0]
        return first["steps"] >= first["next_refresh"]

    @property
    def gradient_scale(self) -> float:
        """What the loss of the coming backward passes is multiplied by, beside what the model's loss does. Default 1.

        Normalised factors do not depend on it; their average over refreshes does, where it changes from one to the
        next. AdaFisherTrainer sets it on every step that is due, so that factors are those of each position's own loss.
        In your own loop with loss scaling, set it to ``scaler.get_scale()`` before the backward. The averaging of
        gradients over processes is taken into account by itself.

        Raises:
            ValueError: On setting a value that is not finite and > 0.
            RuntimeError: After :meth:`close`.
        """
        return self._curvature.open_recorder().gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"gradient_scale must be finite and > 0, got {value}")
        self._curvature.open_recorder().gradient_scale = float(value)

    def _refresh(self) -> None:
        """Update the averages with what was recorded, unless something of it is not finite: then it stays due."""
        updates = self._curvature.collect(self._with_gradient(), self._state_of)
        if updates is None:
            for group in self.param_groups:
                group["dropped_refreshes"] += 1
            return
        for update in updates:
            update.apply(self._state_of(update.group, update.param), self._curvature.uses_of(update.param))
        if updates:
            self._curvature.forget()
            for group in self.param_groups:
                group["refreshes"] += 1
                # The next multiple of the interval: a late refresh does not shift those after it.
                group["next_refresh"] = (group["steps"] // group["update_interval"] + 1) * group["update_interval"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the statistics of the backward passes that made them."""
        super().zero_grad(set_to_none)
        if self._curvature.recorder is not None:
            self._curvature.recorder.forget_pending()

    def discard_statistics(self) -> None:
        """Forget statistics recorded since the last step.

        For loops that skip a step after a backward and reset the gradients with ``model.zero_grad()``;
        ``optimizer.zero_grad()`` does it by itself.
        """
        self._curvature.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as for every torch optimizer; options it lacks take the defaults.

        Call it after ``step()``: statistics recorded since the last step are forgotten.

        Raises:
            ValueError: An option is outside its range, a parameter is not the model's, or ``update_interval`` differs
                from that of the other groups (the hooks serve all of them at once).
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group, self.param_groups[0], type(self).__name__)
            if group["momentum_dtype"] is not None:  # as a word, which every kind of checkpoint can hold
                group["momentum_dtype"] = str(momentum_dtype_of(group)).removeprefix("torch.")
            self._curvature.map_parameters()  # the model may have grown since
            for p in group["params"]:
                if id(p) not in self._curvature.names:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} does not belong to the model "
                        f"({type(self.model).__name__}): build the optimizer on the module that holds every parameter "
                        "it should train"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        group["steps"], group["next_refresh"] = (self.param_groups[0][key] for key in ("steps", "next_refresh"))
        if self._curvature.recorder is not None:  # None while the constructor adds its groups
            self._curvature.track(self._params())
            self._curvature.arm(self.refresh_due)

    def _params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the given dictionary is neither changed nor shared.

        As for every torch optimizer, the options of the saved groups replace those of the constructor; one warning
        names those of AdaFisher's options that differ. Statistics come back in the dtype in which they were saved;
        torch's rule would cast them to the parameter's.

        Raises:
            ValueError: The checkpoint is another optimizer's, or another model's.
        """
        check_checkpoint(self, state_dict)
        warn_changed_options(self, state_dict)
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        members = [(group, p) for group in self.param_groups for p in group["params"]]
        for saved_id, (group, p) in zip(saved_ids, members, strict=True):
            group.setdefault("momentum_dtype", None)
            for key, value in state_dict["state"].get(saved_id, {}).items():
                # Momentum has the dtype that its group names; statistics keep their own.
                # 0-dimensional entries (step, weight of the average) stay on the CPU: they are read as numbers.
                dtype = momentum_dtype_of(group, p.dtype) if key == "exp_avg" else value.dtype
                device = torch.device("cpu") if value.dim() == 0 else p.device
                self.state[p][key] = value.detach().clone().to(device, dtype)
        self._curvature.forget()
        self._curvature.discard()
        self._curvature.arm(self.refresh_due)

    def close(self) -> None:
        """Remove every hook from the model; what the optimizer knows stays readable, but it makes no more steps."""
        if self._curvature.recorder is not None:
            self._curvature.recorder.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, since its hooks belong to one model: save "
            "state_dict(), and load it into a new optimizer built on the copy of the model"
        )

    def __enter__(self) -> AdaFisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, as AdamW is to Adam.

    ``theta <- theta - lr (m^ / F + weight_decay * theta)``, and the gradient alone enters ``m``. Arguments, defaults
    and errors are those of :class:`AdaFisher`. This is the form for transformers.
    """

    _decoupled = True
