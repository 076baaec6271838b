"""The loss in a plane of weight space, and the trajectories of several optimizers over it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from hf_adafisher.experiments.figures.landscape import picture, trace
from hf_adafisher.experiments.figures.landscape import plane as plane_module
from hf_adafisher.experiments.figures.landscape.model_state import (
    copy_buffers,
    flat_weights,
    load_buffers,
    load_weights,
    losses_at,
    refresh_statistics,
)
from hf_adafisher.experiments.figures.landscape.plane import Plane, grid_axes, principal_plane
from hf_adafisher.experiments.figures.landscape.trace import trace_landscape
from hf_adafisher.experiments.figures.landscape.trajectories import LandscapeSettings, Trajectory, prepare_optimizers
from hf_adafisher.experiments.figures.training_run import fixed_batches, mean_loss
from hf_adafisher.training.trainer import AdaFisherTrainer
from tests.experiments.runs.image_runs import TINY, TINY_RESNET
from tests.scripts import load_command

RUN = ["--use_cpu", "--disable_tqdm", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "16"]
SMALL: dict[str, Any] = {"steps": 4, "grid": 3, "examples": 24, "jobs": 1}
PAIR = ["adahessian:learning_rate=0.1", "sgd:learning_rate=0.05"]


def settings(folder: Path, **changes: Any) -> LandscapeSettings:
    network = changes.pop("network", TINY)
    values = {"task": "digits", "optimizers": PAIR, "further": [*RUN, *network], **SMALL, **changes}
    return LandscapeSettings(output=folder / "figure.png", **values)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over weights are made in many parts."""
    monkeypatch.setattr(plane_module, "_CHUNK", 64)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(trace, "train", train)


def walks(size: int = 37, lengths: tuple[int, ...] = (6, 4, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, size, generator=generator).cumsum(0) + 3 for length in lengths]


def test_principal_plane_is_that_of_the_singular_vectors(narrow: None) -> None:
    trajectories = walks()
    plane = principal_plane(trajectories)
    points = torch.cat(trajectories).double().numpy()
    left, values, right = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(plane.centre, points.mean(0), rtol=1e-6)
    assert plane.explained == pytest.approx((values**2 / (values**2).sum())[:2])
    signs = np.sign(left[np.abs(left).argmax(0), range(left.shape[1])])[:2]
    np.testing.assert_allclose(plane.directions, signs[:, None] * right[:2], atol=1e-6)
    coordinates = plane.project(torch.cat(trajectories)).coordinates
    np.testing.assert_allclose(coordinates, left[:, :2] * values[:2] * signs, atol=1e-5)


def test_plane_through_the_start_is_that_of_the_singular_vectors(narrow: None) -> None:
    """Of the differences from the start, those of each trajectory divided by their norm, however far it goes."""
    start = walks()[0][0]
    trajectories = [start + size * (way - way[0]) for way, size in zip(walks(), (1.0, 30.0, 0.01), strict=True)]
    trajectories.append(start[None])  # one that diverged at once
    plane = principal_plane(trajectories, start)
    moved = [(points - start).double().numpy() for points in trajectories]
    rows = np.concatenate([way / max(float(np.linalg.norm(way)), 1e-300) for way in moved])
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    assert torch.equal(plane.centre, start)
    assert plane.explained == pytest.approx((values**2 / 3)[:2], rel=1e-5)
    signs = np.sign(left[np.abs(left).argmax(0), range(left.shape[1])])[:2]
    np.testing.assert_allclose(plane.directions, signs[:, None] * right[:2], atol=1e-5)
    for way, points in zip(moved, trajectories, strict=True):
        found = plane.project(points).coordinates
        np.testing.assert_allclose(found, way @ plane.directions.double().numpy().T, atol=1e-4)


def test_projection_is_least_squares_and_the_rest_is_counted(narrow: None) -> None:
    points, (first, second) = walks()[0], plane_module.random_directions(37, 0)
    plane = Plane(walks()[1][0], torch.stack([first, 0.2 * first + second]))
    found = plane.project(points)
    for point, coordinates, distance in zip(points, found.coordinates, found.distances, strict=True):
        target = (point.double() - plane.centre.double()).numpy()
        expected, (square,), _, _ = np.linalg.lstsq(plane.directions.double().numpy().T, target)
        np.testing.assert_allclose(coordinates, expected, rtol=1e-6)
        assert distance.item() == pytest.approx(math.sqrt(square))
    basis = np.linalg.qr(plane.directions.double().numpy().T)[0]
    moved = (points - points.mean(0)).double().numpy()
    inside = sum(float(np.square(basis.T @ row).sum()) for row in moved)
    assert found.outside == pytest.approx(1 - inside / float(np.square(moved).sum()))


def test_a_path_in_the_plane_has_no_variance_outside_of_it() -> None:
    plane = principal_plane(walks())
    way = torch.stack([plane.vector(x, y) for x, y in ((0.0, 1.0), (2.0, -1.0), (3.0, 0.5))])
    found = plane.project(way)
    assert found.outside < 1e-10 and found.distances.max() < 1e-5
    np.testing.assert_allclose(found.coordinates, [[0, 1], [2, -1], [3, 0.5]], atol=1e-5)  # float32
    assert math.isnan(plane.project(way[:1]).outside)


@pytest.mark.parametrize("points", [torch.arange(4.0)[:, None] * torch.ones(9), torch.ones(5, 9), torch.randn(2, 9)])
def test_points_on_a_line_have_no_plane(points: Tensor) -> None:
    with pytest.raises(ValueError, match="lie on a line"):
        principal_plane([points])
    with pytest.raises(ValueError, match="lie on a line"):
        principal_plane([points[:1], points[:1].clone()], points[0])


class Quadratic(nn.Module):
    """``1/2 (w - b)^T A (w - b)`` of weights that are kept as two parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.left, self.right = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
        self.register_buffer("root", torch.randn(10, 10, generator=generator))
        self.register_buffer("lowest", torch.randn(10, generator=generator))

    def forward(self) -> Tensor:
        return 0.5 * (self.root @ (torch.cat([self.left.reshape(-1), self.right]) - self.lowest)).square().sum()


@pytest.mark.parametrize("jobs", [1, 3])
def test_losses_of_a_quadratic_are_those_of_its_formula(jobs: int) -> None:
    model, plane = Quadratic(), principal_plane(walks(10))
    xs, ys = grid_axes([plane.project(walks(10)[0]).coordinates], 4)
    at = [(x, y) for y in ys for x in xs]
    losses = losses_at(
        model, [partial(plane.vector, *point) for point in at], lambda own: own().item(), jobs=jobs, progress=False
    )
    a = (model.root.T @ model.root).double().numpy()
    centre, (u, v) = plane.centre.double().numpy() - model.lowest.double().numpy(), plane.directions.double().numpy()
    expected = [
        0.5 * centre @ a @ centre + x * u @ a @ centre + y * v @ a @ centre
        + 0.5 * (x * x * u @ a @ u + y * y * v @ a @ v) + x * y * u @ a @ v
        for x, y in at
    ]  # fmt: skip
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))


def cross_entropy(inputs: Tensor, labels: Tensor, model: nn.Module) -> float:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(inputs), labels).item()


def test_a_planar_trajectory_keeps_its_losses_in_the_plane() -> None:
    """Both are losses of the model in evaluation mode, which is left as it was."""
    model, inputs, labels = network().train(), torch.randn(20, 5), torch.randint(3, (20,))
    model[1].running_mean.normal_()
    weights = flat_weights(model)
    sides = [0.3 * side for side in plane_module.random_directions(len(weights), 5)]
    points = torch.stack([weights + math.cos(t) * sides[0] + t * sides[1] for t in range(5)])
    plane = principal_plane([points[:2], points[2:]])
    assert sum(plane.explained or ()) == pytest.approx(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate = partial(losses_at, model, loss=partial(cross_entropy, inputs, labels), progress=False)
    found = evaluate([partial(plane.vector, *at) for at in plane.project(points).coordinates.tolist()])
    assert found == pytest.approx(evaluate([point.clone for point in points]), rel=1e-5)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for point, loss in zip(points, found, strict=True):
        load_weights(model.eval(), point)
        assert torch.equal(flat_weights(model), point)
        assert loss == pytest.approx(cross_entropy(inputs, labels, model), rel=1e-5)


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_vector_goes_with_its_own_buffers(jobs: int) -> None:
    """In any order, on copies that others have used before; the model keeps its own."""
    model = nn.BatchNorm1d(1, affine=True, eps=0.0)
    means = torch.arange(12.0)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    kept = [{**copy_buffers(model), "running_mean": mean[None]} for mean in means]
    vectors = [partial(torch.tensor, [1.0, 100.0 * index]) for index in range(12)]  # scale, shift
    found = losses_at(
        model, vectors, lambda own: own(torch.zeros(1, 1)).item(), buffers=kept, jobs=jobs, progress=False
    )
    assert found == [100 * index - mean for index, mean in enumerate(means.tolist())]
    assert model.running_mean.item() == 0


def test_buffers_that_do_not_change_are_kept_once() -> None:
    model = nn.BatchNorm1d(2)
    first = copy_buffers(model)
    model.running_var.mul_(3)
    second = copy_buffers(model, first)
    assert first["running_mean"] is second["running_mean"] is not model.running_mean
    assert first["running_var"].tolist() == [1, 1] and second["running_var"].tolist() == [3, 3]
    load_buffers(model, first)
    assert model.running_var.tolist() == [1, 1] and second["running_var"].tolist() == [3, 3]


def test_jobs_work_at_the_same_time_each_on_a_model_of_its_own() -> None:
    together, seen = threading.Barrier(2, timeout=20), []

    def loss(model: nn.Module) -> float:
        value = float(flat_weights(model).sum())
        together.wait()  # only two threads get past it
        seen.append((threading.get_ident(), id(model)))
        return value + float(flat_weights(model).sum())

    model = nn.Linear(2, 1)
    vectors = [partial(torch.full, (3,), float(value)) for value in range(6)]
    assert losses_at(model, vectors, loss, jobs=2, progress=False) == [6.0 * value for value in range(6)]
    assert len({thread for thread, _ in seen}) == 2 and id(model) not in {own for _, own in seen}


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Of torch, for one computation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_job_computes_with_one_thread_and_leaves_torch_its_own(four_threads: None, jobs: int) -> None:
    evaluate = partial(losses_at, nn.Linear(2, 1), [lambda: torch.ones(3)] * 9, jobs=jobs, progress=False)
    assert evaluate(lambda _: torch.get_num_threads()) == [1] * 9
    assert torch.get_num_threads() == 4
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda _: 1 / 0)
    assert torch.get_num_threads() == 4


class Filters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 3)
        self.transposed = Conv1D(5, 4)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.deconv = nn.ConvTranspose1d(4, 3, 2)
        self.norm = nn.LayerNorm((2, 3))
        self.batch_norm = nn.BatchNorm2d(4)
        self.position = nn.Parameter(torch.randn(1, 7, 4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_filters_of_a_direction_get_the_norms_of_the_weights() -> None:
    model = Filters()
    weights, (direction, _) = flat_weights(model), plane_module.random_directions(0, 0)
    direction = torch.randn(len(weights))
    target, given = Filters(), Filters()
    load_weights(given, direction)
    load_weights(target, plane_module.filter_normalized(model, weights, direction))
    parts = {name: value.detach() for name, value in target.named_parameters() if value.requires_grad}
    filters = {
        "embedding.weight": lambda w: [w[row] for row in range(6)],
        "linear.weight": lambda w: [w[row] for row in range(3)],
        "transposed.weight": lambda w: [w[:, column] for column in range(5)],
        "conv.weight": lambda w: [w[channel] for channel in range(6)],
        "deconv.weight": lambda w: [w[:, channel] for channel in range(3)],
        "position": lambda w: [w[0]],
    }
    for name, value in parts.items():
        if name not in filters:
            assert value.dim() < 2 or name.startswith("norm.")
            assert not value.any(), name
            continue
        split = filters[name]
        assert sum(part.numel() for part in split(value)) == value.numel()
        own, old = model.get_parameter(name).detach(), given.get_parameter(name).detach()
        for new, theta, before in zip(split(value), split(own), split(old), strict=True):
            norm = math.sqrt(sum(float(entry) ** 2 for entry in theta.reshape(-1)))
            length = math.sqrt(sum(float(entry) ** 2 for entry in before.reshape(-1)))
            torch.testing.assert_close(new, before / length * norm)


def test_a_filter_without_direction_stays_without() -> None:
    model = nn.Linear(3, 2, bias=False)
    direction = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    found = plane_module.filter_normalized(model, flat_weights(model), direction)
    assert not found[:3].any() and found[3] == found[4] > 0


def test_a_tied_weight_is_counted_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert len(flat_weights(model)) == 15
    load_weights(model, torch.arange(15.0))
    assert torch.equal(model[1].weight, torch.arange(15.0).view(5, 3))


def test_grid_leaves_room_around_the_trajectories() -> None:
    xs, ys = grid_axes([torch.tensor([[0.0, 1.0], [4.0, 1.5]]), torch.tensor([[2.0, -0.5]])], 7)
    np.testing.assert_allclose(xs, np.linspace(-1, 5, 7))
    np.testing.assert_allclose(ys, np.linspace(-1, 2, 7))
    xs, ys = grid_axes([torch.tensor([[0.0, 0.1], [4.0, 0.2]])], 3, extent=1.5)
    np.testing.assert_allclose(xs, [-1.5, 1.75, 5])
    np.testing.assert_allclose(ys, [-1.5, 0, 1.5])


def test_a_diverging_corner_does_not_hide_the_valley() -> None:
    losses = 1.0 + np.add.outer(np.linspace(-1, 1, 20) ** 2, np.linspace(-1, 1, 20) ** 2)
    plain = picture.contour_levels(losses, start=1.5)
    losses[0, :3] = (math.inf, math.nan, 1e9)
    levels = picture.contour_levels(losses, start=1.5)
    assert levels[0] == losses[np.isfinite(losses)].min() and (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels, plain, rtol=0.02)
    heights = levels[1:] - levels[0]
    np.testing.assert_allclose(heights[1:] / heights[:-1], heights[1] / heights[0])
    assert picture.contour_levels(losses, start=50.0)[-1] == 50
    flat = picture.contour_levels(np.full((2, 2), 3.0), start=3.0)
    assert (np.diff(flat) > 0).all()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two optimizers on digits, one of which draws random numbers; with the batches that each saw."""
    seen: dict[str, list[Tensor]] = {}

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        seen.setdefault(str(self.args.optim), []).append(inputs["pixel_values"].clone())
        return original(self, model, inputs, *rest)

    original = AdaFisherTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaFisherTrainer, "training_step", training_step)
        numbers = trace_landscape(settings(tmp_path_factory.mktemp("traced"), every=1))
    return {"numbers": numbers, "seen": seen}


def test_all_start_alike_and_see_the_same_data(traced: dict[str, Any]) -> None:
    first, second = traced["numbers"]["optimizers"].values()
    assert first["steps"] == second["steps"] == [0, 1, 2, 3, 4]
    for key in ("x", "y", "loss_in_plane", "loss_of_snapshot", "distance_from_plane"):
        assert first[key][0] == second[key][0] and first[key][1:] != second[key][1:]
    assert first["training"]["step"] == [1, 2, 3, 4]
    assert first["training"]["loss"][0] == second["training"]["loss"][0] != first["training"]["loss"][1]
    ours, others = traced["seen"]["adahessian"], traced["seen"]["sgd"]
    assert len(ours) == len(others) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("origin", ["start", "mean"])
def test_numbers_of_the_plane_agree(traced: dict[str, Any], tmp_path: Path, origin: str) -> None:
    numbers = traced["numbers"] if origin == "start" else trace_landscape(settings(tmp_path, origin="mean"))
    shares, paths = numbers["plane"]["explained"], numbers["optimizers"].values()
    assert 0 < shares[1] < shares[0] < 1 and numbers["examples"] == 24
    assert f"{shares[0]:.1%}" in numbers["plane"]["axes"][0] and f"{shares[1]:.1%}" in numbers["plane"]["axes"][1]
    inside = [float(np.square([path["x"], path["y"]]).sum()) for path in paths]
    away = [float(np.square(path["distance_from_plane"]).sum()) for path in paths]
    if origin == "start":  # each path weighs the same; all begin in the plane, with their true loss
        found = np.mean([own / (own + rest) for own, rest in zip(inside, away, strict=True)])
    else:
        found = sum(inside) / (sum(inside) + sum(away))
    assert sum(shares) == pytest.approx(found, rel=1e-4)
    for path in paths:
        starts = [path[key][0] for key in ("x", "y", "distance_from_plane")]
        same = path["loss_in_plane"][0] == pytest.approx(path["loss_of_snapshot"][0], rel=1e-6)
        assert (max(map(abs, starts)) < 1e-6) == same == (origin == "start")
    assert ("start of all" in numbers["plane"]["centre"]) == (origin == "start")
    for path in paths:
        assert 0 <= path["variance_outside_of_plane"] < 1
        distances = np.subtract(path["loss_in_plane"], path["loss_of_snapshot"])
        assert np.abs(distances).max() > 0 or max(path["distance_from_plane"]) < 1e-5
    assert np.shape(numbers["grid"]["loss"]) == (3, 3) == (len(numbers["grid"]["x"]), len(numbers["grid"]["y"]))


def test_trajectories_and_buffers_are_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path's own losses are those that a training without the figure has on the way, with its running statistics."""
    ends: list[tuple[AdaFisherTrainer, Trajectory]] = []
    original = trace.train

    def train(*arguments: Any) -> Any:
        ends.append(original(*arguments))
        return ends[-1]

    monkeypatch.setattr(trace, "train", train)
    optimizers = ["sgd:learning_rate=0.05", "adam:learning_rate=0.01"]
    chosen = settings(tmp_path, network=TINY_RESNET, optimizers=optimizers)
    fresh = next(iter(prepare_optimizers(chosen).values()))  # now: new arguments would end what a trainer can do
    numbers = trace_landscape(chosen)
    paths = list(numbers["optimizers"].values())
    batches = fixed_batches(ends[0][0], cast(Any, ends[0][0].train_dataset), 24)
    start = mean_loss(ends[0][0], fresh.model.eval(), batches)
    shared = ends[0][0].model
    for (trainer, trajectory), path in zip(ends, paths, strict=True):
        assert torch.equal(trajectory.points[0], flat_weights(fresh.model))
        assert torch.equal(trajectory.points[-1], flat_weights(trainer.model))
        assert path["loss_of_snapshot"][0] == pytest.approx(start, rel=1e-5)
        own = mean_loss(ends[0][0], trainer.model.eval(), batches)
        assert path["loss_of_snapshot"][-1] == pytest.approx(own, rel=1e-5)
        for index, point in enumerate(trajectory.points):
            load_weights(shared, point)
            load_buffers(shared, trajectory.buffers[index])
            assert path["loss_of_snapshot"][index] == pytest.approx(mean_loss(ends[0][0], shared, batches), rel=1e-5)
    # In the plane the statistics are those of the examples, here by torch's own way to take them.
    load_weights(shared, ends[0][1].points[0])
    momenta = [module.momentum for module in shared.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.optim.swa_utils.update_bn([batch["pixel_values"] for batch in batches], shared)
    in_plane = mean_loss(ends[0][0], shared.eval(), batches)
    for path in paths:
        assert path["loss_in_plane"][0] == pytest.approx(in_plane, rel=1e-4) and abs(in_plane / start - 1) > 1e-3
    assert momenta == [module.momentum for module in ends[1][0].model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert numbers["plane"]["buffers"] == "BatchNorm statistics of these examples at every point"
    told = [text.get_text() for text in picture.draw_landscape(numbers).legends[0].get_texts()]
    assert "in this plane: BatchNorm statistics of these examples at every point; at ends: their own" in told


def test_statistics_are_means_over_batches_and_all_else_stays() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.9), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    model[0].running_mean.fill_(9.0)
    batches = [torch.randn(size, 2, generator=torch.Generator().manual_seed(size)) for size in (4, 7)]
    in_dropout: list[bool] = []
    model[1].register_forward_hook(lambda module, inputs, output: in_dropout.append(torch.equal(inputs[0], output)))
    refresh_statistics(model, [lambda own, batch=batch: own(batch) for batch in batches])
    for name, expected in (
        ("running_mean", [b.mean(0) for b in batches]),
        ("running_var", [b.var(0) for b in batches]),
    ):
        torch.testing.assert_close(getattr(model[0], name), torch.stack(expected).mean(0))
    assert in_dropout == [True, True] and model[0].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_a_last_batch_of_one_example_has_a_loss_but_no_statistics(tmp_path: Path) -> None:
    flags = [*RUN, *TINY_RESNET, "--per_device_eval_batch_size", "4"]
    trainer = next(iter(prepare_optimizers(settings(tmp_path, further=flags, network=[])).values())).new_trainer([])
    batches, model = fixed_batches(trainer, cast(Any, trainer.train_dataset), 9), trainer.model.eval()
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 1]
    found = trace.loss_in_plane(trainer, batches, model)
    torch.optim.swa_utils.update_bn([batch["pixel_values"] for batch in batches[:2]], model)
    assert found == pytest.approx(mean_loss(trainer, model.eval(), batches), rel=1e-5)


def test_a_model_without_statistics_needs_no_word_about_them(traced: dict[str, Any]) -> None:
    assert traced["numbers"]["plane"]["buffers"] is None
    told = [text.get_text() for text in picture.draw_landscape(traced["numbers"]).legends[0].get_texts()]
    assert len(told) == 3 and not any("statistics" in text for text in told)


def test_the_memory_of_snapshots_has_that_of_statistics(tmp_path: Path) -> None:
    model = next(iter(prepare_optimizers(settings(tmp_path, network=TINY_RESNET)).values())).model
    need = [sum(tensor.nbytes for tensor in part()) for part in (model.parameters, model.buffers)]
    enough = 2 * 5 * sum(need) / 2**30
    prepare_optimizers(settings(tmp_path, network=TINY_RESNET, snapshot_memory=1.01 * enough))
    with pytest.raises(ValueError, match=r"10 snapshots of .* parameters take"):
        prepare_optimizers(settings(tmp_path, network=TINY_RESNET, snapshot_memory=0.99 * enough))
    assert need[1] > 0.03 * need[0]  # or the second would be refused without them


def test_statistics_that_are_not_finite_end_a_trajectory(tmp_path: Path) -> None:
    run = next(iter(prepare_optimizers(settings(tmp_path, network=TINY_RESNET)).values()))
    name, _ = next((name, b) for name, b in run.model.named_buffers() if name.endswith("running_var"))

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                run.model.get_buffer(name).fill_(math.inf)

    create = run.new_trainer
    object.__setattr__(run, "new_trainer", lambda callbacks: create([*callbacks, Spoil()]))
    _, trajectory = trace.train(run, settings(tmp_path, every=1), "sgd")
    assert trajectory.steps == [0, 1, 2] and trajectory.diverged_at == 3
    assert len(trajectory.buffers) == len(trajectory.points) == 3


def test_every_loss_stands_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With x + 10 y as the loss of the weights at (x, y)."""
    planes: list[Plane] = []

    def choose_plane(*arguments: Any) -> Plane:
        planes.append(original(*arguments))
        return planes[-1]

    def losses_at(_: nn.Module, vectors: list[Any], *__: Any, **___: Any) -> list[float]:
        return [(x + 10 * y).item() for vector in vectors for x, y in planes[0].project(vector()[None]).coordinates]

    original = trace.choose_plane
    monkeypatch.setattr(trace, "choose_plane", choose_plane)
    monkeypatch.setattr(trace, "losses_at", losses_at)
    numbers = trace_landscape(settings(tmp_path))
    xs, ys = np.array(numbers["grid"]["x"]), np.array(numbers["grid"]["y"])
    np.testing.assert_allclose(numbers["grid"]["loss"], xs[None, :] + 10 * ys[:, None], atol=1e-4)
    for path in numbers["optimizers"].values():
        expected = np.array(path["x"]) + 10 * np.array(path["y"])
        np.testing.assert_allclose(path["loss_in_plane"], expected, atol=1e-4)
        np.testing.assert_allclose(path["loss_of_snapshot"], expected, atol=1e-4)


def test_a_diverged_optimizer_leaves_the_others_their_picture(tmp_path: Path) -> None:
    optimizers = ["sgd:learning_rate=0.05", "sgd:learning_rate=1e39"]
    numbers = trace_landscape(settings(tmp_path, optimizers=optimizers, every=1))
    good, bad = numbers["optimizers"].values()
    assert good["diverged_at"] is None and len(good["steps"]) == 5
    assert bad["diverged_at"] == 1 and bad["steps"] == [0]
    numbers["grid"]["loss"][0][0] = None  # as a loss that is not finite stands in JSON
    flat, lifted, *_ = picture.draw_landscape(numbers).axes
    assert "not finite" in flat.get_title()
    told = [line.get_label() for line in flat.lines]
    for line, index in ((0, -1), (4, 0)):  # true losses beside those in the plane: of the first one's end, of the start
        pair = [f"{good[key][index]:.3g}" for key in ("loss_of_snapshot", "loss_in_plane")]
        assert f"{pair[0]}, in this plane {pair[1]}" in told[line]
    for axes in (flat, lifted):  # of both a line and an end, and the start
        ways = [line.get_data_3d() if axes is lifted else line.get_data() for line in axes.lines]
        np.testing.assert_array_equal(ways[0][:2], [good["x"], good["y"]])
        np.testing.assert_array_equal([*ways[1][0], *ways[1][1]], [good["x"][-1], good["y"][-1]])
        np.testing.assert_array_equal([*ways[4][0], *ways[4][1]], [good["x"][0], good["y"][0]])
    top = picture.contour_levels(np.array(numbers["grid"]["loss"], dtype=float), good["loss_in_plane"][0])[-1]
    np.testing.assert_array_equal(lifted.lines[0].get_data_3d()[2], np.minimum(good["loss_in_plane"], top))


TEXT = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "300"]
TEXT += ["--block_size", "16", *RUN]


def test_script_writes_the_picture_and_its_numbers(tmp_path: Path) -> None:
    output = tmp_path / "new" / "figure.png"
    sizes = ["--steps", "4", "--grid", "3", "--examples", "24", "--output", str(output)]
    assert load_command("figures").landscape(["--optimizers", *PAIR, *sizes, *RUN, *TINY]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert list(numbers["optimizers"]) == PAIR
    assert np.isfinite(np.array(numbers["grid"]["loss"], dtype=float)).all()


@pytest.mark.parametrize("plane", ["random", "file"])
def test_other_planes_have_their_centre_at_the_end_of_the_first(tmp_path: Path, plane: str) -> None:
    given = plane
    if plane == "file":
        model = next(iter(prepare_optimizers(settings(tmp_path)).values())).model
        given = str(tmp_path / "directions.pt")
        torch.save([model_parameters(model), model_parameters(model)], given)
    numbers = trace_landscape(settings(tmp_path, plane=given))
    first = numbers["optimizers"][PAIR[0]]
    assert (first["x"][-1], first["y"][-1]) == pytest.approx((0, 0), abs=1e-6)
    assert first["loss_in_plane"][-1] == pytest.approx(first["loss_of_snapshot"][-1], rel=1e-6)
    assert numbers["grid"]["loss"][1][1] == pytest.approx(first["loss_of_snapshot"][-1], rel=1e-3)
    assert numbers["grid"]["x"] == numbers["grid"]["y"] == [-1, 0, 1]


def test_jobs_change_nothing_of_a_language_model(tmp_path: Path, files: dict[str, str]) -> None:
    text = [item for split, path in files.items() for item in (f"--{split}_file", path)]
    found = [
        trace_landscape(
            LandscapeSettings(
                task="clm",
                output=tmp_path / "figure.png",
                optimizers=["adafisherw", "adamw:learning_rate=0.01"],
                further=[*TEXT, *text],
                **{**SMALL, "steps": 2, "jobs": jobs},
            )
        )
        for jobs in (1, 2)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "1"], "--steps is 1; it must be at least 2"),
        (["--grid", "1"], "--grid is 1; it must be at least 2"),
        (["--every", "0"], "--every is 0; it must be at least 1"),
        (["--every", "3"], "--every is 3; with 4 steps it must be at most 2"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--examples", "0"], "--examples is 0"),
        (["--extent", "-1"], "--extent is -1.0"),
        (["--snapshot_memory", "0"], "--snapshot_memory is 0.0"),
        (["--snapshot_memory", "1e-4"], "a larger --every"),
        (["--optimizers", "adam", "adamm"], "unknown optim 'adamm'"),
        (["--optimizers", "adam", "adam"], "adam twice"),
        (["--optimizers", "adam", "sgd:seed=7"], "sgd:seed=7 has seed=7, where adam has 42"),
        (["--optimizers", "adam", "sgd:max_train_samples=50"], "max_train_samples=50, where adam has None"),
        (["--optimizers", "adam", "sgd:per_device_train_batch_size=8"], "per_device_train_batch_size=8"),
        (["--optimizers", "adam:max_steps=9"], "--max_steps is not free here in 'adam:max_steps=9'"),
        (["--origin", "end"], "--origin is 'end'; it must be one of start, mean"),
        (["--origin", "start", "--plane", "random"], "--origin is for --plane pca"),
        (["--plane", "nowhere.pt"], "'nowhere.pt', and no such file"),
        (["--max_steps", "5"], "--max_steps is not free here"),
        ([*TINY_RESNET, "--examples", "1"], "--examples is 1; with BatchNorm"),
        ([*TINY_RESNET, "--per_device_eval_batch_size", "1"], "--per_device_eval_batch_size is 1; with BatchNorm"),
    ],
)
def test_bad_input_is_named_before_training(
    no_training: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str], message: str
) -> None:
    base = ["--optimizers", *PAIR, "--steps", "4", "--output", str(tmp_path / "figure.png")]
    assert load_command("figures").landscape([*base, *RUN, *TINY, *flags]) == 2
    assert message in caplog.text


def model_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pair: pair[0], "two directions"),
        (lambda pair: [pair[0], {**pair[1], "other.weight": torch.ones(2)}], "'other.weight' is no trainable"),
        (lambda pair: [{"0.weight": pair[0]["0.weight"]}, pair[1]], "'0.bias' is missing"),
        (lambda pair: [pair[0], {**pair[1], "0.weight": torch.ones(2, 2)}], "(2, 2), the model's (7, 5)"),
        (lambda pair: [pair[0], {**pair[1], "0.weight": 3}], "'0.weight' is int"),
        (lambda pair: [pair[0], {name: -2 * value for name, value in pair[0].items()}], "parallel"),
        (lambda pair: [pair[0], {name: 0 * value for name, value in pair[0].items()}], "zero"),
        (lambda pair: [pair[0], {**pair[1], "0.bias": torch.full((7,), math.nan)}], "not finite"),
    ],
)
def test_directions_of_another_model_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path, model = tmp_path / "directions.pt", network()
    pair = [model_parameters(model), model_parameters(model)]
    torch.save(pair, path)
    for found, given in zip(plane_module.read_directions(path, model), pair, strict=True):
        load_weights(model, found)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in given.items())
    torch.save(change(pair), path)
    with pytest.raises(ValueError) as caught:
        plane_module.read_directions(path, model)
    assert message in str(caught.value)


def test_a_file_of_other_kind_is_refused_before_training(
    no_training: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "directions.pt"
    path.write_text("not torch's")
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        trace_landscape(settings(tmp_path, plane=str(path)))
    torch.save([model_parameters(network()), model_parameters(network())], path)
    with pytest.raises(ValueError, match="trainable parameter of this model"):
        trace_landscape(settings(tmp_path, plane=str(path)))


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(4, None, [0, 1, 2, 3, 4]), (2, None, [0, 1, 2]), (7, 3, [0, 3, 6, 7]), (100, None, list(range(0, 101, 2)))],
)
def test_snapshots_hold_start_and_end(tmp_path: Path, steps: int, every: int | None, expected: list[int]) -> None:
    assert settings(tmp_path, steps=steps, every=every).snapshot_steps == expected
