"""Exact diagonal of the Fisher of a small model, from the gradients of single examples.

For a model ``p(y | x)`` with examples ``x_n``, labels ``y_n`` and weights ``w``:

    ``empirical:  F = 1/M sum_n (d log p(y_n | x_n) / dw)^2``           labels of the data
    ``true:       F = 1/M sum_n sum_y p(y | x_n) (d log p(y | x_n) / dw)^2``     labels of the model's own distribution

with elementwise squares. For a classifier, an example is one image, ``M`` the number of examples, and the sum over
``y`` is made in full. For a causal language model, an example is a sequence, ``log p`` the sum over its predicted
tokens, and ``M`` the number of predicted tokens in all examples: the unit is one term of the loss in both cases. Given
their contexts, labels that are drawn from the model are independent and their gradients have mean zero: the true Fisher
of a sequence is the sum of its tokens', and labels drawn for all of them at once are right in expectation. With the
labels of the data, gradients of neighbouring tokens do correlate, and the empirical diagonal contains their products.

A layer that is used at many positions (tokens, pixels) has the gradient ``sum_t g_t x_t^T``, whose square has cross
terms between positions. AdaFisher's ``S (x) H = mean(g^2) mean(x^2)`` leaves these out, as well as the correlation of
``g`` and ``x``; a comparison with the exact diagonal measures the effect of both.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hf_adafisher.fisher.averages import statistics_dtype

logger = logging.getLogger(__name__)

KINDS = ("empirical", "true")
FEW_CLASSES = 100
"""Largest number of classes for a full sum over labels; beyond, and for tokens, labels are drawn."""
_IGNORED = -100
"""Label of tokens that are not predicted."""
_VALUES_AT_ONCE = 1 << 25
"""Largest number of values in the gradients of single examples that are held at the same time."""
_EXAMPLES_AT_ONCE = 64

Batch = Mapping[str, Any]
Diagonals = dict[str, Tensor]


@dataclass(frozen=True)
class ExactFisher:
    """Exact diagonal over a set of examples.

    Attributes:
        diagonals: Diagonal over all examples, by the parameter's name, in its shape.
        halves: Diagonals over every other example, half as many each. Their agreement shows the sampling noise of the
            diagonal. It is no ceiling: neither half is the truth, and an estimate that averages over more examples can
            be closer to ``diagonals`` than the halves are to each other.
        examples: Number of examples.
        terms: Number of terms of the loss in them, M.
        looped: True if examples were taken one by one.
    """

    diagonals: Diagonals
    halves: tuple[Diagonals, Diagonals]
    examples: int
    terms: int
    looped: bool


def exact_fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    kind: str = "empirical",
    *,
    draws: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    one_by_one: bool = False,
    progress: bool = False,
) -> ExactFisher:
    """Compute the exact diagonal of the Fisher for every trainable parameter; see the module for its definition.

    A copy of the model in evaluation mode does the work: no dropout, and BatchNorm with its running statistics, without
    which the gradient of a single example is not defined. Time: one forward and backward an example, times the classes
    (or ``draws``) for the true Fisher. Memory: ``chunk`` gradients of all parameters, and three more tensors of that
    size.

    Args:
        model: Returns logits, or an object with ``logits``: (batch, classes), or (batch, tokens, vocabulary) with
            labels that are shifted by one, as causal language models of transformers do.
        batches: Tensors with one row an example, by the names of the model's arguments, and ``labels`` (integers).
        kind: "empirical" or "true".
        draws: Labels drawn for each example where the true Fisher's sum over labels is too long, at least 1.
        seed: Seed of these labels.
        chunk: Number of examples at once; None for about 128 MiB, at most 64.
        one_by_one: Do not try ``torch.func.vmap``, for a model that is known not to support it.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument outside its range, no examples, labels that are no class numbers.
    """
    _check(batches, kind, draws, chunk)
    model = _prepared(model)
    gradients = _ExampleGradients(model, one_by_one)
    size = sum(p.numel() for p in gradients.params.values())
    chunk = chunk or min(_EXAMPLES_AT_ONCE, max(1, _VALUES_AT_ONCE // max(size, 1)))
    halves = tuple(
        {name: torch.zeros_like(p, dtype=statistics_dtype(p.dtype)) for name, p in gradients.params.items()}
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(seed)
    terms, examples = [0, 0], 0
    parts = [part for batch in batches for part in _split_batch(batch, chunk)]
    for inputs, labels in tqdm(parts, desc=f"{kind} Fisher", disable=not progress):
        member = (torch.arange(examples, examples + len(labels)) % 2).to(labels.device)
        examples += len(labels)
        for half in range(2):
            terms[half] += count_terms(labels[member == half])
        for chosen, weights in _label_sets(gradients, inputs, labels, kind, draws, generator):
            for name, gradient in gradients(inputs, chosen).items():
                squares = gradient.to(halves[0][name].dtype).square()
                for half in range(2):
                    halves[half][name] += torch.tensordot((weights * (member == half)).to(squares), squares, dims=1)
    total = {name: (halves[0][name] + halves[1][name]) / sum(terms) for name in gradients.params}
    each = [{name: value / max(terms[i], 1) for name, value in half.items()} for i, half in enumerate(halves)]
    return ExactFisher(total, (each[0], each[1]), examples, sum(terms), gradients.looped)


def _check(batches: Sequence[Batch], kind: str, draws: int, chunk: int | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    for name, value in (("draws", draws), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not sum(len(batch["labels"]) for batch in batches):
        raise ValueError("there are no examples: the Fisher is a mean over at least one")
    for batch in batches:
        labels = batch["labels"]
        if labels.is_floating_point() or labels.dim() not in (1, 2):
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)} and are {labels.dtype}; they must be class numbers "
                "(examples,) or token ids (examples, tokens)"
            )


def _prepared(model: nn.Module) -> nn.Module:
    """Copy in evaluation mode that does not search texts without a mask for padding, which vmap could not."""
    model = copy.deepcopy(model).eval()
    config: Any = getattr(model, "config", None)
    if getattr(config, "pad_token_id", None) is not None:
        config.pad_token_id = None
    return model


def count_terms(labels: Tensor) -> int:
    """Count the terms of the loss of a batch: its examples (N,), or the predicted tokens of (N, T)."""
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != _IGNORED).sum())


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p(labels)`` of one example, in nats, a scalar.

    Args:
        logits: Shape (classes,) or (tokens, vocabulary).
        labels: A class number (), or ids (tokens,), of which the first and those of -100 are not predicted.
    """
    if labels.dim() == 0:
        return logits.log_softmax(-1).gather(-1, labels[None])[0]
    scores, targets = logits[:-1].log_softmax(-1), labels[1:]
    picked = scores.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return (picked * (targets != _IGNORED)).sum()


class _ExampleGradients:
    """Gradients of ``log p(labels)`` of each example of a batch, all at once where the model supports vmap."""

    def __init__(self, model: nn.Module, looped: bool = False) -> None:
        self.model = model
        self.params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.looped = looped
        self._at_once = torch.func.vmap(torch.func.grad(self._score), in_dims=(None, 0, 0))

    def _score(self, params: Diagonals, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        batch = {key: value.unsqueeze(0) for key, value in inputs.items()}
        return log_likelihood(logits_of(torch.func.functional_call(self.model, params, (), batch))[0], labels)

    def __call__(self, inputs: dict[str, Tensor], labels: Tensor) -> Diagonals:
        """Compute the gradients, by the parameter's name, shape (examples, *parameter)."""
        if not self.looped:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the others go through a batch one by one
                    return self._at_once(self.params, inputs, labels)
            except Exception as error:  # the loop shows if vmap was its cause
                self.looped = True
                reason = str(error).strip().partition("\n")[0]
                logger.warning(
                    "torch.func.vmap cannot run %s (%s): examples are taken one by one, which is slower",
                    type(self.model).__name__,
                    reason,
                )
        rows = [self._one({key: v[i : i + 1] for key, v in inputs.items()}, labels[i]) for i in range(len(labels))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.params}

    def _one(self, batch: dict[str, Tensor], labels: Tensor) -> Diagonals:
        trained = dict(self.model.named_parameters())
        with torch.enable_grad():
            score = log_likelihood(logits_of(self.model(**batch))[0], labels)
            found = torch.autograd.grad(score, [trained[name] for name in self.params], allow_unused=True)
        pairs = zip(self.params.items(), found, strict=True)
        return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}

    @torch.no_grad()
    def probabilities(self, inputs: dict[str, Tensor]) -> Tensor:
        """Model's own distribution over labels, in the shape of its logits."""
        logits = logits_of(self.model(**inputs))
        return logits.to(statistics_dtype(logits.dtype)).softmax(-1)


def logits_of(outputs: Any) -> Tensor:
    """Logits of a model's outputs."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _split_batch(batch: Batch, chunk: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Split a batch into the inputs and labels of at most ``chunk`` examples each."""
    inputs = {key: value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)}
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):  # no information, and models look at its values, which vmap cannot
        del inputs["attention_mask"]
    labels = batch["labels"]
    for start in range(0, len(labels), chunk):
        yield {key: value[start : start + chunk] for key, value in inputs.items()}, labels[start : start + chunk]


def _label_sets(
    gradients: _ExampleGradients,
    inputs: dict[str, Tensor],
    labels: Tensor,
    kind: str,
    draws: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels to take gradients for, and the weight of each example's square."""
    if kind == "empirical":
        yield labels, torch.ones(len(labels), device=labels.device)
        return
    shares = gradients.probabilities(inputs)
    if labels.dim() == 1 and shares.shape[-1] <= FEW_CLASSES:
        for number in range(shares.shape[-1]):
            yield torch.full_like(labels, number), shares[:, number]
        return
    flat = shares.reshape(-1, shares.shape[-1]).float().cpu()
    for _ in range(draws):
        drawn = torch.multinomial(flat, 1, generator=generator).reshape(shares.shape[:-1]).to(labels)
        if labels.dim() == 2:  # each position predicts the next one
            drawn = torch.where(labels[:, 1:] == _IGNORED, labels[:, 1:], drawn[:, :-1])
            drawn = torch.cat([labels[:, :1], drawn], dim=1)
        yield drawn, torch.full((len(labels),), 1.0 / draws, dtype=shares.dtype, device=labels.device)
