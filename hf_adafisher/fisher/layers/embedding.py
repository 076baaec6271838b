"""``torch.nn.Embedding``: a Linear over one-hot rows, so its input factor is exactly the token frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hf_adafisher.fisher.averages import statistics_dtype, sum_of_squares
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, KroneckerDiagonal, ParameterDiagonal
from hf_adafisher.fisher.layers.registry import PROBE_ROWS, LayerRule, register_layer, second_moment, weight_of

_SHORTEST_TABLE = 4


class EmbeddingRule(LayerRule):
    """``y = W[id]``: ``F_W = H (x) S`` with ``H_v`` the share of positions holding token ``v``; weight ``(V, d)``.

    The row of ``padding_idx`` gets no gradient from torch: its one-hot vector is zero. As for a Linear with such an
    input, its positions have no part in ``H`` but count in the number of positions and in ``S``.
    """

    name = "Embedding"
    input_numbers_rows = True

    @override
    def diagonals(self, module: nn.Module) -> Mapping[str, ParameterDiagonal]:
        return {"weight": KroneckerDiagonal((INPUT, OUTPUT_GRAD))}

    @override
    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vocabulary, width = weight_of(module).shape
        return (vocabulary,), (width,)

    @override
    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        ids = inputs[0].detach().reshape(-1)
        counts = torch.bincount(ids, minlength=weight_of(module).shape[0])
        if isinstance(module.padding_idx, int):
            counts[module.padding_idx] = 0
        return counts.to(statistics_dtype(weight_of(module).dtype)), ids.numel()

    @override
    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        return sum_of_squares(grad, weight_of(module).shape[1])

    def full_factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The moment of one-hot rows is diagonal: the token frequencies themselves."""
        vocabulary, width = weight_of(module).shape
        return (vocabulary,), (width, width)

    @override
    def full_input_sums(
        self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor, with_one: bool = False
    ) -> tuple[Tensor, int]:
        assert not with_one, "an Embedding has no bias"
        return self.input_sums(module, inputs, output)

    @override
    def full_output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        return second_moment(grad.reshape(-1, weight_of(module).shape[1]))

    def broadcasts_over_batch(self, inputs: Sequence[Tensor]) -> bool:
        """A single row of consecutive ids: transformers look positions up once and add them to every example.

        Shorter rows than four may be tokens, or classes, that happen to follow each other.
        """
        ids = inputs[0]
        if ids.numel() < _SHORTEST_TABLE or ids.numel() != ids.shape[-1]:
            return False
        row = ids.reshape(-1)
        return bool((row[1:] - row[:-1] == 1).all())

    @override
    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        if type(module).forward is nn.Embedding.forward:
            return True
        # Subclasses may scale the rows (Gemma) but not look up other rows than their argument names (OPT, BART).
        ids, width = inputs[0], weight_of(module).shape[1]
        if ids.is_floating_point() or output.numel() != ids.numel() * width or ids.numel() == 0:
            return False
        rows = weight_of(module).detach()[ids.reshape(-1)[:PROBE_ROWS].clamp(0, weight_of(module).shape[0] - 1)].float()
        cosine = F.cosine_similarity(rows, output.detach().reshape(-1, width)[:PROBE_ROWS].float(), dim=-1)
        return bool(((cosine > 0.99) | (rows.abs().amax(dim=-1) == 0)).all())


register_layer(nn.Embedding, EmbeddingRule())
