"""Kronecker blocks of K-FAC: their parameters, two factors, and damped inverses.

A block is the weight of a layer as a matrix, with its first axis as rows. If the bias is trained too, it is one more
column, or one more row for transformers' Conv1D. The Fisher of a block is ``A (x) G``. ``A`` is the second moment of
the layer's inputs, extended by a constant 1 for the bias, and ``G`` that of its output gradients.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import MovingAverage, statistics_dtype
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, ParameterDiagonal
from hf_adafisher.fisher.layers import LayerRule, find_rule
from hf_adafisher.fisher.tracked_module import TrackedModule
from hf_adafisher.optimizers.baselines.kfac_inverse import damped_inverse, split_damping, trace

ROW_INVERSE, COLUMN_INVERSE, READY = "row_inverse", "column_inverse", "inverse_ready"


class MomentRule(LayerRule):
    """Layer rule whose factors are full second moments instead of mean squares.

    Args:
        rule: Rule of the layer.
        shapes: Shapes of the input factor and the output-gradient factor: ``(d, d)``, or ``(d,)`` for a diagonal.
        with_one: Extend the inputs by a constant 1 for the bias.
    """

    def __init__(self, rule: LayerRule, shapes: tuple[tuple[int, ...], tuple[int, ...]], with_one: bool) -> None:
        self.rule, self.with_one = rule, with_one
        self.name, self.needs_training = rule.name, rule.needs_training
        self.input_shape, self.grad_shape = shapes
        if with_one:
            self.input_shape = tuple(size + 1 for size in self.input_shape)

    def diagonals(self, module: nn.Module) -> Mapping[str, ParameterDiagonal]:
        """Diagonals of the parameters in the block, by name."""
        kept = ("weight", "bias") if self.with_one else ("weight",)
        return {key: diagonal for key, diagonal in self.rule.diagonals(module).items() if key in kept}

    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the input factor and the output-gradient factor."""
        return self.input_shape, self.grad_shape

    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        """Sum of the inputs' second moments over all positions, and the number of positions."""
        if len(self.input_shape) == 2:
            return self.rule.full_input_sums(module, inputs, output, self.with_one)
        sums, count = self.rule.input_sums(module, inputs, output)
        sums = sums.reshape(-1)
        return (torch.cat([sums, sums.new_tensor([count])]) if self.with_one else sums), count

    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        """Sum of the output gradients' second moments over all positions."""
        full = len(self.grad_shape) == 2
        return self.rule.full_output_grad_sums(module, grad) if full else self.rule.output_grad_sums(module, grad)

    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Check that the wrapped rule describes this forward pass."""
        return self.rule.matches_forward(module, inputs, output)


def moment_rules(model: nn.Module, params: Sequence[Any], max_factor_dim: int) -> dict[int, MomentRule]:
    """Rules of all modules that form a block.

    A bias is part of its weight's block if both belong to one module only.

    Args:
        model: The model.
        params: Tracked parameters.
        max_factor_dim: Longest side with a full factor.

    Returns:
        Rules by ``id(module)``.
    """
    tracked = {id(p) for p in params}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    rules = {}
    for module in model.modules():
        weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
        if weight is None or id(weight) not in tracked:
            continue
        rule = find_rule(module)
        shapes = None if rule is None else rule.full_factor_shapes(module)
        if rule is not None and shapes is not None:
            with_one = bias is not None and id(bias) in tracked and owners[id(weight)] == owners[id(bias)] == 1
            limited = tuple((shape[0],) if shape[0] > max_factor_dim else shape for shape in shapes)
            rules[id(module)] = MomentRule(rule, (limited[0], limited[1]), with_one)
    return rules


@dataclass(frozen=True)
class BlockUse:
    """One module that uses the weight of a block; a tied weight has several.

    Attributes:
        tracked: The module and its rule.
        suffix: Suffix of the state keys of this use: empty for the first use, ``_1`` for the second.
    """

    tracked: TrackedModule
    suffix: str

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the two factors by name, that of the weight's rows first."""
        shapes = dict(zip((INPUT, OUTPUT_GRAD), self.tracked.rule.factor_shapes(self.tracked.module), strict=True))
        # A diagonal lists the factors by the axis of the weight.
        weight = self.tracked.module.weight
        return {name: shapes[name] for name in self.tracked.diagonals["weight"].factor_shapes(weight.shape)}  # type: ignore[arg-type]

    @property
    def input_axis(self) -> int:
        """Axis of the weight matrix that belongs to the inputs."""
        return list(self.factor_shapes()).index(INPUT)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by state key of this use's factors and of the weight of their average."""
        factors = {name + self.suffix: shape for name, shape in self.factor_shapes().items()}
        return {**factors, "factor_weight" + self.suffix: ()}

    def average(self, state: Mapping[str, Tensor]) -> MovingAverage:
        """Moving average over this use's tensors in ``state``, rows first."""
        return MovingAverage(
            [state[name + self.suffix] for name in self.factor_shapes()], state["factor_weight" + self.suffix]
        )

    def update_(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor], per_term: float, decay: float) -> None:
        """Update the moving average with the moments of one refresh.

        The Fisher of a term of the loss is a sum over its positions, so ``G`` is multiplied by their number (Grosse and
        Martens 2016 multiply ``A``).

        Args:
            state: State of the weight, changed in place.
            means: Means over positions by factor name.
            per_term: Positions per term of the loss.
            decay: Decay of the average, in [0, 1).
        """
        samples = [means[name] * per_term if name == OUTPUT_GRAD else means[name] for name in self.factor_shapes()]
        self.average(state).update_(samples, decay)


class KroneckerBlock:
    """Weight, bias if it is part of the block, and the modules that use them; the weight's state holds the factors.

    Args:
        weight: The weight.
        bias: The bias, or None.
        tracked: Modules that use the weight.
    """

    def __init__(self, weight: Any, bias: Any | None, tracked: Sequence[TrackedModule]) -> None:
        self.weight, self.bias = weight, bias
        self.uses = tuple(BlockUse(module, f"_{i}" if i else "") for i, module in enumerate(tracked))

    @property
    def rule_name(self) -> str:
        """Names of the rules of all uses, and of the factors that are diagonal because of ``max_factor_dim``."""
        names = "+".join(dict.fromkeys(use.tracked.rule.name for use in self.uses))
        long = [name for side, name in enumerate(("input", "output gradient")) if self._exceeds_limit(side)]
        return f"{names}, diagonal {' and '.join(long)}" if long else names

    def _exceeds_limit(self, side: int) -> bool:
        for use in self.uses:
            rule, module = use.tracked.rule, use.tracked.module
            assert isinstance(rule, MomentRule)
            full = rule.rule.full_factor_shapes(module)
            if full is not None and len(full[side]) == 2 and len(rule.factor_shapes(module)[side]) == 1:
                return True
        return False

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by state key of the factors of all uses and of the two inverses."""
        shapes: dict[str, tuple[int, ...]] = {}
        for use in self.uses:
            shapes |= use.state_shapes()
        sides = zip(*(use.factor_shapes().values() for use in self.uses), strict=True)
        rows, columns = (max(side, key=len) for side in sides)  # full as soon as one use's is
        return {**shapes, ROW_INVERSE: rows, COLUMN_INVERSE: columns, READY: ()}

    def has_statistics(self, state: Mapping[str, Tensor]) -> bool:
        """True if any use has statistics."""
        return any(not use.average(state).is_empty for use in self.uses)

    def factors(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of the weight's rows and columns.

        The Fisher of a tied weight is the sum of its uses' products ``L_u (x) R_u``, whose inverse is no Kronecker
        product. It is replaced by the single product with the same partial traces:

            ``(sum_u tr(R_u) L_u) (x) (sum_u tr(L_u) R_u) / sum_u tr(L_u) tr(R_u)``

        which equals the sum for one use, or if one side of all uses is the same up to scale.
        """
        pairs = [use.average(state).mean() for use in self.uses if not use.average(state).is_empty]
        if len(pairs) == 1:
            return pairs[0][0], pairs[0][1]
        traces = [(trace(left), trace(right)) for left, right in pairs]
        total = math.sqrt(sum(left * right for left, right in traces))
        if total == 0.0:
            return pairs[0][0], pairs[0][1]
        left = _sum_of([pair[0] * (t[1] / total) for pair, t in zip(pairs, traces, strict=True)])
        right = _sum_of([pair[1] * (t[0] / total) for pair, t in zip(pairs, traces, strict=True)])
        return left, right

    def invert_(self, state: Mapping[str, Tensor], damping: float, name: str) -> None:
        """Compute both damped inverses from the averages.

        Args:
            state: State of the weight, changed in place.
            damping: lambda, > 0.
            name: Name of the weight in messages.

        Raises:
            RuntimeError: A factor cannot be inverted with any damping.
        """
        rows, columns = self.factors(state)
        for_rows, for_columns = split_damping(rows, columns, damping)
        state[ROW_INVERSE].copy_(damped_inverse(rows, for_rows, name))
        state[COLUMN_INVERSE].copy_(damped_inverse(columns, for_columns, name))
        state[READY].fill_(1.0)

    def precondition(
        self, state: Mapping[str, Tensor], weight_grad: Tensor | None, bias_grad: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply the gradients of weight and bias by ``(A (x) G + damping)^-1``.

        Args:
            state: State of the weight.
            weight_grad: Gradient of the weight; None counts as zero.
            bias_grad: Gradient of the bias; None counts as zero.

        Returns:
            Preconditioned gradients of weight and bias in the dtype of the statistics; None for a bias outside the
            block.
        """
        dtype = statistics_dtype(self.weight.dtype)
        weight_grad = torch.zeros_like(self.weight) if weight_grad is None else weight_grad
        matrix = weight_grad.to(dtype).reshape(self.weight.shape[0], -1)
        axis = self.uses[0].input_axis
        if self.bias is not None:
            bias_grad = torch.zeros_like(self.bias) if bias_grad is None else bias_grad
            matrix = torch.cat([matrix, bias_grad.to(dtype).unsqueeze(axis)], dim=axis)
        rows, columns = state[ROW_INVERSE], state[COLUMN_INVERSE]
        matrix = rows @ matrix if rows.dim() == 2 else rows.unsqueeze(1) * matrix
        matrix = matrix @ columns if columns.dim() == 2 else matrix * columns
        if self.bias is None:
            return matrix.reshape(self.weight.shape), None
        weight, bias = matrix.split([matrix.shape[axis] - 1, 1], dim=axis)
        return weight.reshape(self.weight.shape), bias.reshape(self.bias.shape)


def find_blocks(tracked: Sequence[TrackedModule]) -> list[KroneckerBlock]:
    """Group tracked modules into blocks by their weight."""
    by_weight: dict[int, list[TrackedModule]] = {}
    for module in tracked:
        by_weight.setdefault(id(module.module.weight), []).append(module)
    blocks = []
    for modules in by_weight.values():
        first = modules[0]
        blocks.append(
            KroneckerBlock(first.module.weight, first.module.bias if "bias" in first.diagonals else None, modules)
        )
    return blocks


def _sum_of(factors: Sequence[Tensor]) -> Tensor:
    """Sum of factors, full if one of them is."""
    if all(f.dim() == factors[0].dim() for f in factors):
        return torch.stack(list(factors)).sum(0)
    return torch.stack([f if f.dim() == 2 else f.diag() for f in factors]).sum(0)
