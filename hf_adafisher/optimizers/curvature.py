"""The curvature of a model's parameters: which modules use them, what was recorded, what their diagonal is made of."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_adafisher.fisher.forms import Term
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.fisher.uses import (
    ON_GRADIENT,
    Use,
    find_uses,
    gradient_term,
    needs_gradient_factors,
    terms_of,
    with_gradient_sums,
)
from hf_adafisher.optimizers.sharding import is_sharded, local_terms, whole

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class FactorUpdate:
    """New factors for one use of one parameter, recorded by its module or taken from its gradient."""

    group: Mapping[str, Any]
    param: Tensor
    use: Use
    factors: Mapping[str, Tensor]
    from_gradient: bool

    def apply(self, state: Mapping[str, Tensor], uses: Sequence[Use]) -> None:
        """Take the factors into the averages of ``state``; a module's first statistics replace gradient factors.

        The two have different scales, so they are never averaged with each other.
        """
        if self.use.tracked is not None:
            if state[ON_GRADIENT].item() and not self.from_gradient:
                for use in uses:
                    use.reset_(state, self.param.shape)
            state[ON_GRADIENT].fill_(float(self.from_gradient))
        self.use.update_(state, self.factors, self.param.shape, self.group["ema_decay"])


class Curvature:
    """Bookkeeping between the recorder, which knows modules, and the optimizer's state, which knows parameters.

    Args:
        model: The model that the optimizer was given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder: FactorRecorder | None = None
        self._warned_bypassed: set[int] = set()
        self._params: list[Any] = []
        self._warned_dropped = False
        self.map_parameters()

    def track(self, params: Sequence[Any]) -> None:
        """Follow exactly these parameters of the model from now on, with a new recorder (disarmed)."""
        if self.recorder is not None:
            self.recorder.close()
        self._params = list(params)
        self.recorder = FactorRecorder(self.model, self._params)
        self.map_parameters()
        orphans = [p for p in self._params if self.uses_of(p)[0].tracked is None]
        if orphans:
            logger.warning("No layer rule reaches %s; gradient factors are used instead.", self.describe(orphans))

    def map_parameters(self) -> None:
        """Look the names, the owners and the uses of all parameters up in the model again."""
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        self._owners = {
            id(p): (module, key)
            for module in self.model.modules()
            for key, p in module._parameters.items()
            if p is not None
        }
        self._uses = find_uses(self._params, self.recorder.tracked if self.recorder else [])
        self.forget()

    def forget(self) -> None:
        """Forget every cached term: the averages have changed."""
        self._terms: dict[int, list[Term]] = {}
        self._local_terms: dict[int, list[Term]] = {}
        self._provisional: set[int] = set()

    def name_of(self, p: Tensor) -> str:
        """The parameter's name in the model."""
        return self.names.get(id(p), f"a parameter of shape {tuple(p.shape)}")

    def uses_of(self, p: Any) -> tuple[Use, ...]:
        """All uses of a tracked parameter, at least one."""
        if id(p) not in self._uses:
            self._follow_replaced_parameters()
        if id(p) not in self._uses:
            raise RuntimeError(
                f"{self.name_of(p)} was put into param_groups by hand: use add_param_group, or build a new optimizer"
            )
        return self._uses[id(p)]

    def _follow_replaced_parameters(self) -> None:
        """FSDP2 replaces the parameters by sharded ones but keeps the modules: look the new ones up there."""
        self._params = [getattr(*self._owners[id(p)]) if id(p) in self._owners else p for p in self._params]
        self.map_parameters()

    def describe(self, params: Sequence[Tensor]) -> str:
        """``"3 parameters (0.2 % of all values): a, b, c"`` for one grouped message."""
        share = 100.0 * sum(p.numel() for p in params) / max(sum(p.numel() for p in self._params), 1)
        names = ", ".join(self.name_of(p) for p in params[:_NAMES_SHOWN])
        more = f" and {len(params) - _NAMES_SHOWN} more" if len(params) > _NAMES_SHOWN else ""
        return f"{len(params)} parameter{'s' if len(params) > 1 else ''} ({share:.1f} % of all values): {names}{more}"

    def terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[Term]:
        """The normalised factors of every use of ``p``, kept until the next refresh.

        Before the first statistics (a layer first used between two refreshes) they come from the current gradient.
        """
        key = id(p)
        if key not in self._terms:
            self._terms[key] = terms_of(self.uses_of(p), state, p.shape)
        if not self._terms[key] or key in self._provisional:
            self._provisional.add(key)
            self._terms[key] = [gradient_term(self.uses_of(p), whole(grad))]
        return self._terms[key]

    def local_terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[Term]:
        """The part of :meth:`terms` that belongs to this process's part of ``p``: all of it, unless FSDP2 shards it."""
        if not is_sharded(p):
            return self.terms(p, state, grad)
        key = id(p)
        if key not in self._local_terms or key in self._provisional:
            self._local_terms[key] = local_terms(self.terms(p, state, grad), p)
        return self._local_terms[key]

    def known_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool = True) -> list[Term]:
        """The terms that the last step used, else those of the averages; empty while nothing is known.

        With ``normalize=False`` those of the averages, not normalised.
        """
        used = self._terms.get(id(p)) if normalize else None
        return used or terms_of(self.uses_of(p), state, p.shape, normalize)

    def collect(
        self,
        with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor]],
        state_of: Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]],
    ) -> list[FactorUpdate] | None:
        """What was recorded since the last call, for every parameter that has a gradient.

        A parameter whose modules never recorded anything gets the factors of its gradient, in the form of its first
        use. One whose modules recorded something earlier keeps their averages.

        Args:
            with_gradient: Parameter group, parameter and gradient.
            state_of: The optimizer's state of a parameter, given its group too.

        Returns:
            The updates to make, none where the step had nothing but zero gradients; None if anything is not finite.
        """
        assert self.recorder is not None
        sample = self.recorder.flush()
        recorded, fallbacks, informative = [], [], bool(sample.factors)
        for group, p, grad in with_gradient:
            uses = self.uses_of(p)
            used = [use for use in uses if use.tracked in sample.factors]
            for use in used:
                assert use.tracked is not None
                factors = sample.factors[use.tracked]
                if use.tracked in sample.batch_shared and len(uses) == 1:
                    factors = with_gradient_sums(use.form, factors, whole(grad))
                recorded.append(FactorUpdate(group, p, use, factors, False))
            if not used and needs_gradient_factors(uses, state_of(group, p), p.shape):
                full = whole(grad)
                informative = informative or bool(full.any())
                fallbacks.append(FactorUpdate(group, p, uses[0], uses[0].form.from_gradient(full), True))
        if not informative and not sample.non_finite:
            return []  # zeros everywhere: distributed checkpoints make such a step to initialise states
        if self.recorder.tracked and not sample.factors and not sample.non_finite and self.model.training:
            self._check_not_compiled()
        from_gradients = [*fallbacks, *(u for u in recorded if u.use.tracked in sample.batch_shared)]
        if sample.non_finite or not all(bool(f.isfinite().all()) for u in from_gradients for f in u.factors.values()):
            self._warn_dropped(sample.non_finite)
            return None
        self._note_bypassed([update.param for update in fallbacks if update.use.tracked is not None])
        return recorded + fallbacks

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

    def _note_bypassed(self, params: Sequence[Tensor]) -> None:
        """Say once which parameters have a rule but no statistics: their module was not called, or not as assumed."""
        new = [p for p in params if id(p) not in self._warned_bypassed]
        if new:
            self._warned_bypassed.update(id(p) for p in new)
            logger.warning(
                "The layers of %s recorded nothing (used without being called, in eval mode, compiled, or computing "
                "something else than their class); gradient factors are used instead.",
                self.describe(new),
            )

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
