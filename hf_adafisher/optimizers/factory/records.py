"""One frozen record per optimizer, from which it is built, described, checked and resumed."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from hf_adafisher.optimizers.base.options import OneOf, OptimizerOptions
from hf_adafisher.optimizers.factory.param_groups import Groups
from hf_adafisher.optimizers.validation.checkpoints import foreign_checkpoint
from hf_adafisher.optimizers.validation.option_values import check_values
from hf_adafisher.optimizers.validation.training_modes import TRAINING_MODES, Needs

EXTRA = 'pip install "hf_adafisher[baselines]"'
_OWN_ARGUMENTS = ("lr", "learning_rate", "weight_decay")
_NO_OPTIONS = frozenset({"self", "model", "params", "lr", "weight_decay", "kwargs"})


class SourcedDefault(NamedTuple):
    """A default of an option, and its source."""

    value: Any
    source: str


@dataclass(frozen=True)
class OptimizerRecord:
    """Everything that the factory and the training arguments need to know about one optimizer.

    Defaults of ``create_optimizer(name, model)`` and of ``AdaFisherTrainingArguments(optim=name)`` stand here, once for
    both.

    Attributes:
        name: The name for ``create_optimizer`` and ``--optim``.
        path: The class, as ``module:name``; imported when the optimizer is first asked for.
        library: The implementation's package, with the version it was tested with.
        paper: The publication.
        learning_rate: Default learning rate.
        fine_tuning_rate: Where to start with pretrained weights, if the default is for training from scratch alone.
        defaults: Other options whose defaults are not the class's own, or that the groups need.
        momentum: The option that holds the decay of the first moment, empty where there is none.
        memory: Bytes of state per float32 parameter, in words; r and c are the sides of a matrix.
        bytes_per_parameter: The same as a number, None where it depends on the shapes.
        checkpoint_keys: Options that the saved parameter groups of this optimizer have, taken together. Of the
            optimizers whose keys a checkpoint has, the one with most is taken to have written it.
        options_class: The option dataclass of an optimizer of this package, whose class takes the model before the
            parameter groups; None for those of libraries.
        form: Option whose value decides what the others mean, empty where there is none.
        own_needs: Requirements of a step of an optimizer without an ``options_class``.
        resumable: Training goes on from a checkpoint exactly as without the interruption.
        decoupled: Its ``decoupled_weight_decay``, by which Adam differs from AdamW; None without such an option.
        groups: Makes its parameter groups from those with and without weight decay, where it needs others.
        hidden: Options of the class that have no effect here, or make another algorithm of it.
    """

    name: str
    path: str
    library: str
    paper: str
    learning_rate: SourcedDefault
    momentum: str
    memory: str
    checkpoint_keys: frozenset[str]
    bytes_per_parameter: float | None = None
    fine_tuning_rate: float | None = None
    defaults: Mapping[str, SourcedDefault] = field(default_factory=dict)
    options_class: type[OptimizerOptions] | None = None
    form: str = ""
    own_needs: Needs = Needs.NOTHING
    resumable: bool = True
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

    @property
    def needs_model(self) -> bool:
        """The class takes the model before the parameter groups, and checks its options itself."""
        return self.options_class is not None

    @property
    def needs(self) -> Needs:
        """Requirements of its step with the record's defaults."""
        return self.needs_with({})

    def needs_with(self, options: Mapping[str, Any]) -> Needs:
        """Requirements of its step with these options, which decide the training modes that it refuses."""
        return self.own_needs if self.options_class is None else self.options_class(**self.arguments(options)).needs

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """The options that give each of its forms, by a name for people; its usual one has the optimizer's own name."""
        if not self.form:
            return {self.name: {}}
        assert self.options_class is not None
        usual, words = self.option_defaults()[self.form], self.options_class.specifications()[self.form].range
        assert isinstance(words, OneOf)
        others = [word for word in words.words if word != usual]
        return {self.name: {}} | {f"{self.name}, {self.form}={word}": {self.form: word} for word in others}

    @property
    def create_graph(self) -> bool:
        """Its steps need ``backward(create_graph=True)``."""
        return Needs.SECOND_DERIVATIVES in self.needs

    @property
    def refuses(self) -> frozenset[str]:
        """Names of the training modes that it does not work with."""
        return frozenset(mode.name for mode in TRAINING_MODES if mode.refused_by(self.needs))

    def options(self) -> list[str]:
        """Names of the options that ``create_optimizer`` accepts beside ``lr`` and ``weight_decay``."""
        own = self.options_class
        names = {*(own.defaults() if own else inspect.signature(self.cls.__init__).parameters), *self.defaults}
        return sorted(names - _NO_OPTIONS - self.hidden)

    def check_names(self, options: Iterable[str]) -> None:
        """Check option names.

        Raises:
            ValueError: The optimizer does not have one of them; the message lists those it has.
        """
        known = self.options()
        for name in options:
            if name in _OWN_ARGUMENTS:
                raise ValueError(
                    f"{name} is an argument of its own (weight_decay and lr, or learning_rate in training arguments), "
                    "not one of the options"
                )
            if name not in known:
                raise ValueError(
                    f"{self.name} has no option {name!r}{did_you_mean(name, known)}; "
                    f"its options: lr, weight_decay, {', '.join(known)}"
                )

    def check_values(self, options: Mapping[str, Any]) -> None:
        """Check option values, which libraries often let pass.

        Args:
            options: Options by name, ``lr`` and ``weight_decay`` among them.

        Raises:
            ValueError: One is of the wrong type, or out of its range.
        """
        if self.options_class is not None:
            self.options_class(**self.arguments(options))
        else:
            check_values(self.name, self.cls, self.arguments({}), options)

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
        """Return ``options`` over this record's defaults, the learning rate among them.

        The defaults belong together: with another value of the option ``form`` the class's own hold instead.
        """
        defaults = {"lr": self.learning_rate.value} | {name: default.value for name, default in self.defaults.items()}
        if self.form and options.get(self.form, defaults[self.form]) != defaults[self.form]:
            defaults = {}
        return {**defaults, **options}

    def default_learning_rate(self, options: Mapping[str, Any]) -> float:
        """Return the learning rate of a run with these options and none of its own."""
        arguments = self.arguments(options)
        return arguments["lr"] if "lr" in arguments else self.option_defaults(**options)["lr"]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the code, for JSON."""
        return {
            "name": self.name,
            "class": self.path.replace(":", "."),
            "library": self.library,
            "paper": self.paper,
            "learning_rate": self.learning_rate._asdict(),
            "fine_tuning_rate": self.fine_tuning_rate,
            "defaults": {name: default._asdict() for name, default in self.defaults.items()},
            "options": self._described_options(),
            "momentum": self.momentum,
            "memory": self.memory,
            "bytes_per_parameter": self.bytes_per_parameter,
            "needs_model": self.needs_model,
            "create_graph": self.create_graph,
            "resumable": self.resumable,
            "refuses": sorted(self.refuses),
        }

    def option_defaults(self, **given: Any) -> dict[str, Any]:
        """Return all options of an optimizer of this package: those given, the record's defaults, then the class's."""
        if self.options_class is None:
            return {}
        own = self.options_class(**self.arguments(given))
        return {name: getattr(own, name) for name in own.specifications()}

    def _described_options(self) -> dict[str, dict[str, Any]]:
        if self.options_class is None:
            return {}
        defaults = self.option_defaults()
        return {
            name: {"help": option.help, "range": str(option.range), "symbol": option.symbol, "default": defaults[name]}
            for name, option in self.options_class.specifications().items()
        }


RECORDS: dict[str, OptimizerRecord] = {}
"""All records by name, filled by ``catalog``."""


def _written_by(options: Mapping[str, Any]) -> list[str]:
    """Names of the optimizers whose options these are: those that explain most of them."""
    fitting = [
        record
        for record in RECORDS.values()
        if options.keys() >= record.checkpoint_keys
        and record.decoupled in (None, options.get("decoupled_weight_decay", record.decoupled))
    ]
    most = max((len(record.checkpoint_keys) for record in fitting), default=0)
    return [record.name for record in fitting if len(record.checkpoint_keys) == most]


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return ``", did you mean 'x'?"`` with the known word nearest to ``word``, or nothing where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
