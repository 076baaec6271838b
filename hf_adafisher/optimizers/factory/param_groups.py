"""Parameter groups: with and without weight decay by Trainer's own rule; hidden matrices, heads and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_adafisher.fisher.layers.linear import Conv1DRule
from hf_adafisher.fisher.layers.registry import find_rule

Groups = list[dict[str, Any]]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that weight decay applies to, as ``transformers.Trainer`` decides it.

    Everything but biases and normalisation layers. Trainer's method is called itself, so that the two never differ.
    """
    from transformers import Trainer

    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it does not use self


def decay_groups(model: nn.Module, weight_decay: float, decay_names: Collection[str] | None = None) -> Groups:
    """Build two parameter groups, as Trainer does: with weight decay, and (biases, norms) without.

    Args:
        model: The model; parameters that do not require grad are left out.
        weight_decay: Decay of the first group.
        decay_names: Names of the parameters to decay. Default: ``decay_parameter_names``.

    Returns:
        Always two groups in this order, so that a checkpoint restores by position; one of them may be empty.

    Raises:
        ValueError: The model has no trainable parameter.
    """
    names = set(decay_parameter_names(model) if decay_names is None else decay_names)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad=True on what should be trained"
        )
    return [
        {"params": [p for name, p in trainable if name in names], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in names], "weight_decay": 0.0},
    ]


def chosen_groups(groups: Groups, ids: Collection[int], options: dict[str, Any]) -> Groups:
    """Reduce groups to the parameters with these ids, with further options.

    Groups that are then empty are left out, so that their number depends on the model alone.
    """
    parts = [{**group, **options, "params": [p for p in group["params"] if id(p) in ids]} for group in groups]
    return [part for part in parts if part["params"]]


def split_groups(groups: Groups, chosen: Callable[[Tensor], bool], yes: dict[str, Any], no: dict[str, Any]) -> Groups:
    """Split each group in two, with further options for either part; those of ``chosen`` come first."""
    params = [p for group in groups for p in group["params"]]
    ids = {id(p) for p in params if chosen(p)}
    return chosen_groups(groups, ids, yes) + chosen_groups(groups, {id(p) for p in params} - ids, no)


def embedding_tables(model: nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings, heads tied to them included."""
    return {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}


def output_embeddings(model: nn.Module) -> set[int]:
    """Return the ids of language model heads' weights, tied or not, by ``get_output_embeddings``, also in wrappers."""
    heads = set()
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        weight = getattr(find() if callable(find) else None, "weight", None)
        if isinstance(weight, Tensor):
            heads.add(id(weight))
    return heads


class Matrix(NamedTuple):
    """A weight that multiplies vectors. ``transposed``: stored as (inputs, outputs), as transformers' Conv1D does."""

    weight: Tensor
    transposed: bool


def hidden_matrices(model: nn.Module) -> list[Matrix]:
    """Return the weights between input and output layer: of Linear, transformers' Conv1D, and convolutions.

    Left out: embeddings and what is tied to them; the heads, which are a language model's output embeddings and
    layers outside the base model with ``config.num_labels`` outputs, or, in a model without a ``config``, the last
    matrix; the first convolution, which reads pixels or sound; convolutions with several groups, which
    are many small matrices; parameters that no such layer owns (class tokens, position tables, fused experts).
    """
    modules = _named_matrices(model)
    outside = embedding_tables(model) | {id(weight) for weight in _heads(model, modules)}
    outside |= {id(m.weight) for m in [m for m in model.modules() if isinstance(m, _CONVOLUTIONS)][:1]}
    return _matrices(modules, lambda weight: id(weight) not in outside)


def head_matrices(model: nn.Module) -> list[Matrix]:
    """Return the weights of output layers, which ``hidden_matrices`` leaves out, also those tied to an embedding."""
    modules = _named_matrices(model)
    heads = {id(weight) for weight in _heads(model, modules)}
    return _matrices(modules, lambda weight: id(weight) in heads)


def _named_matrices(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules that multiply by a matrix, with their names."""
    return [(name, module) for name, module in model.named_modules() if _is_matrix(module)]


def _matrices(modules: Iterable[tuple[str, Any]], chosen: Callable[[Tensor], bool]) -> list[Matrix]:
    """Return the chosen weights of these modules, each once; those of several groups are no matrices."""
    found = {
        id(module.weight): Matrix(module.weight, isinstance(find_rule(module), Conv1DRule))
        for _, module in modules
        if chosen(module.weight) and getattr(module, "groups", 1) == 1
    }
    return list(found.values())


def _is_matrix(module: nn.Module) -> bool:
    of_kind = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or isinstance(find_rule(module), Conv1DRule)
    return of_kind and isinstance(module.weight, Tensor) and module.weight.dim() >= 2


def _heads(model: nn.Module, matrices: Iterable[tuple[str, Any]]) -> Iterator[Tensor]:
    matrices = list(matrices)
    known = output_embeddings(model)
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    base = getattr(model, "base_model_prefix", None)
    heads = [
        module.weight
        for name, module in matrices
        if id(module.weight) in known
        or (base and base not in name.split(".") and _outputs(module) == labels and hasattr(model, base))
    ]
    if not heads and not known and not hasattr(model, "config"):
        heads = [module.weight for _, module in matrices[-1:]]
    yield from heads


def _outputs(module: Any) -> int:
    return module.weight.shape[1 if isinstance(find_rule(module), Conv1DRule) else 0]
