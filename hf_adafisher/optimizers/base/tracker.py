"""Recorder and names of the parameters that an optimizer trains, and the warnings about layers that record nothing."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.recorder import FactorRecorder, Sample
from hf_adafisher.optimizers.sharding import local_part
from hf_adafisher.optimizers.validation.compilation import compiled_regions, graphs_compiled, refuse_compiling_driver

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


class StatisticsTracker(ABC):
    """The recorder of the parameters that an optimizer trains, their names, and what there is to say about them.

    Args:
        model: The model that the optimizer was given.
        kind: The optimizer's name, for messages.

    Attributes:
        recorder: Hooks on the layers that own the parameters; none before ``track``.
        names: Names of the model's parameters by ``id(parameter)``.
        missed: Whether the last refresh had nothing of a layer that has statistics and was not used.
    """

    recorder: FactorRecorder
    missed = False

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model = model
        self._kind = kind
        self._params: list[Any] = []
        self._warned_bypassed: set[int] = set()
        self._warned_dropped = False
        self._runs_eagerly = False
        self._driver_known = False
        self._examined: set[str] = set()

    @property
    def is_tracking(self) -> bool:
        """True once there is a recorder."""
        return hasattr(self, "recorder")

    def track(self, params: Sequence[Any]) -> None:
        """Follow exactly these parameters of the model from now on, with a new recorder (disarmed)."""
        scale = 1.0
        if self.is_tracking:
            scale = self.recorder.gradient_scale
            self.recorder.close()
        self._params = list(params)
        self._examined.clear()
        self.recorder = self._new_recorder()
        self.recorder.gradient_scale = scale
        self.map_parameters()
        self._report_uncovered()

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Run forwards and backwards of a step that is due without compiled graphs, which do not run hooks."""
        self._runs_eagerly = True
        with torch.compiler.set_stance("force_eager"):
            yield

    @abstractmethod
    def _new_recorder(self) -> FactorRecorder:
        """A recorder for the parameters in ``self._params``."""

    @abstractmethod
    def _report_uncovered(self) -> None:
        """Say once which of the tracked parameters no layer rule reaches."""

    @abstractmethod
    def without_statistics(self, states: Mapping[Any, Mapping[str, Tensor]]) -> Iterable[int]:
        """Ids of trained parameters that a rule reaches, and that have no statistics in the optimizer's state."""

    def map_parameters(self) -> None:
        """Look the names of all parameters up in the model again."""
        self.names = {id(p): name for name, p in self.model.named_parameters()}

    @abstractmethod
    def forget(self) -> None:
        """Forget whatever was derived from the averages: they have changed."""

    def name_of(self, p: Tensor) -> str:
        """The parameter's name in the model."""
        return self.names.get(id(p), f"a parameter of shape {tuple(p.shape)}")

    def describe(self, params: Sequence[Tensor]) -> str:
        """``"3 parameters (0.2 % of all values): a, b, c"`` for one grouped message."""
        share = 100.0 * sum(p.numel() for p in params) / max(sum(p.numel() for p in self._params), 1)
        names = ", ".join(self.name_of(p) for p in params[:_NAMES_SHOWN])
        more = f" and {len(params) - _NAMES_SHOWN} more" if len(params) > _NAMES_SHOWN else ""
        return f"{len(params)} parameter{'s' if len(params) > 1 else ''} ({share:.1f} % of all values): {names}{more}"

    def _check_not_compiled(self, sample: Sample, gradients: Iterable[tuple[Tensor, Tensor]]) -> set[int]:
        """Refuse to go on where a compiled graph has hidden layers that train.

        An error is raised where a compiled module holds such layers and no layer in it recorded anything, and where no
        layer at all did in a process that has compiled something: a compiled wrapper or function leaves no mark on the
        model. Single layers have other reasons to be silent: the caller warns of those that are returned.

        Args:
            sample: What was recorded, by all processes together.
            gradients: Parameters and their gradients.

        Returns:
            The ids of the parameters of other silent layers, in a process that has compiled anything; a layer's once.

        Raises:
            RuntimeError: A compiled graph did not run the hooks: there are no statistics, or old ones.
            ValueError: A stock Trainer that compiles every step drives this optimizer.
        """
        eager, self._runs_eagerly = self._runs_eagerly, False
        if not (eager or self._driver_known):
            refuse_compiling_driver(self._kind)
        self._driver_known = True
        tracked = self.recorder.tracked
        if eager or sample.non_finite or sample.factors.keys() >= set(tracked):
            return set()
        quiet = [t for t in tracked if t not in sample.factors and t.records and t.name not in self._examined]
        owned = {id(p) for t in quiet for p in t.module.parameters(recurse=False)}
        # Steps of zero gradients do not count: distributed checkpoints make them to initialise states.
        moving = {id(p) for p, grad in gradients if id(p) in owned and bool(local_part(grad).any())}
        quiet = [t for t in quiet if any(id(p) in moving for p in t.module.parameters(recurse=False))]
        silent = [t for t in quiet if t.matches_rule is not False]
        for region in self._compiled_regions(sample) if silent else ():
            inside = set(region.modules())
            hidden = [t.name for t in silent if t.module in inside]
            if hidden and not any(t.module in inside for t in sample.factors):
                raise RuntimeError(
                    f"no layer in a compiled {_class_name(region)} recorded anything in a step that refreshes "
                    f"the factors (the first is {hidden[0]!r}): compiled graphs do not run hooks. Use "
                    'AdaFisherTrainer, or run forward and backward within "with optimizer.eager_if_due():", which is '
                    'torch.compiler.set_stance("force_eager") for these steps'
                )
        self._examined.update(t.name for t in quiet)
        if not graphs_compiled():
            return set()
        heard = {id(p) for t in sample.factors for p in t.module.parameters(recurse=False)}
        return moving & {id(p) for t in silent for p in t.module.parameters(recurse=False)} - heard

    def _compiled_regions(self, sample: Sample) -> Iterator[nn.Module]:
        yield from compiled_regions(self.model)
        if graphs_compiled() and not sample.factors:
            yield self.model

    def _warn_dropped(self, modules: Sequence[str]) -> None:
        if not self._warned_dropped:
            self._warned_dropped = True
            where = f" in {modules[0]!r}" if modules else ""
            more = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
            logger.warning(
                "Non-finite activations or gradients%s%s: the statistics of this step are dropped and the refresh "
                "stays due. Said once; curvature_summary() counts them.",
                where,
                more,
            )

    def _warn_bypassed(self, params: Sequence[Tensor], instead: str) -> None:
        """Say once which parameters have a rule but no statistics: their module was not called, or not as assumed."""
        new = [p for p in params if id(p) not in self._warned_bypassed]
        if new:
            self._warned_bypassed.update(id(p) for p in new)
            logger.warning(
                "The layers of %s recorded nothing (used without being called, a BatchNorm in eval mode, compiled, "
                "given gradients by torch.autograd.grad, or computing something else than their class); %s instead.",
                self.describe(new),
                instead,
            )


def _class_name(region: nn.Module) -> str:
    """The class of a compiled module, which torch may have wrapped."""
    return type(getattr(region, "_orig_mod", region)).__name__
