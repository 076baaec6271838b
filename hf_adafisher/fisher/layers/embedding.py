"""``torch.nn.Embedding``: a Linear over one-hot rows, so its input factor is exactly the token frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adafisher.fisher.factors import statistics_dtype, sum_of_squares
from hf_adafisher.fisher.forms import INPUT, OUTPUT_GRAD, KroneckerForm, ParameterForm
from hf_adafisher.fisher.layers.registry import LayerRule, register_layer

_PROBE_ROWS = 8


class EmbeddingRule(LayerRule):
    """``y = W[id]``: ``F_W = H (x) S`` with ``H_v`` the share of positions holding token ``v``; weight ``(V, d)``."""

    name = "Embedding"

    def forms(self, module: nn.Module) -> Mapping[str, ParameterForm]:
        return {"weight": KroneckerForm((INPUT, OUTPUT_GRAD))}

    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vocabulary, width = module.weight.shape
        return (vocabulary,), (width,)

    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        ids = inputs[0].detach().reshape(-1)
        counts = torch.bincount(ids, minlength=module.weight.shape[0])
        return counts.to(statistics_dtype(module.weight.dtype)), ids.numel()

    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        return sum_of_squares(grad, module.weight.shape[1])

    def explains(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        if type(module).forward is nn.Embedding.forward:
            return True
        # Subclasses may scale the rows (Gemma) but not look up other rows than their argument names (OPT, BART).
        ids, width = inputs[0], module.weight.shape[1]
        if ids.is_floating_point() or output.numel() != ids.numel() * width or ids.numel() == 0:
            return False
        rows = module.weight.detach()[
            ids.reshape(-1)[:_PROBE_ROWS].clamp(0, module.weight.shape[0] - 1)
        ].float()
        cosine = F.cosine_similarity(rows, output.detach().reshape(-1, width)[:_PROBE_ROWS].float(), dim=-1)
        return bool(((cosine > 0.99) | (rows.abs().amax(dim=-1) == 0)).all())


register_layer(nn.Embedding, EmbeddingRule())
