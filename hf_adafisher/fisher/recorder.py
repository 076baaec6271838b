"""Hooks that turn a training step's activations and gradients into factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_adafisher.fisher.autograd_state import accumulators, inside_backward, inside_transform, will_accumulate
from hf_adafisher.fisher.averages import FactorSums, statistics_dtype
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from hf_adafisher.fisher.layers import LayerRule, find_rule
from hf_adafisher.fisher.reduce import check_same_layout, num_ranks, sum_over_ranks
from hf_adafisher.fisher.tracked_module import TrackedModule


@dataclass
class Sample:
    """Statistics of one refresh: the means over all positions since the last one, by tracked module.

    Attributes:
        factors: ``{INPUT: h, OUTPUT_GRAD: s}`` for every module that committed at least one position.
        counts: The number of positions behind these means.
        broadcast: Those of them whose output served the whole batch at once.
        non_finite: Names of the modules with a NaN or an infinity. Where there are any, ``factors`` is not to be used.
    """

    factors: dict[TrackedModule, dict[str, Tensor]] = field(default_factory=dict)
    counts: dict[TrackedModule, float] = field(default_factory=dict)
    broadcast: set[TrackedModule] = field(default_factory=set)
    non_finite: list[str] = field(default_factory=list)


class _ForwardHook:
    """The forward hook of one module.

    It holds the recorder by a weak reference, so that hooks never keep an optimizer alive, and becomes inert in a
    copy or a pickle of the model, which have no optimizer.
    """

    def __init__(self, recorder: FactorRecorder | None, tracked: TrackedModule | None) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._tracked = tracked

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ForwardHook, (None, None))

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook(None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if inside_transform():
            return
        recorder = None if self._recorder is None else self._recorder()
        if recorder is None or self._tracked is None:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs copies of the model in threads, whose statistics would be mixed up: start one "
                "process a GPU with torchrun (DistributedDataParallel), or show only one with CUDA_VISIBLE_DEVICES"
            )
        if torch.is_grad_enabled() and self._tracked.records and isinstance(output, Tensor) and output.requires_grad:
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if inputs:
                recorder._watch(self._tracked, inputs, output)


def _gradient_site(output: Tensor) -> Tensor:
    """The tensor to hook for the gradient of ``output``.

    A Linear with bias on 3-D input and transformers' Conv1D return a view of what they computed. After an in-place
    operation on that view a hook on the view never fires, silently; one on its base does. Full backward hooks raise
    there and cost more even when idle. The base stands in only where it holds the same values in the same order, so
    that its gradient can be given the output's shape.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


class FactorRecorder:
    """Records factor pairs for the modules that own given parameters.

    Armed, each tracked module has one forward hook. It sums the squares of the input at once, never keeping the
    input, and puts a tensor hook on the output that sums the squares of the gradient and commits the *pair*. Pairing
    makes recomputation (activation checkpointing), several calls per forward and forwards without backward exact:
    what has no backward is not counted. Nor is a backward that accumulates into none of the module's parameters of
    interest (``torch.autograd.grad``, ``torch.func.grad``), or a call while all of them are frozen. A second backward
    through the same graph (``retain_graph=True``) commits its pairs again, as it adds its gradients again: the
    positions count twice, with each backward's own gradients.
    Disarmed, no hook exists but those of newcomers.

    Args:
        model: Any module; its submodules are walked once.
        parameters: The parameters of interest; modules that own none of them are not tracked.
        find: Gives the rule of a module, or None. Default: the registered rules, for diagonal factors.

    Attributes:
        tracked: The modules with a rule that own a parameter of interest.
        gradient_scale: What the loss of the coming backward passes is multiplied by; factors are divided by its
            square. Default 1.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        find: Callable[[nn.Module], LayerRule | None] = find_rule,
    ) -> None:
        wanted = self._wanted = {id(p): weakref.ref(p) for p in parameters}
        self.tracked: list[TrackedModule] = []
        for name, module in model.named_modules():
            owned = [key for key, p in module._parameters.items() if p is not None and id(p) in wanted]
            rule = find(module) if owned else None
            if rule is not None:
                diagonals = {key: diagonal for key, diagonal in rule.diagonals(module).items() if key in owned}
                if diagonals:
                    self.tracked.append(TrackedModule(name, module, rule, diagonals))
        self._pending: dict[TrackedModule, FactorSums] = {}
        self._handles: list[RemovableHandle] = []
        # Statistics of a graph built before the last flush or discard must not count towards the next one.
        self._generation = 0
        self._layout_checked = False
        self.closed = False
        self.gradient_scale = 1.0
        weakref.finalize(self, _remove_all, self._handles)

    @property
    def armed(self) -> bool:
        """True while the hooks are on."""
        return bool(self._handles)

    def arm(self) -> None:
        """Put one forward hook on every tracked module. Raises RuntimeError after ``close``."""
        if self.closed:
            raise RuntimeError("this recorder was closed and records no more; build a new optimizer to train on")
        if len(self._handles) < len(self.tracked):
            _remove_all(self._handles)
            self._put_hooks(self.tracked)

    def disarm(self, newcomers: Collection[int] = ()) -> None:
        """Remove every forward hook and forget what is pending.

        Args:
            newcomers: Ids of parameters without statistics; the hooks of the modules that own them stay on.
        """
        _remove_all(self._handles)
        self.discard()
        if newcomers and not self.closed:
            self._put_hooks([t for t in self.tracked if any(id(p) in newcomers for p in t.trained_leaves())])

    def _put_hooks(self, modules: Iterable[TrackedModule]) -> None:
        for tracked in modules:
            hook = _ForwardHook(self, tracked)
            # Before everybody else's hooks: the output is then what the layer itself returned, the tensor whose
            # gradient belongs to its weight, whatever other hooks put in its place; and a layer that is an FSDP2
            # unit of its own still has its whole weight, which the hook of `fully_shard` takes away.
            handle = tracked.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            self._handles.append(handle)

    def discard(self) -> None:
        """Forget what is pending, and whatever graphs built so far would still commit."""
        self._pending.clear()
        self._generation += 1

    def forget_pending(self) -> None:
        """Forget what was committed so far, as zeroing the gradients forgets them; graphs in flight still count."""
        self._pending.clear()

    def close(self) -> None:
        """Disarm for good."""
        self.disarm()
        self.closed = True

    def _watch(self, tracked: TrackedModule, inputs: Sequence[Tensor], output: Tensor) -> None:
        """One call of a tracked module: take the input's sums, and commit them once the gradient arrives."""
        leaves = tracked.trained_leaves()
        if not leaves:
            return
        if self._lost_its_gradients(tracked, leaves):
            del self._pending[tracked]
        nodes = accumulators(leaves)
        with torch.no_grad():
            if tracked.matches_rule is None:
                if output.numel() == 0 or not bool(output.isfinite().all()):
                    return  # an empty or a broken batch proves nothing about the layer
                tracked.matches_rule = tracked.rule.matches_forward(tracked.module, inputs, output)
            if not tracked.matches_rule:
                return
            input_sums, count = tracked.rule.input_sums(tracked.module, inputs, output)
            shared = tracked.rule.broadcasts_over_batch(inputs)
        generation, reference, shape = self._generation, weakref.ref(self), output.shape

        def commit(grad: Tensor) -> None:
            recorder = reference()
            if recorder is None or recorder._generation != generation:
                return
            if will_accumulate(nodes) and tracked.holds(leaves):
                with torch.no_grad():
                    grad_sums = tracked.rule.output_grad_sums(tracked.module, grad.reshape(shape))
                    if recorder.gradient_scale != 1.0:
                        grad_sums = grad_sums / recorder.gradient_scale**2
                recorder._commit(tracked, FactorSums(input_sums, grad_sums, count, shared))

        _gradient_site(output).register_hook(commit)

    def _lost_its_gradients(self, tracked: TrackedModule, leaves: Sequence[Tensor]) -> bool:
        """True where something is pending whose gradients ``model.zero_grad()`` has taken away meanwhile.

        So it happens to a loop that goes on after an exception, or leaves a step out. A recomputed forward runs in the
        middle of a backward, before its gradients are there; those of FSDP2 are with the shards, out of sight.
        """
        if tracked not in self._pending or inside_backward():
            return False
        known = (self._wanted.get(id(leaf), lambda: None)() is leaf for leaf in leaves)
        return all(known) and all(leaf.grad is None for leaf in leaves)

    def _commit(self, tracked: TrackedModule, pair: FactorSums) -> None:
        if pair.count == 0:
            return
        if tracked in self._pending:
            self._pending[tracked].add_(pair)
        else:
            self._pending[tracked] = pair

    def flush(self) -> Sample:
        """Means over everything committed since the last flush, over all processes; clears what is pending.

        All sums and counts travel in one flat buffer with a fixed place for every tracked module (zeros where nothing
        was committed), so processes that used different modules stay in step, and all of them see the same result.
        Processes average their gradients, so the loss that is descended is 1 / (number of processes) of each one's own.
        """
        pending, self._pending = self._pending, {}
        self._generation += 1
        if not self.tracked:
            return Sample()
        anchor = next(self.tracked[0].module.parameters(recurse=False))
        dtypes = {statistics_dtype(p.dtype) for t in self.tracked for p in t.module.parameters(recurse=False)}
        buffer = torch.cat([_flatten(t, pending.get(t), anchor.device) for t in self.tracked])
        if not self._layout_checked:
            self._layout_checked = True
            check_same_layout([t.name for t in self.tracked], buffer.numel(), anchor.device)
        buffer = sum_over_ranks(buffer.to(torch.float64 if torch.float64 in dtypes else torch.float32))
        pieces = buffer.split([t.sums_size for t in self.tracked])
        checks = torch.stack([torch.cat((piece[-2:], piece.isfinite().all()[None])) for piece in pieces]).tolist()
        sample = Sample()
        for tracked, piece, (count, shared, finite) in zip(self.tracked, pieces, checks, strict=True):
            if not finite:
                sample.non_finite.append(tracked.name)
            elif count > 0:
                input_shape, grad_shape = tracked.factor_shapes
                sums = piece[:-2] / count
                if shared:
                    sample.broadcast.add(tracked)
                split = input_shape.numel()
                sums[split:] /= num_ranks() ** 2
                sample.counts[tracked] = count
                sample.factors[tracked] = {
                    INPUT: sums[:split].reshape(input_shape),
                    OUTPUT_GRAD: sums[split:].reshape(grad_shape),
                }
        return sample


def _flatten(tracked: TrackedModule, pair: FactorSums | None, device: torch.device) -> Tensor:
    """Sums, count and ``broadcast`` of one module as one vector on ``device``; zeros where nothing was committed."""
    if pair is None:
        return torch.zeros(tracked.sums_size, device=device)
    sums = [part.reshape(-1).to(device) for part in (pair.input_factor, pair.output_grad_factor)]
    return torch.cat([*sums, sums[0].new_tensor([pair.count, pair.broadcast])])


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
