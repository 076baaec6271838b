"""Parameter groups of baselines that have different rules for different weights.

Each function takes the model, its parameter groups with and without weight decay, and the optimizer's arguments, and
returns new groups. Arguments that belong to groups alone are removed from the dictionary.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from hf_adafisher.optimizers.factory.param_groups import (
    Groups,
    chosen_groups,
    embedding_tables,
    hidden_matrices,
    log_roles,
    output_embeddings,
    split_groups,
)

logger = logging.getLogger(__name__)

Arguments = dict[str, Any]


def lars_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Split groups for LARS: matrices take steps scaled by their norms, vectors take plain SGD steps.

    A matrix of zeros, such as one of a new LoRA pair, has no norm to scale by; its first step is ``lr`` times the
    gradient. LARS scales the weight decay together with the gradient, so vectors have none. A warning names vectors in
    groups with weight decay.
    """
    lr, vector_lr = arguments["lr"], arguments.pop("vector_lr")
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"] if p.dim() <= 1}
    if decayed:
        names = [name for name, p in model.named_parameters() if id(p) in decayed]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning("LARS has no weight decay for vectors: %s%s are not decayed.", ", ".join(names[:3]), more)
    return split_groups(groups, lambda p: p.dim() > 1, {"lr": lr}, {"lr": vector_lr})


def muon_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Split groups for Muon: hidden matrices take Muon's steps, all other parameters those of its AdamW.

    Muon scales steps by ``sqrt(max(1, outputs / inputs))`` for weights stored as (outputs, inputs). Weights stored as
    (inputs, outputs) get groups whose learning rate and weight decay correct the scale.
    """
    lr, adamw_lr, decoupled = arguments["lr"], arguments["adamw_lr"], arguments.get("weight_decouple", True)
    log_roles("muon", model)
    hidden = {id(weight): _correction(weight.shape, transposed) for weight, transposed in hidden_matrices(model)}
    if arguments.get("use_adjusted_lr"):  # its scale is the same for both storage orders
        hidden = dict.fromkeys(hidden, 1.0)
    split: Groups = []
    # Trainer logs the learning rate of the first group.
    for factor in sorted(set(hidden.values()), key=lambda factor: (factor != 1.0, factor)):
        same_factor = {key for key, value in hidden.items() if value == factor}
        for group in chosen_groups(groups, same_factor, {"use_muon": True, "lr": lr * factor}):
            # A decay that is part of the gradient is not multiplied by the learning rate.
            split.append({**group, "weight_decay": group["weight_decay"] / (factor if decoupled else 1.0)})
    others = {id(p) for group in groups for p in group["params"]} - hidden.keys()
    return split + chosen_groups(groups, others, {"use_muon": False, "lr": adamw_lr})


def _correction(shape: Any, transposed: bool) -> float:
    """Correction factor of Muon's scale for a weight stored as (inputs, outputs)."""
    return math.sqrt(shape[1] / shape[0]) if transposed else 1.0


def shampoo_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Split groups for Shampoo: embeddings and weights with a side above ``max_side`` take AdamW's steps."""
    tables, limit = embedding_tables(model), arguments.pop("max_side")
    return split_groups(
        groups,
        lambda p: id(p) not in tables and max(p.shape, default=1) <= limit,
        {"use_shampoo": True, "max_side": limit},
        {"use_shampoo": False, "max_side": limit},
    )


def soap_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Split groups for SOAP: embeddings and language model heads are preconditioned along their width only."""
    tables, limit = embedding_tables(model) | output_embeddings(model), arguments["max_precondition_dim"]
    widths = [min(p.shape) for group in groups for p in group["params"] if id(p) in tables]
    narrow = {"max_precondition_dim": min([limit, max(widths, default=limit)])}
    return split_groups(groups, lambda p: id(p) not in tables, {}, narrow)
