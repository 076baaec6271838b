"""Base of AdaFisher(W) and SpectralAdaFisher: a first moment and averaged factors for every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of
from hf_adafisher.fisher.parameter_uses import ParameterUse, new_state
from hf_adafisher.optimizers.base.gradient_statistics import GradientStatistics
from hf_adafisher.optimizers.base.hooked import HookedOptimizer, ParamsT
from hf_adafisher.optimizers.base.options import OptimizerOptions, dtype_option
from hf_adafisher.optimizers.base.statistics import FactorStatistics, FactorUpdate
from hf_adafisher.optimizers.base.trained_parameter import TrainedParameter
from hf_adafisher.optimizers.blocks import RootParameter, RootSteps, root_update_in_blocks
from hf_adafisher.optimizers.compiled import CompiledUpdate
from hf_adafisher.optimizers.diagnostics.coverage import ParameterCoverage, coverage_of, curvature_summary
from hf_adafisher.optimizers.diagnostics.diagnosis import Diagnosis
from hf_adafisher.optimizers.sharding import local_part, local_terms
from hf_adafisher.optimizers.update import (
    Block,
    RootCoefficients,
    damping_terms,
    root_coefficients,
)

_SHARED_OPTIONS = ("lr", "beta", "weight_decay")
"""Options of every rule that divides by the root."""


class Member(NamedTuple):
    """A parameter that is about to move.

    Attributes:
        group: Its parameter group.
        param: The parameter.
        grad: Its gradient.
        exp_avg: Its first moment.
        step: Number of its updates, the coming one included.
        terms: Terms of its diagonal, of the whole parameter.
        sharded: Whether FSDP2 has sharded the parameter, and with it the gradient and the moment.
    """

    group: Mapping[str, Any]
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    step: int
    terms: Sequence[DiagonalTerm]
    sharded: bool


class KroneckerDiagonalOptimizer(HookedOptimizer):
    """A first moment and the averaged factors of every use of every parameter; subclasses say what moves by them.

    The state of a parameter is ``step``, ``exp_avg`` in its shape, and vectors
    (``hf_adafisher.fisher.parameter_uses.new_state``).
    """

    momentum_key = "exp_avg"
    divides_by_root: bool
    """Parameters with factors move by the root of their diagonal, which is not normalised (``_move_by_root``)."""
    damping_option: ClassVar[str] = "damping"
    _statistics: FactorStatistics

    @property
    def refresh_due(self) -> bool:
        """Due-ness of the next ``step()``; statistics of gradients are taken at every step, also after a failed one."""
        first = self.param_groups[0]
        return isinstance(self._statistics, GradientStatistics) or bool(first["steps"] >= first["next_refresh"])

    def damping_of(self, group: Mapping[str, Any], terms: Sequence[DiagonalTerm]) -> float:
        """Damping of the diagonal that these terms of a parameter in ``group`` make.

        By the root it is relative to the mean of the diagonal.
        """
        damping = group[self.damping_option]
        if not self.divides_by_root:
            return damping
        added = damping_terms(terms, damping, axes=0)
        return added[0][0].item() if added else 0.0

    def __init__(self, model: nn.Module, params: ParamsT | None, options: OptimizerOptions) -> None:
        self._last_steps: dict[int, tuple[Tensor, int]] = {}
        super().__init__(model, params, options)

    def _new_tracker(self) -> FactorStatistics:
        return FactorStatistics(self.model, type(self).__name__)

    def _take_statistics(self, newcomers: bool = False) -> bool | None:
        updates: list[FactorUpdate] | None
        if isinstance(self._statistics, GradientStatistics):
            moving = [(group, p, grad, self._state_of(group, p)) for group, p, grad in self._with_gradient()]
            self._statistics.average_(moving)
            return bool(moving)
        if newcomers:
            updates = self._statistics.collect_first(self._with_gradient(), self._newcomers)
        else:
            updates = self._statistics.collect(self._with_gradient(), self._state_of, self.state)
        if updates is None:
            return None
        for update in updates:
            update.apply(self._state_of(update.group, update.param), self._statistics.entry_of(update.param).uses)
        if updates:
            self._statistics.forget()
        return bool(updates)

    def _members(self) -> list[Member]:
        """Every parameter with a gradient and at least one value; counts the step of all that have a gradient."""
        moving = [(group, p, grad, self._state_of(group, p)) for group, p, grad in self._with_gradient()]
        if moving:
            torch._foreach_add_([state["step"] for *_, state in moving], 1.0)
        members = []
        for group, p, grad, state in moving:
            if p.numel():
                terms, step = self._statistics.terms(p, state, grad), int(state["step"].item())
                sharded = self._statistics.entry_of(p).sharded
                members.append(Member(group, p, grad, state["exp_avg"], step, terms, sharded))
        return members

    def _move_by_root(self, members: Iterable[Member], compiled: CompiledUpdate | None = None) -> None:
        """Move parameters by their momentum over the root of their diagonal (``root_directions``).

        Args:
            members: The parameters; this optimizer's statistics are ``GradientStatistics``.
            compiled: Kernels for large parameters.
        """
        assert isinstance(self._statistics, GradientStatistics)
        moved: list[RootSteps] = []
        batches: dict[tuple[int, int], tuple[RootCoefficients, list[RootParameter]]] = {}
        members = list(members)
        damped = self._statistics.damped_terms(
            [(member.param, self.state[member.param], member.group[self.damping_option]) for member in members]
        )
        for member, terms in zip(members, damped, strict=True):
            key = id(member.group), member.step
            if key not in batches:
                batches[key] = self._root_coefficients(member), []
            p = member.param
            block = Block(p, member.grad, member.exp_avg, terms)
            if member.sharded:
                local = [local_part(tensor) for tensor in block[:3]]
                block = Block(local[0], local[1], local[2], local_terms(terms, p))
            parameter = RootParameter(block, self._statistics.direction_size(p), p)
            if compiled is not None and not member.sharded and compiled.supports(block):
                moved += compiled.root_update_(parameter, batches[key][0])
            else:
                batches[key][1].append(parameter)
        for coefficients, parameters in batches.values():
            moved += root_update_in_blocks(parameters, coefficients)
        for steps in moved:
            self._last_steps.update((id(p), (steps.squares, i)) for i, p in enumerate(steps.params))

    def _root_coefficients(self, member: Member) -> RootCoefficients:
        """Coefficients of a member's group, in which AdaFisher(W) has no say about Nesterov's step and the bound."""
        group = member.group if "nesterov" in self.defaults else {key: member.group[key] for key in _SHARED_OPTIONS}
        return root_coefficients(group, member.step, bool(self.decoupled))

    def _uses_of(self, group: Mapping[str, Any], p: Tensor) -> Sequence[ParameterUse]:
        """Uses of a parameter whose factors make the diagonal that it moves by."""
        return self._statistics.entry_of(p).uses

    def _state_of(self, group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The parameter's state, created at its first gradient: wrappers (FSDP2) replace parameters before that."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            dtype = dtype_option(group, "momentum_dtype", p.dtype)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state.update(new_state(self._statistics.entry_of(p).uses, p))
        return state

    def _track(self) -> None:
        """Follow the model and the groups as they are now, also in the states that exist."""
        super()._track()
        self._last_steps.clear()
        for p in self._params():
            state = self.state.get(p)
            if state:
                fresh = new_state(self._statistics.entry_of(p).uses, p)
                known = {key: value for key, value in state.items() if key not in ("step", self.momentum_key)}
                if not known.keys() <= fresh.keys():  # another rule reaches it now: its factors mean something else
                    for key in known:
                        del state[key]
                for key, value in fresh.items():
                    state.setdefault(key, value)

    def state_shapes(self, p: Any) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of a parameter's state; they depend on the model alone."""
        factors = new_state(self._statistics.entry_of(p).uses, p)
        return {"step": (), "exp_avg": tuple(p.shape)} | {k: tuple(v.shape) for k, v in factors.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, as ``HookedOptimizer.load_state_dict``; the steps of before are forgotten."""
        super().load_state_dict(state_dict)
        self._last_steps.clear()

    def _restored_dtype(self, group: Any, p: Tensor, key: str, saved: torch.dtype) -> Any:
        """Momentum has the dtype that its group names; statistics keep their own."""
        return dtype_option(group, "momentum_dtype", p.dtype) if key == self.momentum_key else saved

    @torch.no_grad()
    def fisher_diagonal(self, param: Tensor, *, normalized: bool = True) -> Tensor:
        """The damped diagonal F of this parameter, as the last step knew it.

        AdaFisher(W) with ``step_size="paper"`` divides the momentum by it (Eq. 4). With ``step_size="root"``, and of
        what is no hidden matrix under SpectralAdaFisher, the momentum is divided by its root; the diagonal is then that
        of the batch's gradient, damped in units of its mean, and ``normalized`` only says whether it is damped.

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
            RuntimeError: There are no statistics yet, since it had no gradient in any step so far; or there never are
                any: of SpectralAdaFisher's hidden matrices, and where the root is divided by, of single values.
        """
        group = next((g for g in self.param_groups if any(q is param for q in g["params"])), None)
        name = self._statistics.name_of(param)
        if group is None:
            raise ValueError(f"{name} is not trained by this optimizer: it is in none of its parameter groups")
        state = self.state.get(param)
        terms = self._statistics.known_terms(param, state, normalized) if state else []
        if not (self._uses_of(group, param) and self._statistics.has_factors(param)):
            raise RuntimeError(f"{name} has no factors, and so no diagonal: {type(self).__name__} moves it without")
        if not terms:
            raise RuntimeError(f"no curvature of {name} is known yet: call step() after a backward first")
        return diagonal_of(terms, param, self.damping_of(group, terms) if normalized else 0.0)

    def trained_parameters(self) -> list[TrainedParameter]:
        """Every parameter of the groups with its name, group, state, uses and the terms of its diagonal."""
        return [
            TrainedParameter(
                self._statistics.name_of(p),
                p,
                group,
                self.state.get(p, {}),
                self._uses_of(group, p),
                self._statistics.known_terms(p, self.state[p]) if self.state.get(p) and self._uses_of(group, p) else [],
                self._statistics.entry_of(p).provisional,
            )
            for group in self.param_groups
            for p in group["params"]
        ]

    def coverage(self) -> list[ParameterCoverage]:
        """For every trainable parameter: its rule or ``"gradient factors"``, its modules, its share of all values."""
        return coverage_of(self.model, self.trained_parameters())

    def curvature_summary(self) -> dict[str, float]:
        """A few numbers about the curvature in use, for logs.

        See ``hf_adafisher.optimizers.diagnostics.coverage.curvature_summary``.
        """
        return curvature_summary(self.model, self.trained_parameters(), self.damping_of)

    def diagnose(
        self, *, grad_norms: Sequence[float] = (), max_grad_norm: float | None = None, skipped_steps: int = 0
    ) -> Diagnosis:
        """Say in sentences what is wrong with this run for this optimizer, after a few of its steps.

        It looks at the learning rate, the size of the last step in each layer, the damping, layers without a rule and
        what was taken for an output layer. An optimizer sees gradients after clipping, and no step that was skipped: a
        loop that knows more passes it on. ``DoctorCallback`` does so under a Trainer. Training is not changed, and
        costs nothing more until it is called.

        Under FSDP2 every process must call it.

        Args:
            grad_norms: Norms of the gradient before clipping, such as ``clip_grad_norm_`` returns. Default: not known.
            max_grad_norm: What they were clipped to; 0 for no clipping. Default None: not known.
            skipped_steps: Number of steps that a loss scaler skipped. Default 0.

        Returns:
            Findings, each of which names the argument to change, and the numbers they come from: ``print(...)`` shows
            them, ``as_dict()`` is for JSON.

        Raises:
            RuntimeError: Before the first step.
        """
        from hf_adafisher.optimizers.diagnostics.doctor import diagnose  # it knows all optimizers, this one too

        return diagnose(self, grad_norms, max_grad_norm, skipped_steps)

    def root_steps(self) -> dict[int, float]:
        """Sums of squares of the last step of each parameter, by its ``id``; none with ``step_size="paper"``.

        Of the whole parameter, decay left out. Those that have not moved yet are missing.
        """
        tensors = {id(squares): squares for squares, _ in self._last_steps.values()}
        numbers = {key: squares.tolist() for key, squares in tensors.items()}
        return {key: numbers[id(squares)][i] for key, (squares, i) in self._last_steps.items()}
