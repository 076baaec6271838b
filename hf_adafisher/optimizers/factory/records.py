"""What is known about each optimizer: one frozen record, from which it is built, described, checked and resumed."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from hf_adafisher.optimizers.factory.param_groups import Groups
from hf_adafisher.optimizers.validation.checks import foreign_checkpoint
from hf_adafisher.optimizers.validation.library_option_ranges import check_values

EXTRA = 'pip install "hf_adafisher[baselines]"'
_OWN_ARGUMENTS = ("lr", "learning_rate", "weight_decay")
_NO_OPTIONS = frozenset({"self", "model", "params", "lr", "weight_decay", "kwargs"})

# What training may do that some optimizers cannot work with; each word is also how the table names it.
SHARDS = frozenset({"DeepSpeed", "FSDP1"})
"""Give the optimizer flat pieces instead of parameters."""
SECOND_ORDER = SHARDS | {"FSDP2", "DataParallel", "torch.compile", "fp16", "reentrant checkpointing"}
"""What has no second derivatives, or hides their scale."""


class Setting(NamedTuple):
    """A value that an optimizer gets where the user names none, and where it is from."""

    value: Any
    source: str


@dataclass(frozen=True)
class OptimizerRecord:
    """What the factory knows about one optimizer.

    Attributes:
        name: The name for ``create_optimizer`` and ``--optim``.
        path: The class, as ``module:name``; imported when the optimizer is first asked for.
        library: Whose implementation it is, with the version it was tested with.
        paper: Where it was published.
        learning_rate: For ``AdaFisherTrainingArguments`` where none is given.
        defaults: Options that differ from the class's own defaults or that the groups need; ``lr`` among them where
            ``create_optimizer`` uses the record's learning rate rather than the class's.
        momentum: The option that holds the decay of the first moment, empty where there is none.
        memory: Bytes of state per float32 parameter, in words; r and c are the sides of a matrix.
        bytes_per_parameter: The same as a number, None where it depends on the shapes.
        checkpoint_keys: Options that the saved parameter groups of this optimizer have, taken together. Of the
            optimizers whose keys a checkpoint has, the one with most is taken to have written it.
        needs_model: Whether the class takes the model before the parameter groups.
        create_graph: Whether its steps need ``backward(create_graph=True)``.
        resumable: Whether training goes on from a checkpoint exactly as without the interruption.
        refuses: What it does not work with; AdaFisherTrainer and its arguments say so.
        decoupled: Its ``decoupled_weight_decay``, by which Adam differs from AdamW; None without such an option.
        groups: Makes its parameter groups from those with and without weight decay, where it needs others.
        hidden: Options of the class that have no effect here, or make another algorithm of it.
    """

    name: str
    path: str
    library: str
    paper: str
    learning_rate: Setting
    momentum: str
    memory: str
    checkpoint_keys: frozenset[str]
    bytes_per_parameter: float | None = None
    defaults: Mapping[str, Setting] = field(default_factory=dict)
    needs_model: bool = False
    create_graph: bool = False
    resumable: bool = True
    refuses: frozenset[str] = frozenset()
    decoupled: bool | None = None
    groups: Callable[[nn.Module, Groups, dict[str, Any]], Groups] | None = None
    hidden: frozenset[str] = frozenset()

    @property
    def cls(self) -> type[Optimizer]:
        """The optimizer class.

        Raises:
            ImportError: Its library is not installed; the message holds the command that installs it.
        """
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing == "hf_adafisher":
                raise
            raise ImportError(f"optimizer {self.name!r} needs {missing}, which is not installed: {EXTRA}") from error

    def options(self) -> list[str]:
        """Names of the options that ``create_optimizer`` accepts beside ``lr`` and ``weight_decay``."""
        names = {*inspect.signature(self.cls.__init__).parameters, *self.defaults}
        return sorted(names - _NO_OPTIONS - self.hidden)

    def check_names(self, options: Iterable[str]) -> None:
        """Raises ValueError for the first option that this optimizer does not have, with those it has."""
        known = self.options()
        for name in options:
            if name in _OWN_ARGUMENTS:
                raise ValueError(
                    f"{name} is an argument of its own (learning_rate, weight_decay), not one of the options"
                )
            if name not in known:
                raise ValueError(
                    f"{self.name} has no option {name!r}{did_you_mean(name, known)}; "
                    f"its options: lr, weight_decay, {', '.join(known)}"
                )

    def check_values(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for an option of the wrong type or out of its range, which libraries often let pass."""
        if not self.needs_model:  # this package's optimizers say more about theirs
            check_values(self.name, self.cls, {name: s.value for name, s in self.defaults.items()}, options)

    def check_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Check that saved parameter groups were written by this optimizer; torch loads any without a word.

        Raises:
            ValueError: They were not; the message says what they look like.
        """
        options = {key: value for group in groups for key, value in group.items()}
        writers = _written_by(options)
        if self.name not in writers:
            raise foreign_checkpoint(self.name, options, " or ".join(writers))

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` over this record's defaults."""
        return {**{name: setting.value for name, setting in self.defaults.items()}, **options}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the code, for JSON."""
        return {
            "name": self.name,
            "class": self.path.replace(":", "."),
            "library": self.library,
            "paper": self.paper,
            "learning_rate": self.learning_rate._asdict(),
            "defaults": {name: setting._asdict() for name, setting in self.defaults.items()},
            "momentum": self.momentum,
            "memory": self.memory,
            "bytes_per_parameter": self.bytes_per_parameter,
            "needs_model": self.needs_model,
            "create_graph": self.create_graph,
            "resumable": self.resumable,
            "refuses": sorted(self.refuses),
        }


RECORDS: dict[str, OptimizerRecord] = {}
"""All of them by name, filled by ``catalog``."""


def _written_by(options: Mapping[str, Any]) -> list[str]:
    """The optimizers whose options these are: those that explain most of them."""
    fitting = [
        record
        for record in RECORDS.values()
        if options.keys() >= record.checkpoint_keys
        and record.decoupled in (None, options.get("decoupled_weight_decay", record.decoupled))
    ]
    most = max((len(record.checkpoint_keys) for record in fitting), default=0)
    return [record.name for record in fitting if len(record.checkpoint_keys) == most]


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``", did you mean 'x'?"`` for the known word nearest to ``word``, or nothing where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
