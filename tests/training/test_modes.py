"""Different ways to run the same training: accumulated, checkpointed, interrupted, in bfloat16, over broken batches.

Each test compares whole runs, in weights and optimizer state, with `assert_same_training`. D-numbers are those of
`tests/test_regressions.py`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_adafisher import AdaFisherTrainer, AdaFisherW, create_optimizer
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from tests.cases import CASES, WORDS
from tests.equivalence import Training, assert_same_training, moved, training_of
from tests.model_zoo import Family, family
from tests.training_helper import FORMS, built, hook_count, logged_losses, make_trainer, of_form, train

each_form = pytest.mark.parametrize("form", FORMS)
BY_NAME = {case.name: case for case in CASES}
OPTIONS: dict[str, Any] = {
    "logging_strategy": "no",
    "learning_rate": 0.02,
    "damping": 1e-2,
    "weight_decay": 0.01,
    "ema_decay": 0.8,
    "update_interval": 2,
}
Examples = list[dict[str, Tensor]]


def trainer_of(
    folder: Path,
    record: Family,
    examples: Examples,
    *callbacks: TrainerCallback,
    model: Any = None,
    form: str = "paper",
    **options: Any,
) -> AdaFisherTrainer:
    """A trainer of a fresh model."""
    given = {"train_dataset": examples, "eval_dataset": examples[:3], "callbacks": list(callbacks)}
    options = of_form(form, **(OPTIONS | options))
    return make_trainer(folder, record, model=model or record.build(), **given, **options)


def trained(*args: Any, **options: Any) -> AdaFisherTrainer:
    """The same, trained."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def half_masked(record: Family, n: int) -> Examples:
    """Examples with different numbers of labels, so that a mean of means is not the mean."""
    examples = record.dataset(n)
    for i, example in enumerate(examples):
        example["labels"][: 1 + 3 * (i % 4)] = -100
    return examples


def weights_of_averages(optimizer: KroneckerDiagonalOptimizer) -> set[float]:
    """The weight of every moving average in the state."""
    return {
        value.item()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith("factor_weight")
    }


# --------------------------------------------------------------------------------------------------
# Gradient accumulation
# --------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("name", ["mlp", "tied", "norm", "experts"])
def test_d15_micro_batches_in_a_plain_loop(name: str, form: str) -> None:
    """D15: k micro-batches are one batch, and one update of the factors, not k."""
    case, gamma, steps, k = BY_NAME[name], 0.7, 5, 4
    runs = []
    for parts in (1, k):
        model = case.build().double()
        optimizer = built(form, model, lr=0.05, damping=0.1, ema_decay=gamma, update_interval=2)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            if name == "tied":
                whole: Tensor = torch.randint(0, WORDS, (2 * k, 6), generator=generator)
            else:
                inner = (4, 4) if name == "norm" else (4,)
                whole = torch.randn(2 * k, *inner, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            for part in whole.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
        runs.append(Training(model, optimizer))
        refreshes = 3 if form == "paper" else steps  # at steps 0, 2 and 4
        assert optimizer.param_groups[0]["refreshes"] == refreshes
        for weight in weights_of_averages(optimizer):
            assert weight == pytest.approx(1 - gamma**refreshes)
    assert_same_training(*runs)
    assert moved(runs[0], case.build().double())


def rounding(form: str) -> dict[str, float]:
    """Tolerances of two float32 trainings: small singular values of a momentum, rounding noise too, grow 293-fold.

    By the root small gradients make steps as large as any.
    """
    return {} if form == "paper" else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(
    ("name", "form"),
    # Not GPT-2 by the root: the gradient of its keys' bias is rounding noise, which makes steps of full size.
    [("gpt2", "paper"), ("llama", "paper"), ("llama", "root"), ("llama", "spectral")],
)
def test_d15_accumulation_in_trainer(name: str, form: str, tmp_path: Path) -> None:
    """D15: under Trainer, with labels masked in part; the epoch's last, incomplete window trains and counts."""
    record, n, k, epochs, gamma = family(name), 10, 4, 2, 0.8
    examples = half_masked(record, n)
    options = {"update_interval": 1, "num_train_epochs": epochs, "ema_decay": gamma, "form": form}
    whole = trained(tmp_path, record, examples, per_device_train_batch_size=k, **options)
    split = trained(tmp_path, record, examples, per_device_train_batch_size=1, gradient_accumulation_steps=k, **options)
    assert_same_training(split, whole, **rounding(form))
    assert moved(split, record.build())
    steps = epochs * math.ceil(n / k)
    for trainer in (split, whole):
        optimizer = training_of(trainer).optimizer
        group = optimizer.param_groups[0]
        assert trainer.state.global_step == group["steps"] == group["refreshes"] == steps == 6
        for weight in weights_of_averages(optimizer):
            assert weight == pytest.approx(1 - gamma**steps)


def mean_over_items(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A language model's own loss, written as a user of `compute_loss_func` would."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("loss", ["compute_loss_func", "label_smoothing_factor"])
def test_accumulation_with_another_loss(loss: str, tmp_path: Path) -> None:
    """Both divide by the items of the whole window, as the model's own loss does, which the first equals."""
    record, k = family("llama"), 4
    examples, runs = half_masked(record, 12), []
    given = {"label_smoothing_factor": 0.3} if loss == "label_smoothing_factor" else {}
    func = mean_over_items if loss == "compute_loss_func" else None
    for rows, parts, function in ((k, 1, func), (1, k, func), (1, k, None)):
        options = {"max_steps": 3, "per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, **given}
        runs.append(trained(tmp_path, record, examples, compute_loss_func=function, **options))
    assert_same_training(runs[1], runs[0])
    assert_same_training(runs[2], runs[1])
    assert moved(runs[0], record.build())
    own = trained(tmp_path, record, examples, max_steps=3, per_device_train_batch_size=k)
    difference = max(
        float((p - q).detach().abs().max())
        for p, q in zip(runs[0].model.parameters(), own.model.parameters(), strict=True)
    )
    assert (difference > 1e-4) == bool(given), "label smoothing changes the run, the same loss does not"


@each_form
def test_accumulation_in_an_accelerate_loop(form: str) -> None:
    """`accelerator.accumulate`: k micro-batches are one batch in a plain loop, in weights and in factors."""
    case, steps, k = BY_NAME["mlp"], 5, 4
    batches = [
        torch.randn(2 * k, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for step in range(steps)
    ]
    plain = case.build().double()
    optimizer = built(form, plain, lr=0.05, damping=0.1, update_interval=2)
    train(plain, lambda model, step: model(batches[step]).square().mean(), optimizer, steps)
    model = case.build().double()
    raw = built(form, model, lr=0.05, damping=0.1, update_interval=2)
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
        prepared, wrapped = accelerator.prepare(model, raw)
        for batch in batches:
            for part in batch.chunk(k):
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(part).square().mean())
                    wrapped.step()
                    wrapped.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert raw.param_groups[0]["steps"] == steps
    assert raw.param_groups[0]["refreshes"] == (3 if form == "paper" else steps)
    assert_same_training(Training(model, raw), Training(plain, optimizer))
    assert moved(Training(model, raw), case.build().double())


@pytest.mark.parametrize("averaged", [True, False])
def test_the_scale_of_the_loss_where_each_process_counts_its_own_items(
    averaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes with 16 items each: in the loss averaged over them each position weighs 1/48.

    Trainer says 48 where it counts over all processes, and 16 where each counts its own.
    """
    trainer = trainer_of(tmp_path, family("gpt2"), [], average_tokens_across_devices=averaged)
    optimizer: Any = trainer.create_optimizer()
    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.zeros(()))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    trainer.training_step(trainer.model, {}, torch.tensor(48 if averaged else 16))
    assert optimizer.gradient_scale == pytest.approx(1 / 48)


# --------------------------------------------------------------------------------------------------
# Gradient checkpointing
# --------------------------------------------------------------------------------------------------


# A layer inside a checkpointed block, but not its last, whose recomputation stops before the end.
COUNTED = {
    "gpt2": "transformer.h.0.mlp.c_fc",
    "llama": "model.layers.0.mlp.up_proj",
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
}


def checkpoint_by_hand(model: nn.Module, reentrant: bool) -> None:
    """Checkpoint albert's one layer, for which transformers has no switch."""
    layer = next(module for module in model.modules() if type(module).__name__ == "AlbertLayer")
    forward = layer.forward

    def recomputed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda y: forward(y, *args, **kwargs), x, use_reentrant=reentrant)

    layer.forward = recomputed  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize(
    ("name", "form"),
    [("gpt2", "paper"), ("llama", "paper"), ("albert", "paper"), ("gpt2", "root"), ("gpt2", "spectral")],
)
def test_d16_gradient_checkpointing(name: str, form: str, reentrant: bool, tmp_path: Path) -> None:
    """D16: recomputed forwards count once, also those of albert's one layer, which is called several times."""
    record = family(name)
    examples = record.dataset(12)
    options: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options["form"] = form
    runs, calls = [], []
    for checkpointing in (False, True):
        model = record.build()
        counts = CountCalls(model.get_submodule(COUNTED[name]))
        if checkpointing and name == "albert":
            checkpoint_by_hand(model, reentrant)
        elif checkpointing:
            options |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        runs.append(trained(tmp_path, record, examples, model=model, **options))
        calls.append(counts.calls)
    assert calls[1] == 2 * calls[0] > 0, "checkpointing was not on"
    # Reentrant, albert's one layer gets its gradient call by call, in another order of additions.
    assert_same_training(runs[1], runs[0], bitwise=not (name == "albert" and reentrant))
    assert moved(runs[0], record.build())


class CountCalls:
    """Counts the calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.calls += 1


# --------------------------------------------------------------------------------------------------
# Interruptions
# --------------------------------------------------------------------------------------------------


class Interruptions(TrainerCallback):
    """Evaluates, predicts and generates after every step, and within every accumulation window."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.count = 0

    def interrupt(self) -> None:
        """All three, the last in both modes of the model."""
        self.count += 1
        model = self.trainer.model
        batch = self.trainer.train_dataset[:2]
        tokens = torch.stack([example["input_ids"] for example in batch])
        self.trainer.evaluate()
        self.trainer.predict(batch)
        for training in (False, True):
            model.train(training)
            model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
        model.train()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.interrupt()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.interrupt()


@pytest.mark.parametrize(("name", "form"), [("gpt2", "paper"), ("t5", "paper"), ("gpt2", "root"), ("gpt2", "spectral")])
def test_d20_evaluation_prediction_and_generation_change_nothing(name: str, form: str, tmp_path: Path) -> None:
    """D20: what does not train leaves no trace, in an armed window or not."""
    record = family(name)
    examples = record.dataset(12)
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options["form"] = form
    plain = trained(tmp_path, record, examples, **options)
    interruptions = Interruptions()
    interrupted = trainer_of(tmp_path, record, examples, interruptions, **options)
    interruptions.trainer = interrupted
    interrupted.train()
    assert interruptions.count == 8
    assert_same_training(interrupted, plain, bitwise=True)
    assert moved(plain, record.build())


# --------------------------------------------------------------------------------------------------
# bfloat16
# --------------------------------------------------------------------------------------------------


def raw_diagonals(trainer: AdaFisherTrainer) -> dict[str, Tensor]:
    """Diagonals before normalisation, in units of their largest entry; those of hidden matrices may be missing."""
    training = training_of(trainer)
    missing = {row.name for row in training.optimizer.coverage() if row.rule == "momentum's rows and columns"}
    diagonals = {
        name: training.optimizer.fisher_diagonal(p, normalized=False)
        for name, p in training.model.named_parameters()
        if name not in missing
    }
    return {name: diagonal / diagonal.max() for name, diagonal in diagonals.items()}


@each_form
@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_d18_bfloat16_under_trainer(mode: str, form: str, tmp_path: Path) -> None:
    """D18: it learns, statistics are float32 and, after one step, those of float32 up to bfloat16's rounding."""
    record = family("gpt2")
    examples = record.dataset(8)

    def run(steps: int, low: bool) -> AdaFisherTrainer:
        model = record.build()
        if low and mode == "weights":
            model.to(torch.bfloat16)
        options = {"max_steps": steps, "per_device_train_batch_size": 8, "bf16": low and mode == "autocast"}
        options |= {"logging_strategy": "steps", "logging_steps": 1, "form": form}
        return trained(tmp_path, record, examples, model=model, **options)

    exact, rounded = raw_diagonals(run(1, low=False)), raw_diagonals(run(1, low=True))
    for name, diagonal in rounded.items():
        assert diagonal.dtype == torch.float32
        assert_close(diagonal, exact[name], rtol=0.1, atol=0.02, msg=lambda text, where=name: f"{where}: {text}")
    trainer = run(24, low=True)
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0] - 0.5
    training = training_of(trainer)
    kept = torch.bfloat16 if mode == "weights" else torch.float32
    for p in training.model.parameters():
        state = training.optimizer.state[p]
        assert p.dtype == state["exp_avg"].dtype == kept
        assert {value.dtype for key, value in state.items() if key.endswith("_factor")} <= {torch.float32}
        assert all(value.isfinite().all() for value in state.values()) and p.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Broken, empty and tiny batches in a plain loop
# --------------------------------------------------------------------------------------------------

Gradients = Callable[[nn.Module], bool]
"""Makes gradients, and says whether the loop can use them."""


def loop(record: Family, *batches: Gradients, update_interval: int = 2) -> Training:
    """A loop that takes a step where a batch gave usable gradients, and forgets those of any other."""
    model = record.build()
    optimizer = AdaFisherW(model, lr=0.02, damping=1e-2, update_interval=update_interval)
    for batch in batches:
        optimizer.zero_grad()
        if batch(model):
            optimizer.step()
        else:
            optimizer.zero_grad()
    return Training(model, optimizer)


def good(record: Family, seed: int, n: int = 3) -> Gradients:
    """A batch as it should be."""

    def gradients(model: nn.Module) -> bool:
        loss = model(**record.batch(n=n, seed=seed)).loss
        loss.backward()
        return bool(loss.isfinite())

    return gradients


def masked(record: Family, seed: int) -> Gradients:
    """A batch all of whose labels are masked: the mean over no tokens is NaN."""

    def gradients(model: nn.Module) -> bool:
        batch = record.batch(n=3, seed=seed)
        loss = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss
        loss.backward()
        assert loss.isnan()
        return bool(loss.isfinite())

    return gradients


def broken_layer(record: Family, seed: int, layer: str, where: str) -> Gradients:
    """A batch in which one layer's output ("forward") or its gradient alone ("backward") is NaN in one place."""

    def gradients(model: nn.Module) -> bool:
        def break_output(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            spoiled = torch.zeros_like(output)
            spoiled.view(-1)[3] = math.nan
            if where == "forward":
                return output + spoiled
            output.register_hook(lambda grad: grad + spoiled)
            return None

        handle = model.get_submodule(layer).register_forward_hook(break_output)
        loss = model(**record.batch(n=3, seed=seed)).loss
        handle.remove()
        loss.backward()
        usable = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        assert not usable and bool(loss.isfinite()) == (where == "backward")
        return usable

    return gradients


def assert_skipped(record: Family, bad: Callable[[int], Gradients], at: tuple[int, ...]) -> None:
    """Bad batches before the steps `at` leave no trace: the run equals one without them, to the bit."""
    clean = [good(record, seed) for seed in range(5)]
    spoiled = [batch for i, batch in enumerate(clean) for batch in ([bad(10 + i), batch] if i in at else [batch])]
    assert len(spoiled) == len(clean) + len(at)
    without, with_bad = loop(record, *clean), loop(record, *spoiled)
    assert_same_training(with_bad, without, bitwise=True)
    assert with_bad.optimizer.param_groups[0]["dropped_refreshes"] == 0
    assert moved(without, record.build())


AT = pytest.mark.parametrize("at", [(0,), (1, 2), (0, 1, 2, 3, 4)], ids=["first", "middle", "all"])


@AT
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_d19_d20_batches_without_labels_that_the_loop_skips(name: str, at: tuple[int, ...]) -> None:
    """D19, D20: a NaN loss whose step is skipped, in due steps and in others."""
    record = family(name)
    assert_skipped(record, lambda seed: masked(record, seed), at)


@AT
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", ["transformer.wte", "transformer.h.1.ln_1", "transformer.h.0.mlp.c_fc"])
def test_d19_a_nan_in_a_single_layer_reaches_nothing(layer: str, where: str, at: tuple[int, ...]) -> None:
    """D19: whatever comes after that layer, or before it in the backward alone."""
    record = family("gpt2")
    assert_skipped(record, lambda seed: broken_layer(record, seed, layer, where), at)


def windows(*windows: list[Tensor], update_interval: int = 2) -> Training:
    """A plain loop with several micro-batches a step, over a language model that takes batches without rows."""
    model = BY_NAME["tied"].build()
    optimizer = AdaFisherW(model, lr=0.02, damping=1e-2, update_interval=update_interval)
    for window in windows:
        optimizer.zero_grad()
        for tokens in window:
            (model(tokens).square().sum() / 100).backward()
        optimizer.step()
    return Training(model, optimizer)


def tokens_of(seed: int) -> Tensor:
    """Three rows of five tokens."""
    return torch.randint(0, WORDS, (3, 5), generator=torch.Generator().manual_seed(seed))


EMPTY = torch.zeros(0, 5, dtype=torch.long)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["before", "between", "after"])
def test_d19_an_empty_micro_batch_counts_for_nothing(place: int) -> None:
    """D19: zero rows divide nothing by zero and change no bit, at whatever place of the window."""
    plain = [[tokens_of(2 * step), tokens_of(2 * step + 1)] for step in range(5)]
    with_empty = [[*window[:place], EMPTY, *window[place:]] for window in plain]
    without = windows(*plain)
    assert_same_training(windows(*with_empty), without, bitwise=True)
    assert moved(without, BY_NAME["tied"].build())


def test_d19_a_whole_batch_without_rows_changes_no_weight() -> None:
    """D19: its step has zero gradients; the first step with rows then gives the factors, as if it were the first."""
    model = BY_NAME["tied"].build()
    assert_close(windows([EMPTY]).model.state_dict(), model.state_dict(), rtol=0, atol=0)
    late, prompt = windows([EMPTY], [tokens_of(0)]), windows([tokens_of(0)])
    for p, q in zip(late.model.parameters(), prompt.model.parameters(), strict=True):
        assert_close(late.optimizer.fisher_diagonal(p), prompt.optimizer.fisher_diagonal(q))
    assert moved(late, model)


def test_a_batch_of_one_row_is_the_exact_fisher() -> None:
    """One row, one position: before normalisation the diagonal is the square of the gradient."""
    case = BY_NAME["one_example"]
    model = case.build().double()
    optimizer = AdaFisherW(model, lr=0.0, update_interval=1)
    model(torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for p in model.parameters():
        assert p.grad is not None and p.grad.abs().max() > 0
        assert_close(optimizer.fisher_diagonal(p, normalized=False), p.grad.square())


@pytest.mark.parametrize("declared", [True, False], ids=["scale-declared", "sums"])
@pytest.mark.parametrize(("rows", "form"), [(1, "paper"), (3, "paper"), (3, "root"), (3, "spectral")])
def test_trainer_is_a_plain_loop(rows: int, form: str, declared: bool, tmp_path: Path) -> None:
    """Over the batches that a Trainer saw, batches of one row among them.

    Bitwise where the loop declares the scale of its mean loss; up to rounding where it records the sum of the
    positions' own losses, and turns the gradients into those of the mean afterwards.
    """
    record, batches = family("llama"), []

    def collate(examples: Examples) -> dict[str, Tensor]:
        batches.append({key: torch.stack([example[key] for example in examples]) for key in examples[0]})
        return batches[-1]

    options = {"per_device_train_batch_size": rows, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    trainer = trainer_of(tmp_path, record, half_masked(record, 7), form=form, **options)
    trainer.data_collator = collate
    trainer.train()
    assert [len(batch["labels"]) for batch in batches] == ([1] * 7 if rows == 1 else [3, 3, 1])

    model = record.build()
    names = ("weight_decay", "ema_decay", "update_interval", "damping")
    given = of_form(form, **{key: OPTIONS[key] for key in names})
    optimizer = create_optimizer(given.pop("optim"), model, lr=OPTIONS["learning_rate"], **given)
    assert isinstance(optimizer, KroneckerDiagonalOptimizer)
    for batch in batches:
        items = int(batch["labels"][:, 1:].ne(-100).sum())
        optimizer.gradient_scale = 1 / items if declared else 1.0
        optimizer.zero_grad()
        model(**batch, num_items_in_batch=items if declared else 1).loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= 1 if declared else items
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # the scheduler's mark
    assert_same_training(trainer, Training(model, optimizer), bitwise=declared, **rounding(form))
    assert moved(trainer, record.build())


# --------------------------------------------------------------------------------------------------
# Several trainings by one trainer
# --------------------------------------------------------------------------------------------------


def test_d26_model_init_leaves_no_hook_on_the_model_before(tmp_path: Path) -> None:
    """D26: the second training has its own model and optimizer, and is the first over again."""
    record = family("gpt2")
    models: list[nn.Module] = []

    def model_init() -> nn.Module:
        models.append(record.build())
        return models[-1]

    options = {"max_steps": 3, "update_interval": 1, "train_dataset": record.dataset(12)}
    trainer = make_trainer(tmp_path, record, model_init=model_init, step_size="paper", **(OPTIONS | options))
    trainer.train()
    first = training_of(trainer)
    assert hook_count(first.model) > 0, "the next step is due"
    trained_once = Training(first.model, first.optimizer)
    trainer.train()
    second = training_of(trainer)
    assert second.model is models[-1] and second.optimizer is not first.optimizer and second.model is not first.model
    assert_same_training(second, trained_once, bitwise=True)
    model = first.model
    del first, trained_once
    gc.collect()
    assert hook_count(model) == 0
    assert hook_count(second.model) > 0


def test_hyperparameter_search_uses_what_each_trial_proposes(tmp_path: Path) -> None:
    """Learning rate and damping of each trial reach its optimizer, and each trial is the run with those values."""
    record = family("gpt2")
    examples = record.dataset(12)
    proposed = [(0.001, 0.5), (0.05, 0.02)]
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 4}
    used: list[tuple[float, float]] = []
    finished: list[Training] = []

    class Record(TrainerCallback):
        def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            group = optimizer.optimizer.param_groups[0]
            used.append((group["initial_lr"], group["damping"]))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            finished.append(training_of(trainer))

    given = {"train_dataset": examples, "eval_dataset": examples[:4], "callbacks": [Record()]}
    options["step_size"] = "paper"
    trainer = make_trainer(tmp_path, record, model_init=lambda: record.build(), **given, **(OPTIONS | options))

    def space(trial: Any) -> dict[str, float]:
        rate, damping = proposed[trial.number]
        return {
            "learning_rate": trial.suggest_float("learning_rate", rate, rate),
            "damping": trial.suggest_float("damping", damping, damping),
        }

    best = trainer.hyperparameter_search(backend="optuna", hp_space=space, n_trials=2, direction="minimize")
    assert used == proposed
    expected = []
    for (rate, damping), run in zip(proposed, finished, strict=True):
        alone = trained(tmp_path, record, examples, learning_rate=rate, damping=damping, **options)
        assert_same_training(run, alone, bitwise=True)
        expected.append(alone.evaluate(examples[:4])["eval_loss"])
    assert best.objective == min(expected) and expected[0] != expected[1]
    rate, damping = proposed[expected.index(min(expected))]
    assert best.hyperparameters == {"learning_rate": rate, "damping": damping}


class OutOfMemory:
    """Lets a model's head run out of memory on batches of more than `fits` rows.

    Not at once: at the micro-batch after the first `before` of that size, when its other layers have run.
    """

    def __init__(self, model: nn.Module, fits: int, before: int) -> None:
        self.fits, self.before = fits, before
        self.sizes: list[int] = []
        self.failures = 0
        model.get_submodule("lm_head").register_forward_pre_hook(self._check)

    def _check(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = len(args[0])
        self.sizes.append(rows)
        if rows > self.fits and self.sizes.count(rows) > self.before:
            self.failures += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(("optim", "before"), [("adafisherw", 1), ("adafisher", 2)])
def test_auto_find_batch_size_equals_a_run_started_at_that_size(optim: str, before: int, tmp_path: Path) -> None:
    """The statistics of `before` micro-batches are pending when memory runs out, and must not count afterwards."""
    record = family("gpt2")
    examples = half_masked(record, 16)
    options = {"max_steps": 3, "gradient_accumulation_steps": 3, "optim": optim, "update_interval": 1}
    plain = trained(tmp_path, record, examples, per_device_train_batch_size=2, **options)
    model = record.build()
    memory = OutOfMemory(model, fits=2, before=before)
    retried = trained(
        tmp_path,
        record,
        examples,
        model=model,
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        **options,
    )
    assert memory.failures == 2 and set(memory.sizes) == {4, 3, 2}
    assert_same_training(retried, plain, bitwise=True)
    assert moved(plain, record.build())
