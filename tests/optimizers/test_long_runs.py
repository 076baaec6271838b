"""Ten thousand steps: nothing grows, no hook is left over, no object is kept alive.

Measured in four ways, since each is blind to something: live tensors (any that Python can reach), blocks of Python's
allocator (any other object), tracemalloc (their bytes), and the resident set (memory that only C++ sees).
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adafisher import AdaFisher, AdaFisherW
from tests.training_helper import hook_count

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 10
WIDTH = 48
WARM_UP, TRACED, STEPS = 1_000, 9_000, 10_000
MEBIBYTE = 2**20


def small_model() -> nn.Sequential:
    """Two layers and a norm, wide enough for a weight or a factor in each refresh to show in the resident set."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 3))


def parameter_hooks(model: nn.Module) -> int:
    """Hooks on the parameters themselves."""
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


def live_tensors() -> int:
    """Tensors that Python can reach."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))


def traced_bytes() -> int:
    """What tracemalloc counts, without garbage."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of the state."""
    return sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())


class Loop:
    """A training loop over one batch after another."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.time = model, optimizer, 0
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 4, WIDTH, generator=generator)
        self.y = torch.randn(16, 4, 3, generator=generator)

    def run(self, until: int) -> None:
        """All steps before the step `until`."""
        while self.time < until:
            which = self.time % len(self.x)
            self.optimizer.zero_grad()
            F.mse_loss(self.model(self.x[which]), self.y[which]).backward()
            self.optimizer.step()
            self.time += 1


@dataclass
class Memory:
    """What is alive at one moment."""

    tensors: int
    blocks: int
    resident: int
    state: int
    hooks: int

    @classmethod
    def of(cls, loop: Loop) -> Memory:
        """Now."""
        tensors = live_tensors()  # collects garbage first
        return cls(
            tensors=tensors,
            blocks=sys.getallocatedblocks(),
            resident=psutil.Process().memory_info().rss,
            state=state_bytes(loop.optimizer),
            hooks=hook_count(loop.model),
        )


def ten_thousand_steps() -> None:
    """Between equal moments of an interval: after a thousand steps and after nine, and, traced, up to ten thousand."""
    model = small_model()
    optimizer = AdaFisherW(model, lr=1e-3, damping=0.1, update_interval=INTERVAL)
    loop = Loop(model, optimizer)
    loop.run(WARM_UP + INTERVAL // 2)
    before = Memory.of(loop)
    loop.run((WARM_UP + TRACED) // 2 + INTERVAL // 2)
    middle = Memory.of(loop)
    loop.run(TRACED + INTERVAL // 2)
    after = Memory.of(loop)
    refreshes = (TRACED - WARM_UP) // 2 // INTERVAL
    assert after.tensors == before.tensors
    assert after.state == before.state > 0
    assert after.hooks == before.hooks == 0
    # A leak grows in either half; Python's own memory comes and goes by a hundred objects or two.
    grown_objects = min(middle.blocks - before.blocks, after.blocks - middle.blocks)
    assert grown_objects < refreshes / 4, "less than one object in four refreshes"
    assert after.resident - before.resident < 2 * MEBIBYTE

    tracemalloc.start()
    loop.run((TRACED + STEPS) // 2)  # Python's free lists settle
    settled = traced_bytes()
    loop.run(STEPS)
    grown = traced_bytes() - settled
    tracemalloc.stop()
    refreshes = (STEPS - TRACED) // 2 // INTERVAL
    assert grown < 1024 * refreshes, "less than one small object with its tensors in each refresh"
    assert optimizer.param_groups[0]["refreshes"] == STEPS // INTERVAL
    assert live_tensors() == after.tensors
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.subprocess
def test_nothing_grows_in_ten_thousand_steps() -> None:
    """In an interpreter of its own, where no other test's objects come and go."""
    program = "from tests.optimizers.test_long_runs import ten_thousand_steps; ten_thousand_steps()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_hooks_are_on_for_due_steps_alone_and_never_add_up() -> None:
    """One on each layer before a due step, none before any other, over a hundred and fifty refreshes."""
    model = small_model()
    optimizer = AdaFisherW(model, lr=1e-3, damping=0.1, update_interval=INTERVAL)
    loop, layers = Loop(model, optimizer), 3
    for step in range(1_500):
        assert hook_count(model) == (layers if step % INTERVAL == 0 else 0), step
        assert parameter_hooks(model) == 0, step
        loop.run(step + 1)


def test_hooks_do_not_add_up_when_every_step_is_due_and_the_loop_meddles() -> None:
    """Evaluation, skipped steps, loading a state and another group in between."""
    model = small_model()
    optimizer = AdaFisherW(model, model[0].parameters(), lr=1e-3, damping=0.1, update_interval=1)
    loop = Loop(model, optimizer)
    for step in range(1, 300):
        loop.run(step)
        if step == 100:
            optimizer.add_param_group({"params": [*model[1].parameters(), *model[3].parameters()]})
        if step % 3 == 0:
            model.eval()
            with torch.no_grad():
                model(loop.x[0])
            model.train()
        if step % 5 == 0:
            model(loop.x[0]).sum().backward()
            optimizer.zero_grad()
        if step % 7 == 0:
            optimizer.load_state_dict(optimizer.state_dict())
        if step % 11 == 0:
            optimizer.discard_statistics()
        assert hook_count(model) == (1 if step < 100 else 3), step
    optimizer.close()
    assert hook_count(model) == 0


def drop(optimizer: AdaFisher) -> None:
    """Nothing: the caller forgets it."""


def close(optimizer: AdaFisher) -> None:
    """The explicit end."""
    optimizer.close()


def leave_context(optimizer: AdaFisher) -> None:
    """The end of a `with` block."""
    with optimizer:
        pass


@pytest.mark.parametrize("end", [drop, close, leave_context])
@pytest.mark.parametrize("steps", [0, 1], ids=["unused", "used"])
def test_two_hundred_optimizers_on_one_model_leave_nothing(end: Callable[[AdaFisher], None], steps: int) -> None:
    """Neither hooks nor tensors nor the optimizers: with every step due, each was armed when it ended."""
    model = small_model()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.0))
    loop.run(1)
    loop.optimizer.zero_grad()
    seen: list[weakref.ref[AdaFisher]] = []
    tensors = live_tensors()
    for i in range(200):
        optimizer = (AdaFisher, AdaFisherW)[i % 2](model, lr=1e-3, update_interval=1)
        if steps:
            Loop(model, optimizer).run(steps)
            optimizer.zero_grad()
        assert hook_count(model) == 3
        seen.append(weakref.ref(optimizer))
        end(optimizer)
        del optimizer
        gc.collect(0)
        assert hook_count(model) == 0
    gc.collect()
    assert live_tensors() == tensors
    assert not any(reference() for reference in seen)
    assert hook_count(model) == parameter_hooks(model) == 0
