"""Parameter groups: with and without weight decay by Trainer's own rule; hidden matrices, heads and embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_adafisher.fisher.layers.linear import Conv1DRule
from hf_adafisher.fisher.layers.registry import find_rule

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHOWN = 5


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

    Left out: embeddings and what is tied to them; the heads (``head_matrices``); the first convolution, which reads
    pixels or sound; convolutions with several groups, which are many small matrices; parameters that no such layer owns
    (class tokens, position tables, fused experts).
    """
    outside = embedding_tables(model) | _heads(model)
    outside |= {id(matrix.weight) for matrix in input_matrices(model)}
    return _distinct(m for m in _matrices(model) if id(m.weight) not in outside)


def input_matrices(model: nn.Module) -> list[Matrix]:
    """Return the weight of the first convolution, which reads pixels or sound, unless it is the output layer too."""
    first = [module for module in model.modules() if isinstance(module, _CONVOLUTIONS)][:1]
    return _distinct(m for m in first if m.weight is not None and id(m.weight) not in _heads(model))


def head_matrices(model: nn.Module) -> list[Matrix]:
    """The weights of the output layers that ``hidden_matrices`` leaves out, those tied to an embedding included.

    They are, whatever wraps the model (PEFT, a module of your own):

    * a language model's output embeddings;
    * of the layers of a transformers model outside its base model those with ``config.num_labels`` outputs, or, where
      there are neither, the last one;
    * in a model that is not transformers', or around a base model of theirs, the last matrix.
    """
    heads = _heads(model)
    return _distinct(m for m in _matrices(model) if id(m.weight) in heads)


def roles(model: nn.Module) -> dict[int, str]:
    """``"hidden matrix"``, ``"input"``, ``"table"``, ``"head"`` or ``"table and head"``, by ``id(parameter)``.

    Others (vectors, position tables that are no embeddings, class tokens) have none.
    """
    tables, heads = embedding_tables(model), {id(m.weight) for m in head_matrices(model)}
    found = {id(m.weight): "hidden matrix" for m in hidden_matrices(model)}
    found |= {id(m.weight): "input" for m in input_matrices(model)}
    found |= dict.fromkeys(tables, "table") | dict.fromkeys(heads, "head")
    return found | dict.fromkeys(tables & heads, "table and head")


def log_roles(kind: str, model: nn.Module) -> None:
    """Log which trained parameters were taken for what; ``coverage()`` of optimizers with factors lists them all."""
    by_role: dict[str, list[str]] = {}
    known = roles(model)
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) in known:
            by_role.setdefault(known[id(p)], []).append(name)
    shown = [f"{role}: {', '.join(names[:_SHOWN])}{_more(len(names))}" for role, names in by_role.items()]
    logger.info("%s treats as %s", kind, "; as ".join(shown) or "vectors all parameters")


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


def _matrices(model: nn.Module) -> list[Any]:
    """The modules that multiply by a matrix."""
    return [module for module in model.modules() if _is_matrix(module)]


def _distinct(modules: Iterable[Any]) -> list[Matrix]:
    """The weights of these modules, each once; those of several groups are no matrices."""
    found = {
        id(module.weight): Matrix(module.weight, isinstance(find_rule(module), Conv1DRule))
        for module in modules
        if getattr(module, "groups", 1) == 1
    }
    return list(found.values())


def _is_matrix(module: nn.Module) -> bool:
    of_kind = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or isinstance(find_rule(module), Conv1DRule)
    return of_kind and isinstance(module.weight, Tensor) and module.weight.dim() >= 2


def _heads(model: nn.Module) -> set[int]:
    """Ids of the weights of output layers, tied or not."""
    known = output_embeddings(model)
    parts = list(_transformers_models(model))
    heads = known.union(*(_heads_of_part(part, known) for part in parts))
    inside = {id(module) for part in parts for module in part.modules()}
    around = [module for module in _matrices(model) if id(module) not in inside]
    return heads or {id(module.weight) for module in around[-1:]}


def _transformers_models(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost models of transformers in a module; wrappers (PEFT's) pass attributes on, but not their class."""
    if getattr(type(module), "base_model_prefix", ""):
        yield module
    else:
        for child in module.children():
            yield from _transformers_models(child)


def _heads_of_part(part: Any, known: Collection[int]) -> set[int]:
    """Ids of the weights of a transformers model's output layers that are no output embeddings."""
    base = getattr(part, type(part).base_model_prefix, None)
    inside = {id(module) for module in base.modules()} if isinstance(base, nn.Module) else set()
    outside = [module for module in _matrices(part) if id(module) not in inside]
    labels = getattr(getattr(part, "config", None), "num_labels", None)
    if not inside:  # a base model itself, or one with a head beside layers of its own
        outside = [module for module in outside[-1:] if _outputs(module) == labels]
    of_labels = [module for module in outside if _outputs(module) == labels or id(module.weight) in known]
    return {id(module.weight) for module in of_labels or outside[-1:]}


def _outputs(module: Any) -> int:
    return module.weight.shape[1 if isinstance(find_rule(module), Conv1DRule) else 0]
