"""Base of the optimizers that look at the model: AdaFisher and K-FAC with hooks, SpectralAdaFisher without."""

from __future__ import annotations

import contextlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.base.options import OptimizerOptions
from hf_adafisher.optimizers.base.tracker import StatisticsTracker
from hf_adafisher.optimizers.validation.checkpoints import (
    check_fixed_options,
    check_kind,
    check_shapes,
    warn_changed_options,
)
from hf_adafisher.optimizers.validation.models import check_model, check_parameters
from hf_adafisher.optimizers.validation.option_values import check_keywords
from hf_adafisher.optimizers.validation.training_modes import Needs

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

CLOSED = "this optimizer was closed: build a new one to train on"

COUNTERS = ("steps", "next_refresh", "refreshes", "dropped_refreshes")
"""Counters that every parameter group carries, so that they travel with a checkpoint."""


class HookedOptimizer(Optimizer, ABC):
    """A torch optimizer that reads layer inputs and output gradients with hooks on the steps that are due, or none.

    Subclasses say what is recorded (``_new_tracker``), what becomes of it (``_take_statistics``) and how
    parameters move (``_update_parameters``). Everything a training loop deals with is here: when a step is due,
    the scale of the loss, statistics to be forgotten, checkpoints, closing.

    Tensors live in ``state[param]``, created at the parameter's first gradient, since wrappers replace parameters
    before that; options and counters live in ``param_groups``. Nothing else needs to be saved.

    Args:
        model: The module to train.
        params: Parameters, named parameters or parameter groups. Default: all trainable parameters.
        options: The options; those of a group are its defaults.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An option is outside its range, a parameter does not belong to the model, nothing is trainable, or
            the model is wrapped or split in a way that hides layers or parameters.
    """

    options_class: ClassVar[type[OptimizerOptions]]
    """The optimizer's options: ranges, defaults, and what a checkpoint may change."""
    decoupled: ClassVar[bool | None] = None
    """The value of the group option ``decoupled_weight_decay``; None where there is no such option."""
    momentum_key: ClassVar[str]
    """State key of the tensor that has the parameter's shape."""

    _statistics: StatisticsTracker
    _closed = _armed = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the object that ``__init__`` fills. Raises TypeError for a keyword that the class does not have."""
        check_keywords(cls, kwargs)
        return super().__new__(cls)

    def __init__(self, model: nn.Module, params: ParamsT | None, options: OptimizerOptions) -> None:
        kind = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{kind} needs the model, not only its parameters, because it looks at what each of them does there: "
                f"write {kind}(model, lr=...) or {kind}(model, groups, lr=...), and for a Trainer "
                f"optimizer_cls_and_kwargs=(OptimizerFactory, {{...}}); got {type(model).__name__}"
            )
        self.needs = options.needs
        check_model(model, kind, self.needs)
        self.model = model
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    f"{type(model).__name__} has no trainable parameter: set requires_grad=True on what {kind} should "
                    "train"
                )
        self._statistics = self._new_tracker()
        decoupled = {} if self.decoupled is None else {"decoupled_weight_decay": self.decoupled}
        super().__init__(params, {**options.group_options(), **decoupled, **dict.fromkeys(COUNTERS, 0)})
        if not any(p.requires_grad for p in self._params()):
            raise ValueError(
                f"none of the parameters given to {kind} is trainable: set requires_grad=True on some of them"
            )
        self._track()

    @abstractmethod
    def _new_tracker(self) -> StatisticsTracker:
        """The bookkeeping of ``self.model``, tracking nothing yet."""

    @abstractmethod
    def _take_statistics(self, newcomers: bool = False) -> bool | None:
        """Update the averages with what was recorded since the last step.

        Args:
            newcomers: Whether no refresh is due, and only parameters without statistics get any.

        Returns:
            Whether there was anything to learn from; None if it was dropped for not being finite.
        """

    @abstractmethod
    def _update_parameters(self) -> None:
        """Move every parameter that has a gradient."""

    @abstractmethod
    def state_shapes(self, p: Any) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of a parameter's state; they depend on the model and the options alone."""

    def _restored_dtype(self, group: Mapping[str, Any], p: Tensor, key: str, saved: torch.dtype) -> torch.dtype:
        """The dtype of a restored state tensor. Statistics keep their own; torch casts all to the parameter's."""
        return p.dtype if key == self.momentum_key else saved

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Refresh the factors if this step is due, then update every parameter that has a gradient.

        Args:
            closure: Optionally, a function that evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: After ``close``, or for a sparse gradient.
        """
        if self._closed:  # before the closure does any work
            raise RuntimeError(CLOSED)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self.refresh_due:
                self._refresh()
            elif self._newcomers:
                self._welcome_newcomers()
            self._update_parameters()
            for group in self.param_groups:
                group["steps"] += 1
        if self._armed or self.refresh_due:
            self._arm()
        return loss

    def _arm(self) -> None:
        """Put the hooks on for a step that is due, and off for any other, but for layers without statistics."""
        self._armed = self.refresh_due
        if self._armed:
            self._newcomers: frozenset[int] = frozenset()
            self._statistics.recorder.arm()
        else:
            self._newcomers = frozenset(self._statistics.without_statistics(self.state))
            self._statistics.recorder.disarm(self._newcomers)

    def _welcome_newcomers(self) -> None:
        """Take the first statistics of layers that train for the first time between two refreshes.

        A layer could otherwise be active in all steps but those that are due, and never have any. All processes see
        the same parameters with gradients, and so they come here together.
        """
        if any(id(p) in self._newcomers for _, p, _ in self._with_gradient()):
            self._take_statistics(newcomers=True)
            self._arm()
        else:
            self._statistics.recorder.discard()

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and gradient of every parameter that has one."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError(
                            f"{self._statistics.name_of(p)} has a sparse gradient: build it with sparse=False"
                        )
                    yield group, p, p.grad

    @property
    def refresh_due(self) -> bool:
        """Due-ness of the next ``step()``: it refreshes the factors, and the backward passes before it are recorded."""
        first = self.param_groups[0]
        return bool(first["steps"] >= first["next_refresh"])

    @property
    def recording(self) -> bool:
        """True while hooks are on any layer: ``gradient_scale`` is read in the next backward."""
        return self._statistics.recorder.armed

    @contextlib.contextmanager
    def eager_if_due(self) -> Iterator[None]:
        """Run the forward and backward passes of a step that is due eagerly; a context manager.

        For a loop of your own around a model compiled with ``torch.compile``, whose graphs do not run hooks. Other
        steps run as they are, and without hooks all do. AdaFisherTrainer does it by itself.

        Example:
            >>> import torch
            >>> from hf_adafisher import AdaFisherW
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer, compiled = AdaFisherW(model), torch.compile(model, backend="eager")
            >>> with optimizer.eager_if_due():
            ...     compiled(torch.randn(8, 4)).square().mean().backward()
            >>> _ = optimizer.step()
        """
        records = self.refresh_due and Needs.LAYERS in self.needs
        with self._statistics.eager() if records else contextlib.nullcontext():
            yield

    @property
    def gradient_scale(self) -> float:
        """Factor by which the loss of the coming backward passes is multiplied, beside the model's own. Default 1.

        Factors are taken as if it were 1. AdaFisherTrainer sets it on every step that is due, so that factors are
        those of each position's own loss. In your own loop with loss scaling, set it to ``scaler.get_scale()`` before
        the backward. The averaging of gradients over processes is taken into account by itself.

        Raises:
            ValueError: On setting a value that is not finite and > 0.
            RuntimeError: After ``close``.
        """
        return self._open_recorder().gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"gradient_scale must be finite and > 0, got {value}")
        self._open_recorder().gradient_scale = float(value)

    def _open_recorder(self) -> FactorRecorder:
        if self._closed:
            raise RuntimeError(CLOSED)
        return self._statistics.recorder

    def _refresh(self) -> None:
        """Update the averages with what was recorded, unless something of it is not finite: then it stays due."""
        taken = self._take_statistics()
        first = self.param_groups[0]
        interval = first.get("update_interval", 1)
        # The next multiple of the interval: a late refresh does not shift those after it.
        following = (first["steps"] // interval + 1) * interval
        if self._statistics.missed:
            # Tasks that take turns could meet every refresh with the same one for ever, so the place of the next in its
            # interval is random; by the number of refreshes: all processes and a resumed run draw the same.
            following += random.Random(first["refreshes"]).randrange(interval)
        for group in self.param_groups:
            if taken is None:
                group["dropped_refreshes"] += 1
            elif taken:
                group["refreshes"] += 1
                group["next_refresh"] = following

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the statistics of the backward passes that made them."""
        super().zero_grad(set_to_none)
        self._statistics.recorder.forget_pending()

    def discard_statistics(self) -> None:
        """Forget statistics recorded since the last step.

        For loops that skip a step after a backward and reset the gradients in their own way. ``optimizer.zero_grad()``
        does it by itself, and so does the next forward after ``model.zero_grad()``, but not under FSDP2 and not with
        ``set_to_none=False``.
        """
        self._open_recorder().discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as for every torch optimizer; options it lacks take the defaults.

        Call it after ``step()``: statistics recorded since the last step are forgotten.

        Raises:
            ValueError: An option is outside its range, a parameter is not the model's, or an option that the hooks
                serve all groups with (``update_interval``) differs from that of the other groups.
            RuntimeError: After ``close``.
        """
        if self._closed:
            raise RuntimeError(CLOSED)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.options_class.check_group(group, self.param_groups[0])
            check_parameters(group["params"], type(self).__name__, self.needs)
            self._statistics.map_parameters()  # the model may have grown since
            for p in group["params"]:
                if id(p) not in self._statistics.names:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} does not belong to the model "
                        f"({type(self.model).__name__}): build the optimizer on the module that holds every parameter "
                        "it should train"
                    )
        except ValueError:
            self.param_groups.pop()
            if self._statistics.is_tracking:  # the states follow what the model has become
                self._track()
            raise
        group["steps"], group["next_refresh"] = (self.param_groups[0][key] for key in ("steps", "next_refresh"))
        if self._statistics.is_tracking:  # not while the constructor adds its groups
            self._track()

    def _track(self) -> None:
        self._statistics.track(self._params())
        self._arm()

    def _params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the given dictionary is neither changed nor shared.

        As for every torch optimizer, the options of the saved groups replace those of the constructor; one warning
        names those that differ. Options that are newer than the checkpoint stay as they are. Statistics come back in
        the dtype in which they were saved; torch's rule would cast them to the parameter's.

        Raises:
            ValueError: The checkpoint is another optimizer's, or another model's.
        """
        names, own, saved = self.options_class.names, self.param_groups, state_dict["param_groups"]
        check_kind(type(self).__name__, frozenset(names(identifies=True)), self.decoupled, saved)
        check_fixed_options(own, saved, names(on_resume="fixed"))
        check_shapes([(self._statistics.name_of(p), self.state_shapes(p)) for p in self._params()], state_dict)
        warn_changed_options(own, saved, names(on_resume="warned"))
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, before, strict=True):
            for name, value in options.items():
                group.setdefault(name, value)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        members = [(group, p) for group in self.param_groups for p in group["params"]]
        for saved_id, (group, p) in zip(saved_ids, members, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                # Scalars (step, weight of the average) stay on the CPU, since they are read as numbers; the momentum
                # of a 0-dimensional parameter is none of them.
                scalar = value.dim() == 0 and key != self.momentum_key
                dtype = self._restored_dtype(group, p, key, value.dtype)
                device = torch.device("cpu") if scalar else p.device
                self.state[p][key] = value.detach().clone().to(device, dtype)
        self._statistics.forget()
        self._open_recorder().discard()
        self._arm()

    def close(self) -> None:
        """Remove every hook from the model; what the optimizer knows stays readable, but it makes no more steps."""
        self._closed = True
        self._statistics.recorder.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, since it belongs to one model: save "
            "state_dict(), and load it into a new optimizer built on the copy of the model"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
