"""The slow oracle for K-FAC: every Fisher block as one explicit matrix over the values of a weight and its bias.

Rows of inputs and output gradients are those of `tests.reference`, in plain loops; moments are sums of outer products,
row by row. A block's matrix is filled entry by entry from what each value multiplies: value `e` of a weight belongs to
one output `o(e)` and one input `k(e)`, and `F[e, e'] = G[o(e), o(e')] A[k(e), k(e')]`. The damped matrix is solved with
`torch.linalg.solve`. Nothing is shared with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import Call, computes_its_class, grad_options, grad_rows, input_options, input_rows, kind_of

KINDS = ("linear", "conv1d", "embedding", "conv")


def moment(rows: Iterable[list[float]], *, one: bool = False) -> tuple[Tensor, int]:
    """sum_n v_n v_n^T, in float64, and how many rows there are; each extended by a 1 on request."""
    total, count = torch.zeros(0, 0, dtype=torch.float64), 0
    for row in rows:
        vector = torch.tensor([*row, 1.0] if one else row, dtype=torch.float64)
        total = torch.outer(vector, vector) + (total if count else 0.0)
        count += 1
    return total, count


def average(samples: list[Tensor], decay: float) -> Tensor:
    """The exponential average of all samples, the newest last, with weights that sum to one."""
    weights = [(1 - decay) * decay**age for age in reversed(range(len(samples)))]
    return sum(w * s for w, s in zip(weights, samples, strict=True)) / sum(weights)  # type: ignore[return-value]


@dataclass
class Use:
    """One module that uses a block's weight, what it was called with, and its moments at every refresh."""

    module: Any
    kind: Any
    calls: list[Call] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    believed: bool | None = None

    def coordinates(self, bias: bool) -> tuple[list[int], list[int]]:
        """The output and the input that each value of the weight, then of the bias, belongs to."""
        first, *rest = self.module.weight.shape
        second = math.prod(rest)
        pairs = [(i, j) for i in range(first) for j in range(second)]
        if self.kind in ("conv1d", "embedding"):  # weight [in, out]
            pairs = [(j, i) for i, j in pairs]
        if bias:
            last = 1 + max(k for _, k in pairs)
            pairs += [(o, last) for o in range(self.module.bias.numel())]
        return [o for o, _ in pairs], [k for _, k in pairs]


@dataclass
class Block:
    """A weight, its bias if it is in the block, and all uses; `fisher` is the damped matrix of the last inversion."""

    weight: Tensor
    bias: Tensor | None
    uses: list[Use]
    fisher: Tensor | None = None

    @property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def pi_of(a: Tensor, g: Tensor) -> float:
    """sqrt of the mean eigenvalue of A over that of G."""
    means = [float(m.diagonal().mean()) for m in (a, g)]
    return math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0


def gathered(matrix: Tensor, index: list[int]) -> Tensor:
    return matrix[index][:, index]


class ReferenceKFAC:
    """K-FAC, slowly. Groups are dicts with "params" and, if wanted, their own options."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None = None,
        *,
        lr: float,
        momentum: float,
        damping: float,
        stat_decay: float,
        update_interval: int,
        inverse_interval: int,
        weight_decay: float,
        kl_clip: float | None,
        max_factor_dim: int = 10**9,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "damping": damping, "stat_decay": stat_decay, "weight_decay": weight_decay
        }  # fmt: skip
        groups = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.groups = [defaults | group | {"params": list(group["params"])} for group in groups]
        self.group_of = {p: group for group in self.groups for p in group["params"]}
        self.update_interval, self.inverse_interval = update_interval, inverse_interval
        self.kl_clip, self.max_factor_dim = kl_clip, max_factor_dim
        self.gradient_scale, self.loss_terms = 1.0, 1.0
        self.time, self.nu = 0, 1.0
        self.buffers: dict[Tensor, Tensor] = {}
        self.blocks: dict[Tensor, Block] = {}
        owners = [p for module in model.modules() for p in module._parameters.values() if p is not None]
        for module in model.modules():
            kind, weight, bias = kind_of(module), module._parameters.get("weight"), module._parameters.get("bias")
            grouped = kind == "conv" and module.groups > 1
            if kind not in KINDS or grouped or weight not in self.group_of:
                continue
            alone = all(sum(p is owner for owner in owners) == 1 for p in (weight, bias) if p is not None)
            bias = bias if bias in self.group_of and alone else None
            use = Use(module, kind)
            self.blocks.setdefault(weight, Block(weight, bias, [])).uses.append(use)
            module.register_forward_hook(self._probe(use), with_kwargs=True)

    @staticmethod
    def _probe(use: Use) -> Any:
        """A hook that adds zeros to the output, whose gradient is then that of the output."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not (module.training and torch.is_grad_enabled() and output.requires_grad):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            if use.believed is None:
                use.believed = computes_its_class(use.kind, module, x, output.detach())
            if not use.believed:
                return None
            probe = torch.zeros_like(output, requires_grad=True)
            use.calls.append(Call(x.detach().clone(), probe))
            return output + probe

        return hook

    def zero_grad(self) -> None:
        for p in self.group_of:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step."""
        if self.time % self.update_interval == 0:
            for block in self.blocks.values():
                self._refresh(block, inversion_due=self.time % self.inverse_interval == 0)
        for block in self.blocks.values():
            for use in block.uses:
                use.calls.clear()
        directions = {p: p.grad.double() for p in self.group_of if p.grad is not None}
        steps = {}
        for block in self.blocks.values():
            steps |= self._solved(block)
        self.nu = 1.0
        if self.kl_clip is not None and steps:
            size = sum(self.group_of[p]["lr"] ** 2 * float((d * directions[p]).sum()) for p, d in steps.items())
            self.nu = min(1.0, math.sqrt(self.kl_clip / size)) if size > 0 else 0.0
        directions |= {p: self.nu * d for p, d in steps.items()}
        for p, direction in directions.items():
            group = self.group_of[p]
            direction = direction + group["weight_decay"] * p.double()
            self.buffers[p] = group["momentum"] * self.buffers.get(p, torch.zeros_like(direction)) + direction
            p.copy_(p.double() - group["lr"] * self.buffers[p])
        self.time += 1

    def _refresh(self, block: Block, inversion_due: bool) -> None:
        for use in block.uses:
            calls = [call for call in use.calls if call.probe.grad is not None]
            if not calls:
                continue
            inputs = [input_rows(use.kind, c.x, **input_options(use.kind, use.module, c.x)) for c in calls]
            grads = [grad_rows(use.kind, c.probe.grad, **grad_options(use.kind, use.module)) for c in calls]
            a, count = moment(itertools.chain(*inputs), one=block.bias is not None)
            g, _ = moment(itertools.chain(*grads))
            use.inputs.append(self._kept(a / count, use.kind, len(a) - (block.bias is not None)))
            use.grads.append(self._kept(g / self.gradient_scale**2 / self.loss_terms, use.kind, len(g)))
        if any(use.inputs for use in block.uses) and (inversion_due or block.fisher is None):
            block.fisher = self.damped_fisher(block)

    def _kept(self, matrix: Tensor, kind: str, size: int) -> Tensor:
        return matrix.diagonal().diag() if size > self.max_factor_dim else matrix

    def factors(self, use: Use) -> tuple[Tensor, Tensor]:
        """A and G, averaged over the refreshes."""
        decay = self.group_of[use.module.weight]["stat_decay"]
        return average(use.inputs, decay), average(use.grads, decay)

    def damped_fisher(self, block: Block) -> Tensor:
        """The explicit matrix `(A + pi sqrt(damping)) (x) (G + sqrt(damping) / pi)` over the block's values."""
        uses, root = [use for use in block.uses if use.inputs], math.sqrt(self.group_of[block.weight]["damping"])
        if len(uses) == 1:
            a, g = self.factors(uses[0])
            outputs, inputs = uses[0].coordinates(block.bias is not None)
            pi = pi_of(a, g)
            damped_a = a + pi * root * torch.eye(len(a), dtype=torch.float64)
            damped_g = g + root / pi * torch.eye(len(g), dtype=torch.float64)
            return gathered(damped_g, outputs) * gathered(damped_a, inputs)
        # Tied: the partial traces of the sum, taken on the explicit matrix.
        fisher = torch.zeros(())
        for use in uses:
            a, g = self.factors(use)
            outputs, inputs = use.coordinates(False)
            fisher = fisher + gathered(g, outputs) * gathered(a, inputs)
        rows, columns = block.weight.shape[0], block.weight[0].numel()
        boxes = fisher.reshape(rows, columns, rows, columns)
        left, right = torch.einsum("acbc->ab", boxes), torch.einsum("acad->cd", boxes) / fisher.trace()
        pi = pi_of(left, right)
        left = left + pi * root * torch.eye(rows, dtype=torch.float64)
        right = right + root / pi * torch.eye(columns, dtype=torch.float64)
        return torch.kron(left, right)

    def _solved(self, block: Block) -> dict[Tensor, Tensor]:
        if block.fisher is None or all(p.grad is None for p in block.params):
            return {}
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.params]
        solution = torch.linalg.solve(block.fisher, torch.cat([g.double().flatten() for g in grads]))
        pieces = solution.split([p.numel() for p in block.params])
        found = zip(block.params, pieces, strict=True)
        return {p: piece.reshape(p.shape) for p, piece in found if p.grad is not None}
