"""Registry of layer rules: by class along the method resolution order, else by structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import ParameterDiagonal

PROBE_ROWS = 8
"""Number of positions on which ``matches_forward`` compares a call with what the rule assumes."""


class LayerRule(ABC):
    """The geometry of one kind of layer: two pure functions from tensors to sums, and a diagonal per parameter.

    A rule holds no state: the same instance serves every module of its class.
    """

    name: str
    """Shown by ``coverage()``."""
    needs_training: bool = False
    """Calls in eval mode compute something else than the rule assumes, and are left out."""
    input_numbers_rows: bool = False
    """Inputs look rows of the weight up: a row that was none has the input factor 0, and no gradient by this module."""

    @abstractmethod
    def diagonals(self, module: nn.Module) -> Mapping[str, ParameterDiagonal]:
        """The diagonal of each parameter of ``module`` that this rule covers, by its name inside the module."""

    @abstractmethod
    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the input factor and of the output-gradient factor."""

    @abstractmethod
    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        """``sum_n x_n^2`` over all positions of one call, and the number of positions.

        Args:
            module: The layer.
            inputs: The tensors among its positional, then its keyword arguments.
            output: What the call returned.
        """

    @abstractmethod
    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        """``sum_n g_n^2`` over all positions; ``grad`` is the loss gradient with respect to the output."""

    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Check that this call really computes what the rule assumes.

        Asked once per module, on real numbers, because a class proves little: OPT's position table derives from
        Embedding and is called with an attention mask, a gated RMSNorm multiplies before it normalises. A module that
        does not match gets gradient factors. The default accepts.
        """
        return True

    def broadcasts_over_batch(self, inputs: Sequence[Tensor]) -> bool:
        """True where this call's output serves all examples of the batch at once. Default: False.

        Its gradient is then a sum over the examples of one backward, whose square depends on how a batch is split into
        micro-batches or processes; the parameter's own gradient, accumulated over all of them, stands in for it.
        """
        return False

    def full_factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of the full second moments of the input and of the output gradient; None (the default): has none.

        They are the Kronecker factors of the parameter ``weight``, seen as a matrix whose rows are its first axis, so
        that ``grad = sum_n g_n x_n^T`` or its transpose. ``(d, d)`` is a full moment, ``(d,)`` the diagonal of one that
        is diagonal by nature. AdaFisher never asks for them; K-FAC does.
        """
        return None

    def full_input_sums(
        self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor, with_one: bool = False
    ) -> tuple[Tensor, int]:
        """``sum_n x_n x_n^T`` over all positions of one call, and the number of positions.

        Args:
            module: The layer.
            inputs: As for ``input_sums``.
            output: What the call returned.
            with_one: Whether each ``x_n`` is extended by a last entry 1, the input of the bias.
        """
        raise NotImplementedError(f"{type(self).__name__} has no full second moments")

    def full_output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        """``sum_n g_n g_n^T`` over all positions."""
        raise NotImplementedError(f"{type(self).__name__} has no full second moments")


def weight_of(module: nn.Module) -> Tensor:
    """``module.weight``, which a rule knows to be a tensor where the type checker does not."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def agree(actual: Tensor, expected: Tensor, tolerance: float = 0.03) -> bool:
    """Compare two tensors up to low-precision rounding (relative norm of the difference)."""
    if actual.shape != expected.shape:
        return False
    difference = torch.linalg.vector_norm(actual.float() - expected.float())
    return bool(difference <= tolerance * torch.linalg.vector_norm(expected.float()) + 1e-12)


def second_moment(rows: Tensor, with_one: bool = False) -> Tensor:
    """``sum_n x_n x_n^T`` over the rows ``x_n`` of a matrix, extended by a last entry 1 on request.

    In the dtype of statistics, also inside an autocast region, where a plain product would be made in bfloat16.
    """
    rows = rows.detach().to(statistics_dtype(rows.dtype))
    if with_one:
        rows = F.pad(rows, (0, 1), value=1.0)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.t() @ rows


_RULES: dict[type[nn.Module], LayerRule] = {}
_STRUCTURES: list[tuple[Callable[[nn.Module], bool], LayerRule]] = []


def register_layer(module_class: type[nn.Module], rule: LayerRule) -> None:
    """Use ``rule`` for ``module_class`` and the classes derived from it.

    A later registration replaces an earlier one for the same class. Optimizers look rules up when they are built,
    so register first.

    Args:
        module_class: A subclass of ``torch.nn.Module``.
        rule: A ``LayerRule`` instance.

    Raises:
        TypeError: ``module_class`` is not a Module class, or ``rule`` is not a LayerRule instance.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of torch.nn.Module, got {module_class!r}")
    if not isinstance(rule, LayerRule):
        raise TypeError(f"rule must be an instance of LayerRule (not the class itself), got {rule!r}")
    _RULES[module_class] = rule


def register_structure(matches: Callable[[nn.Module], bool], rule: LayerRule) -> None:
    """Use ``rule`` for modules of unregistered classes that ``matches`` accepts."""
    _STRUCTURES.append((matches, rule))


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule of the nearest registered base class of ``module``, else of the first matching structure, else None."""
    for base in type(module).__mro__:
        if base in _RULES:
            return _RULES[base]
    for matches, rule in _STRUCTURES:
        if matches(module):
            return rule
    return None
