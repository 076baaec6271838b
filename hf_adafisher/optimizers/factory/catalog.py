"""Records of all optimizers: the paper's, those it compares against, and those in common use."""

from __future__ import annotations

from typing import Any

from hf_adafisher.optimizers.adafisher import AdaFisher, AdaFisherW
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.baselines import groups
from hf_adafisher.optimizers.baselines.kfac import KFAC
from hf_adafisher.optimizers.factory.records import RECORDS, OptimizerRecord, SourcedDefault, did_you_mean
from hf_adafisher.optimizers.spectral import SpectralAdaFisher, SpectralAdaFisherOptions
from hf_adafisher.optimizers.validation.training_modes import Needs

TRAINER_LEARNING_RATE = 5e-5

_TORCH, _PO, _SCHEDULEFREE = "torch 2.13.0", "pytorch-optimizer 4.1.0", "schedulefree 1.4.1"
_TINY = "measured on tiny GPT-2, ViT and ResNet"
_WIKITEXT = "the WikiText-2 sweep of docs/results.md"
_ADAM_LIKE = frozenset({"betas", "weight_decouple", "fixed_decay"})
_WHOLE = Needs.SHAPES | Needs.WHOLE_PARAMETERS
_SECOND_ORDER = _WHOLE | Needs.SECOND_DERIVATIVES


def _add(name: str, path: str, *, lr: SourcedDefault, **more: Any) -> None:
    RECORDS[name] = OptimizerRecord(name, path, learning_rate=lr, **more)


def _own(name: str, cls: type[HookedOptimizer], paper: str, lr: SourcedDefault, **more: Any) -> None:
    """Add an optimizer of this package: its class holds its options and needs."""
    _add(
        name,
        f"{cls.__module__}:{cls.__qualname__}",
        library="this package",
        paper=paper,
        lr=lr,
        decoupled=cls.decoupled,
        options_class=cls.options_class,
        checkpoint_keys=frozenset(cls.options_class.names(identifies=True)),
        **more,
    )


def _adafisher(name: str, cls: type[HookedOptimizer]) -> None:
    _own(
        name,
        cls,
        "Gomes et al., ICLR 2025, arXiv 2405.16397; docs/step_sizes.md",
        lr=SourcedDefault(4e-3, "docs/step_sizes.md, from scratch; fine-tuning wants AdamW's rates"),
        fine_tuning_rate=5e-5,
        defaults={"step_size": SourcedDefault("root", "docs/step_sizes.md; 'paper': the paper's rule and numbers")},
        form="step_size",
        momentum="beta",
        memory="4 + 4 (r + c) / (r c)",
    )


def _torch(name: str, cls: str, paper: str, keys: set[str], size: int, **more: Any) -> None:
    _add(
        name,
        f"torch.optim:{cls}",
        library=_TORCH,
        paper=paper,
        lr=SourcedDefault(TRAINER_LEARNING_RATE, "transformers.TrainingArguments"),
        memory=str(size),
        bytes_per_parameter=float(size),
        checkpoint_keys=frozenset(keys),
        **more,
    )


_adafisher("adafisher", AdaFisher)
_adafisher("adafisherw", AdaFisherW)
_own(
    "spectral-adafisher",
    SpectralAdaFisher,
    "this package, docs/spectral.md",
    lr=SourcedDefault(SpectralAdaFisherOptions.lr, "docs/results.md, from scratch; fine-tuning wants 1.5e-4"),
    fine_tuning_rate=1.5e-4,
    momentum="beta",
    memory="4; 4 + 4 (r + c) / (r c) for what is no hidden matrix",
)
_torch(
    "sgd",
    "SGD",
    "Sutskever et al., ICML 2013",
    {"momentum", "dampening", "nesterov"},
    4,
    momentum="momentum",
    defaults={"momentum": SourcedDefault(0.9, "the paper's tables and nearly every SGD baseline; torch's own is 0")},
)
_torch(
    "adam",
    "Adam",
    "Kingma and Ba, ICLR 2015, arXiv 1412.6980",
    {"betas", "amsgrad"},
    8,
    momentum="betas",
    decoupled=False,
)
_torch(
    "adamw",
    "AdamW",
    "Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101",
    {"betas", "amsgrad"},
    8,
    momentum="betas",
    decoupled=True,
)
_add(
    "adahessian",
    "hf_adafisher.optimizers.baselines.hutchinson:AdaHessian",
    library=_PO,
    paper="Yao et al., AAAI 2021, arXiv 2006.00719",
    lr=SourcedDefault(0.1, "pytorch-optimizer; the authors' 0.15 goes with a spatial average that it lacks"),
    defaults={"eps": SourcedDefault(1e-4, "the authors' code; with 1e-16, parameters without curvature jump")},
    momentum="betas",
    memory="12",
    bytes_per_parameter=12.0,
    checkpoint_keys=_ADAM_LIKE | {"hessian_power"},
    own_needs=_SECOND_ORDER,
)
_own(
    "kfac",
    KFAC,
    "Martens and Grosse, ICML 2015, arXiv 1503.05671",
    lr=SourcedDefault(0.03, _TINY),
    momentum="momentum",
    memory="4 + 8 (r^2 + c^2) / (r c), 4 for norms; sides above max_factor_dim count once, not squared",
)
_add(
    "shampoo",
    "hf_adafisher.optimizers.baselines.shampoo:Shampoo",
    library=_PO,
    paper="Gupta et al., ICML 2018, arXiv 1802.09568",
    lr=SourcedDefault(0.03, _TINY),
    defaults={
        "max_side": SourcedDefault(
            1024, "each side has a matrix, decomposed at every step: seconds on a CPU from here on"
        ),
        "adamw_lr": SourcedDefault(1e-3, "torch.optim.AdamW"),
    },
    momentum="momentum",
    memory="4 + 8 (r^2 + c^2) / (r c); 8 for embeddings and where a side is above max_side",
    checkpoint_keys=frozenset({"use_shampoo", "max_side", "weight_decay", "lr"}),  # one more than Lion has
    own_needs=_WHOLE,
    groups=groups.shampoo_groups,
)
_add(
    "lamb",
    "hf_adafisher.optimizers.baselines.library_fixes:Lamb",
    library=_PO,
    paper="You et al., ICLR 2020, arXiv 1904.00962",
    lr=SourcedDefault(1e-2, _TINY),
    defaults={
        "weight_decouple": SourcedDefault(False, "the paper: the decay is part of what the trust ratio scales"),
        "adam_debias": SourcedDefault(True, "the paper: the first steps are not 10 times the ratio"),
    },
    momentum="betas",
    memory="8",
    bytes_per_parameter=8.0,
    checkpoint_keys=_ADAM_LIKE | {"grad_averaging"},
    own_needs=_WHOLE,
    # Other algorithms' ways (RAdam, clipping by the global norm), some of them without effect until others are set.
    hidden=frozenset({"rectify", "degenerated_to_sgd", "n_sma_threshold", "pre_norm", "max_grad_norm"}),
)
_add(
    "lars",
    "pytorch_optimizer:LARS",
    library=_PO,
    paper="You et al., 2017, arXiv 1708.03888",
    lr=SourcedDefault(3.0, _TINY),
    defaults={"vector_lr": SourcedDefault(0.1, f"{_TINY}; biases and norms take plain SGD steps")},
    momentum="momentum",
    memory="4",
    bytes_per_parameter=4.0,
    checkpoint_keys=frozenset({"momentum", "dampening", "nesterov", "trust_coefficient"}),
    own_needs=_WHOLE,
    groups=groups.lars_groups,
)
_add(
    "muon",
    "hf_adafisher.optimizers.baselines.library_fixes:Muon",
    library=_PO,
    paper="Jordan et al., 2024, kellerjordan.github.io/posts/muon",
    lr=SourcedDefault(0.02, "Keller Jordan's README"),
    defaults={"adamw_lr": SourcedDefault(3e-4, "Keller Jordan's README")},
    momentum="momentum",
    memory="4 for hidden matrices, 8 for the rest",
    checkpoint_keys=frozenset({"use_muon", "weight_decouple", "weight_decay"}),
    own_needs=Needs.SHAPES,
    groups=groups.muon_groups,
    hidden=frozenset({"adamw_wd"}),
)
_add(
    "soap",
    "pytorch_optimizer:SOAP",
    library=_PO,
    paper="Vyas et al., ICLR 2025, arXiv 2409.11321",
    lr=SourcedDefault(3e-3, "the authors' README"),
    defaults={"max_precondition_dim": SourcedDefault(10000, "the authors' code")},
    momentum="betas",
    memory="8 + 8 (r^2 + c^2) / (r c), without the side of the vocabulary",
    checkpoint_keys=frozenset({"betas", "max_precondition_dim", "shampoo_beta"}),
    own_needs=_WHOLE,
    groups=groups.soap_groups,
)
_add(
    "lion",
    "pytorch_optimizer:Lion",
    library=_PO,
    paper="Chen et al., NeurIPS 2023, arXiv 2302.06675",
    lr=SourcedDefault(1e-4, "the paper"),
    momentum="betas",
    memory="4",
    bytes_per_parameter=4.0,
    checkpoint_keys=_ADAM_LIKE,
)
_add(
    "adafactor",
    "torch.optim:Adafactor",
    library=_TORCH,
    paper="Shazeer and Stern, ICML 2018, arXiv 1804.04235",
    lr=SourcedDefault(1e-2, "torch.optim.Adafactor: the paper's cap on relative steps"),
    momentum="",
    memory="4 (r + c) / (r c)",
    checkpoint_keys=frozenset({"beta2_decay", "d"}),
    own_needs=_WHOLE,
)
_add(
    "schedule_free_adamw",
    "schedulefree:AdamWScheduleFree",
    library=_SCHEDULEFREE,
    paper="Defazio et al., NeurIPS 2024, arXiv 2405.15682",
    lr=SourcedDefault(2.5e-3, "schedulefree"),
    momentum="betas",
    memory="8",
    bytes_per_parameter=8.0,
    checkpoint_keys=frozenset({"betas", "weight_lr_power", "train_mode"}),
)
_add(
    "sophia",
    "hf_adafisher.optimizers.baselines.hutchinson:Sophia",
    library=_PO,
    paper="Liu et al., ICLR 2024, arXiv 2305.14342",
    lr=SourcedDefault(6e-2, "pytorch-optimizer: a value moves by at most lr times p (0.01), which is the paper's rate"),
    momentum="betas",
    memory="12",
    bytes_per_parameter=12.0,
    checkpoint_keys=_ADAM_LIKE | {"p"},
    own_needs=_SECOND_ORDER,
)


def available_optimizers() -> list[str]:
    """Return the names that ``create_optimizer``, ``--optim`` and ``AdaFisherTrainingArguments(optim=...)`` accept."""
    return list(RECORDS)


def optimizer_record(name: str) -> OptimizerRecord:
    """Return the record of an optimizer; hyphens and underscores in its name are the same.

    Raises:
        ValueError: The name is unknown; the message lists the known ones and the nearest.
    """
    known = canonical_name(name)
    if known not in RECORDS:
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name, RECORDS)}; available: {', '.join(RECORDS)}")
    return RECORDS[known]


def canonical_name(name: str) -> str:
    """Return an optimizer's name as ``available_optimizers`` spells it, hyphens and underscores being the same.

    Any other word comes back as it is: it may be an optimizer of Trainer's.
    """
    return _SPELLINGS.get(str(name).replace("_", "-"), name)


_SPELLINGS = {name.replace("_", "-"): name for name in RECORDS}
