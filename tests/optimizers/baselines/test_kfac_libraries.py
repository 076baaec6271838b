"""K-FAC's factors beside those of other libraries, where one is installed; none is needed, so nothing depends on them.

Each was seen to agree: `asdfghjkl==0.1a5` (imported as asdl) and `curvlinops-for-pytorch==3.0.1`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_adafisher.optimizers.baselines.kfac import KFAC

EXAMPLES, CLASSES = 6, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


def our_factors(model: nn.Sequential) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each layer with its A and G, the Fisher being that of one example."""
    optimizer = KFAC(model, stat_decay=0.0)
    optimizer.gradient_scale = 1 / EXAMPLES
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    layers = [module for module in model if hasattr(module, "weight")]
    states = [optimizer.state[layer.weight] for layer in layers]
    return [
        (layer, state["input_factor"], state["output_grad_factor"]) for layer, state in zip(layers, states, strict=True)
    ]


def test_asdl_has_the_same_factors() -> None:
    asdl = pytest.importorskip("asdl")
    ours, model = our_factors(network().double()), network().double()
    config = asdl.FisherConfig(asdl.FISHER_EMP, [asdl.SHAPE_KRON], data_size=EXAMPLES)
    maker = asdl.get_fisher_maker(model, config)
    x, y = data()
    maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, asdl.DummyObject(), y, reduction="sum")
    maker.forward_and_backward()
    theirs = [module for module in model if hasattr(module, "weight")]
    for (_, a, g), layer in zip(ours, theirs, strict=True):
        assert_close(a[:-1, :-1], layer.fisher.kron.A)  # it keeps the bias apart
        assert_close(g, layer.fisher.kron.B)


def test_curvlinops_has_the_same_fisher() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    ours, model = our_factors(network().double()), network().double()
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [data()],
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        separate_weight_and_bias=False,
    )
    size = sum(p.numel() for p in model.parameters())
    theirs, start = operator @ torch.eye(size, dtype=torch.float64), 0
    for layer, a, g in ours:
        outputs, inputs = len(g), len(a) - 1
        of_output = torch.cat([torch.arange(outputs).repeat_interleave(inputs), torch.arange(outputs)])
        of_input = torch.cat([torch.arange(inputs).repeat(outputs), torch.full((outputs,), inputs)])
        count = sum(p.numel() for p in layer.parameters())
        block = theirs[start : start + count, start : start + count]
        assert_close(g[of_output][:, of_output] * a[of_input][:, of_input], block)
        start += count
    assert start == size
