"""What an optimizer that records statistics knows about its model: the recorder, the names, what to warn of."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_adafisher.fisher.recorder import FactorRecorder

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


class ParameterTracker(ABC):
    """The recorder of the parameters that an optimizer trains, their names, and what there is to say about them.

    Args:
        model: The model that the optimizer was given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: FactorRecorder | None = None
        self._params: list[Any] = []
        self._warned_bypassed: set[int] = set()
        self._warned_dropped = False
        self.map_parameters()

    def track(self, params: Sequence[Any]) -> None:
        """Follow exactly these parameters of the model from now on, with a new recorder (disarmed)."""
        scale = 1.0
        if self.recorder is not None:
            scale = self.recorder.gradient_scale
            self.recorder.close()
        self._params = list(params)
        self.recorder = self._new_recorder()
        self.recorder.gradient_scale = scale
        self.map_parameters()
        self._report_uncovered()

    @abstractmethod
    def _new_recorder(self) -> FactorRecorder:
        """A recorder for the parameters in ``self._params``."""

    @abstractmethod
    def _report_uncovered(self) -> None:
        """Say once which of the tracked parameters no layer rule reaches."""

    def map_parameters(self) -> None:
        """Look the names of all parameters up in the model again."""
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        self.forget()

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

    def discard(self) -> None:
        """Forget what was recorded since the last step."""
        self.open_recorder().discard()

    def arm(self, due: bool) -> None:
        """Put the hooks on for a step that is due, and off for any other."""
        recorder = self.open_recorder()
        if due:
            recorder.arm()
        else:
            recorder.disarm()

    def open_recorder(self) -> FactorRecorder:
        """The recorder. Raises RuntimeError after it was closed."""
        if self.recorder is None or self.recorder.closed:
            raise RuntimeError("this optimizer was closed and has no hooks any more: build a new one to train on")
        return self.recorder

    @staticmethod
    def _check_not_compiled() -> None:
        """Nothing at all was recorded: an error if this process runs compiled graphs, which is then the reason."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is not None and dynamo.counters["stats"].get("unique_graphs"):
            raise RuntimeError(
                "no layer recorded anything in a step that refreshes the factors, and models were compiled in this "
                "process: compiled graphs do not run hooks. Use AdaFisherTrainer, or run the forward and backward of "
                'these steps with torch.compiler.set_stance("force_eager" if optimizer.refresh_due else "default")'
            )

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
                "The layers of %s recorded nothing (used without being called, in eval mode, compiled, or computing "
                "something else than their class); %s instead.",
                self.describe(new),
                instead,
            )
