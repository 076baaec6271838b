"""Option dataclasses of optimizers: one frozen dataclass each, whose fields carry range, meaning and use."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from hf_adafisher.optimizers.validation.training_modes import Needs

_OPTION = "option"


class OptionRange(ABC):
    """Allowed values of an option; ``str()`` of it is the phrase for help texts."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raises ValueError unless ``value`` is allowed; the message names option, range and value."""

    def plain(self, value: Any) -> Any:
        """Return the form of ``value`` that a parameter group keeps: one that every kind of checkpoint can hold."""
        return value


@dataclass(frozen=True)
class Size(OptionRange):
    """Finite numbers >= 0.

    Attributes:
        positive: Zero is not allowed.
        optional: None is allowed.
        why: Reason for the range, appended to the error message.
    """

    positive: bool = False
    optional: bool = False
    why: str = ""

    @override
    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        number = _number(name, value)
        if not (math.isfinite(number) and number >= 0.0) or (self.positive and number == 0.0):
            raise ValueError(f"{name} must be finite and {self._bound}, got {number}{self.why}")

    @property
    def _bound(self) -> str:
        return "> 0" if self.positive else ">= 0"

    def __str__(self) -> str:
        return self._bound + (", or none" if self.optional else "")


@dataclass(frozen=True)
class UnitInterval(OptionRange):
    """Numbers in [0, 1), or in [0, 1] where ``closed``; ``why`` is appended to the error message."""

    closed: bool = False
    why: str = ""

    @override
    def check(self, name: str, value: Any) -> None:
        number = _number(name, value)
        if not (0.0 <= number < 1.0 or (self.closed and number == 1.0)):
            raise ValueError(f"{name} must lie {self}, got {number}{self.why}")

    def __str__(self) -> str:
        return "in [0, 1]" if self.closed else "in [0, 1)"


@dataclass(frozen=True)
class Count(OptionRange):
    """Whole numbers >= 1 of ``unit``."""

    unit: str

    @override
    def check(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be {self}, got {value!r}")

    def __str__(self) -> str:
        return f"a whole number of {self.unit} >= 1"


class Flag(OptionRange):
    """True and False."""

    @override
    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be {self}, got {value!r}")

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True)
class OneOf(OptionRange):
    """One of these words."""

    words: tuple[str, ...]

    @override
    def check(self, name: str, value: Any) -> None:
        if value not in self.words:
            raise ValueError(f"{name} must be {self}, got {value!r}")

    def __str__(self) -> str:
        return " or ".join(repr(word) for word in self.words)


@dataclass(frozen=True)
class FloatingDtype(OptionRange):
    """Floating-point dtypes of 16 bits or more, as dtypes or by name (torch does not calculate in 8 bits), and None.

    Attributes:
        default: The dtype that None stands for, in words.
    """

    default: str

    @override
    def check(self, name: str, value: Any) -> None:
        dtype = _dtype(value)
        if value is not None and (
            not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1
        ):
            raise ValueError(
                f"{name} must be None ({self.default}) or a floating-point dtype of 16 bits or more, such as "
                f"'float32', got {value!r}"
            )

    @override
    def plain(self, value: Any) -> str | None:
        return None if value is None else str(_dtype(value)).removeprefix("torch.")

    def __str__(self) -> str:
        return f"a floating-point dtype of 16 bits or more, or none: {self.default}"


@dataclass(frozen=True)
class Option:
    """An option beside its name and default.

    Attributes:
        range: Allowed values.
        help: One phrase on its meaning.
        symbol: The paper's symbol.
        on_resume: A checkpoint's value replaces the given one: "silent", or "warned" of where they differ; "fixed":
            a checkpoint with another value is refused.
        shared: All parameter groups need one value.
        identifies: Every checkpoint of the optimizer has it; those that do so together tell whose a checkpoint is.
        in_groups: Parameter groups, and with them checkpoints, hold it; otherwise it belongs to the optimizer object.
        argument: ``AdaFisherTrainingArguments`` has a field of this name; other options go through ``optim_args``.
    """

    range: OptionRange
    help: str
    symbol: str = ""
    on_resume: Literal["warned", "silent", "fixed"] = "warned"
    shared: bool = False
    identifies: bool = False
    in_groups: bool = True
    argument: bool = False

    def __str__(self) -> str:
        return f"{self.help}{self.symbol and f' ({self.symbol})'}, {self.range}"


def option(default: Any, specification: Option, **changes: Any) -> Any:
    """Declare a dataclass field for an option.

    Args:
        default: The class's default.
        specification: The option.
        **changes: Attributes of ``specification`` that this optimizer has otherwise.
    """
    return field(default=default, metadata={_OPTION: replace(specification, **changes)})


LEARNING_RATE = Option(Size(), "learning rate", symbol="alpha", on_resume="silent")
WEIGHT_DECAY = Option(Size(), "weight decay", symbol="kappa")
BETA = Option(UnitInterval(), "decay of the first moment", symbol="beta")
EMA_DECAY = Option(UnitInterval(), "decay of the factors' moving average", symbol="gamma", identifies=True)
UPDATE_INTERVAL = Option(
    Count("steps"), "optimizer steps between two refreshes of the factors", symbol="T_cov", shared=True
)
MOMENTUM_DTYPE = Option(FloatingDtype("that of the parameter"), "dtype of the first moment")


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of one optimizer; making an instance checks every value.

    Attributes:
        needs: Requirements of a step with these options, which decide the training modes that are refused.

    Raises:
        ValueError: A value is outside its range.
    """

    needs: ClassVar[Needs] = Needs.LAYERS | Needs.SHAPES

    def __post_init__(self) -> None:
        for name, specification in self.specifications().items():
            specification.range.check(name, getattr(self, name))

    @classmethod
    def specifications(cls) -> dict[str, Option]:
        """Every option by name, in the order of the fields."""
        return {f.name: f.metadata[_OPTION] for f in fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every default by name."""
        return {f.name: f.default for f in fields(cls)}

    @classmethod
    def names(cls, **attributes: Any) -> tuple[str, ...]:
        """Names of the options with these attributes of ``Option``, such as ``in_groups=True``."""
        return tuple(
            name
            for name, specification in cls.specifications().items()
            if all(getattr(specification, key) == value for key, value in attributes.items())
        )

    def group_options(self) -> dict[str, Any]:
        """Return the defaults of a parameter group."""
        return {name: getattr(self, name) for name in self.names(in_groups=True)}

    @classmethod
    def check_group(cls, group: dict[str, Any], first: Mapping[str, Any]) -> None:
        """Check a parameter group, and bring its options into the form that groups keep.

        Args:
            group: The group.
            first: The optimizer's first group.

        Raises:
            ValueError: An option is outside its range, or differs from the first group's although all share it.
        """
        names = cls.names(in_groups=True)
        for name in cls.names(shared=True):  # before others are checked by what it decides
            if group[name] is None and cls.defaults()[name] is None:  # the form's default, or that of the others
                group[name] = first[name]
                continue
            cls.specifications()[name].range.check(name, group[name])
            if group[name] != first[name]:
                raise ValueError(
                    f"{name} must be the same in all parameter groups, since it holds for all of them at once: "
                    f"got {group[name]} beside {first[name]}"
                )
        options = cls(**{name: group[name] for name in names})
        for name in names:
            group[name] = cls.specifications()[name].range.plain(getattr(options, name))


def options_in_use(optimizer: Any, **changes: Any) -> dict[str, Any]:
    """Return the options of an optimizer's first parameter group, for people to read.

    Args:
        optimizer: Any optimizer; only those with an ``options_class`` have options here.
        **changes: Values to show instead, such as the learning rate before its schedule.
    """
    options_class = getattr(optimizer, "options_class", None)
    if options_class is None:
        return {}
    group = {**optimizer.param_groups[0], **changes}
    return {name: group[name] for name in options_class.names(in_groups=True)}


def dtype_option(group: Mapping[str, Any], name: str, default: torch.dtype | None = None) -> torch.dtype | None:
    """Return the dtype that a group's option names, ``default`` where it is None or absent."""
    value = group.get(name)
    return default if value is None else _dtype(value)


def _dtype(value: Any) -> Any:
    """A dtype by its name; anything else as it is, None for a name that torch does not have."""
    return value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)


def _number(name: str, value: Any) -> float:
    several = isinstance(value, torch.Tensor) and value.numel() != 1
    if isinstance(value, bool) or several or not isinstance(value, (numbers.Real, torch.Tensor)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number of more than 300 digits") from None
    if number == 0.0 and math.copysign(1.0, number) < 0.0:
        raise ValueError(f"{name} must not be negative zero, by which a division gives -inf: got -0.0, write 0.0")
    return number
