"""Parameter groups of the optimizers that treat some weights otherwise than the rest.

Each function takes the model, the groups with and without weight decay, and the optimizer's arguments, from which it
takes what only the groups need.
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
    """Matrices, whose steps LARS scales by their norms, and vectors (biases, norms), which take plain SGD steps.

    A matrix of zeros, as one of a LoRA pair is at its start, has no norm to scale by: its first step is ``lr`` times
    the gradient. The decay is part of what the norms scale, so vectors have none; a warning names those that should.
    """
    lr, vector_lr = arguments["lr"], arguments.pop("vector_lr")
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"] if p.dim() <= 1}
    if decayed:
        names = [name for name, p in model.named_parameters() if id(p) in decayed]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning("LARS has no weight decay for vectors: %s%s are not decayed.", ", ".join(names[:3]), more)
    return split_groups(groups, lambda p: p.dim() > 1, {"lr": lr}, {"lr": vector_lr})


def muon_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Hidden matrices for Muon, everything else for its own AdamW.

    Muon scales its steps by sqrt(max(1, outputs / inputs)), for a weight stored as (outputs, inputs); those that are
    stored the other way round get groups with a learning rate (and a decay) that makes up for it.
    """
    lr, adamw_lr, decoupled = arguments["lr"], arguments["adamw_lr"], arguments.get("weight_decouple", True)
    log_roles("muon", model)
    hidden = {id(weight): _correction(weight.shape, transposed) for weight, transposed in hidden_matrices(model)}
    if arguments.get("use_adjusted_lr"):  # a scale that knows no direction
        hidden = dict.fromkeys(hidden, 1.0)
    split: Groups = []
    # Trainer logs the learning rate of the first group.
    for factor in sorted(set(hidden.values()), key=lambda factor: (factor != 1.0, factor)):
        chosen = {key for key, value in hidden.items() if value == factor}
        for part in chosen_groups(groups, chosen, {"use_muon": True, "lr": lr * factor}):
            # A decay that is part of the gradient is not multiplied by the learning rate.
            split.append({**part, "weight_decay": part["weight_decay"] / (factor if decoupled else 1.0)})
    rest = {id(p) for group in groups for p in group["params"]} - hidden.keys()
    return split + chosen_groups(groups, rest, {"use_muon": False, "lr": adamw_lr})


def _correction(shape: Any, transposed: bool) -> float:
    """What Muon's scale must be multiplied by for a weight stored as (inputs, outputs)."""
    return math.sqrt(shape[1] / shape[0]) if transposed else 1.0


def shampoo_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Full matrices for what has no side above ``max_side`` and is no embedding; the rest goes to AdamW."""
    tables, limit = embedding_tables(model), arguments.pop("max_side")
    return split_groups(
        groups,
        lambda p: id(p) not in tables and max(p.shape, default=1) <= limit,
        {"use_shampoo": True, "max_side": limit},
        {"use_shampoo": False, "max_side": limit},
    )


def soap_groups(model: nn.Module, groups: Groups, arguments: Arguments) -> Groups:
    """Embeddings and a language model's head are preconditioned along their width only, not along the vocabulary."""
    tables, limit = embedding_tables(model) | output_embeddings(model), arguments["max_precondition_dim"]
    widths = [min(p.shape) for group in groups for p in group["params"] if id(p) in tables]
    narrow = {"max_precondition_dim": min([limit, max(widths, default=limit)])}
    return split_groups(groups, lambda p: id(p) not in tables, {}, narrow)
