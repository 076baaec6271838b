"""The optimizers' options as training arguments, with names that no other arguments class has."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.optimizers.factory.records import OptimizerRecord

PREFIX = "adafisher_"
"""What the names of arguments begin with: TRL's configurations have a ``beta`` too, and others may follow."""


def argument_of(option: str) -> str:
    """Name of the training argument for an option of an optimizer, or for another of the package's settings."""
    return PREFIX + option


def short_name_metadata(name: str) -> dict[str, Any]:
    """Metadata of the field for ``argument_of(name)``, by which ``HfArgumentParser`` takes ``--name`` too."""
    return {"aliases": [f"--{word}" for word in dict.fromkeys((name, name.replace("_", "-")))]}


def options_with_arguments(optim: str) -> tuple[str, ...]:
    """Options of this optimizer of the package that are training arguments; none for any other optimizer."""
    own = optimizer_record(optim).options_class if optim in available_optimizers() else None
    return () if own is None else own.names(argument=True)


@functools.cache
def short_names(arguments: type) -> Mapping[str, str]:
    """The names without the prefix that a class of arguments also takes, each with its field.

    Args:
        arguments: A dataclass.
    """
    return {
        f.name.removeprefix(PREFIX): f.name
        for f in fields(arguments)
        if f.name.startswith(PREFIX) and f.metadata.get("aliases")
    }


class ArgumentsMeta(type):
    """Class of arguments whose constructor takes the short names too, where no field of its own has them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object, with short names replaced by those of the fields.

        Raises:
            TypeError: The class joins dataclasses without being one.
            ValueError: An argument is given by both of its names, with two values.
        """
        _check_decorated(cls)
        for short, name in short_names(cls).items():
            if short in kwargs:
                value = kwargs.pop(short)
                other = kwargs.get(name, value)
                if other is not None and value is not None and other != value:
                    raise ValueError(f"{short}={value!r} and {name}={other!r} are one argument: give {name} only")
                kwargs[name] = other if value is None else value
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Signature of the constructor, which ``__call__`` would hide."""
        whole = inspect.signature(cls.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])


def _check_decorated(cls: type) -> None:
    known = {f.name for f in fields(cls)}
    for base in cls.__mro__[1:]:
        if not known.issuperset(vars(base).get("__dataclass_fields__", ())):
            raise TypeError(
                f"{cls.__name__} has not the arguments of {base.__name__}, since it is no dataclass: write @dataclass "
                f"above class {cls.__name__}"
            )


def redeclare_fields(cls: Any, ours: type) -> None:
    """Declare fields anew in a class that joins ``ours`` with another arguments class, before it becomes a dataclass.

    A dataclass takes each field from the first base that has it, inherited or not, so that the defaults of one base
    would replace those that the other declares. Here the optimizer and its learning rate are ours and all others are
    those of the first base that declares them, and a field of the other class with one of the short names keeps its
    meaning. What the class itself declares stays.

    Args:
        cls: Subclass of ``ours``.
        ours: AdaFisherTrainingArguments.
    """
    nearest = next(base for base in cls.__mro__[1:] if issubclass(base, ours))
    others = other_classes(cls, ours)
    anew: dict[str, Any] = {}
    if others:
        sources = [_fields_of(base) for base in cls.__mro__[1:] if base is nearest or base in others]
        for name, inherited in _fields_of(TrainingArguments).items():
            declared = [source[name] for source in sources if source.get(name, inherited) is not inherited]
            anew |= {name: declared[0]} if declared else {}
        anew |= {name: _fields_of(nearest)[name] for name in ("optim", "learning_rate")}
    own = inspect.get_annotations(cls)
    taken = {*own, *(name for other in others for name in _fields_of(other))}
    anew |= {name: _fields_of(nearest)[name] for short, name in short_names(nearest).items() if short in taken}
    for name in anew.keys() - own.keys():
        again = copy.copy(anew[name])
        if name.startswith(PREFIX):
            again.metadata = {key: value for key, value in again.metadata.items() if key != "aliases"}
        cls.__annotations__[name] = again.type
        setattr(cls, name, again)


def _fields_of(arguments: type) -> dict[str, Any]:
    """Fields by name; those that a class inherits as they are, are the objects of its base."""
    return {f.name: f for f in fields(arguments)}


def other_classes(cls: type, ours: type) -> list[Any]:
    """Dataclasses that a subclass of ``ours`` joins it with, nearest first."""
    return [
        base
        for base in cls.__mro__[1:]
        if "__dataclass_fields__" in vars(base) and not issubclass(base, ours) and not issubclass(ours, base)
    ]


def _option_fields() -> list[tuple[str, Any, Any]]:
    """Fields for the options that are training arguments, those of most optimizers first."""
    users: dict[str, list[str]] = {}
    for optim in available_optimizers():
        for name in options_with_arguments(optim):
            users.setdefault(name, []).append(optim)
    return [_option_field(name, users[name]) for name in sorted(users, key=lambda name: -len(users[name]))]


def _option_field(name: str, optims: list[str]) -> tuple[str, Any, Any]:
    """Name, type and field of the argument for an option that these optimizers have in common."""
    record = optimizer_record(optims[0])
    own = record.options_class
    assert own is not None
    kind: Any = get_type_hints(own)[name]
    if torch.dtype in get_args(kind):  # a command line has words only
        kind = str | None
    kind = kind if type(None) in get_args(kind) else kind | None
    defaults = {optim: optimizer_record(optim).option_defaults()[name] for optim in optims}
    alike = len(set(defaults.values())) == 1
    shown = str(defaults[optims[0]]) if alike else ", ".join(f"{value} ({key})" for key, value in defaults.items())
    shown += _of_other_forms(record, name)
    text = f"{', '.join(optims)}: {own.specifications()[name]}. Default: {shown}."
    metadata = {"help": text, "metavar": name.upper(), **short_name_metadata(name)}
    return argument_of(name), kind, field(default=None, metadata=metadata)


def _of_other_forms(record: OptimizerRecord, name: str) -> str:
    """The option's defaults in the optimizer's other forms, where they differ, for the help text."""
    forms = record.forms if name != record.form else {}
    values = {form.rpartition(", ")[2]: record.option_defaults(**chosen)[name] for form, chosen in forms.items()}
    said = [f"{value} with {form}" for form, value in values.items() if value != values[record.name]]
    return f"; {', '.join(said)}" if said else ""


# Typed as Any, so that type checkers accept the generated arguments beside those of TrainingArguments.
OptionArguments: Any = make_dataclass("OptionArguments", _option_fields(), namespace={"__module__": __name__})


def parse_options(text: str | None, argument: str) -> dict[str, Any]:
    """Parse ``"a=1,b=(0.9, 0.99),c=true"`` into a dictionary of Python values.

    Args:
        text: The options; None or empty for none.
        argument: Name of the argument that holds them, for the message.

    Raises:
        ValueError: It is not of this form.
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not of the form key=value")
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError("not of the form key=value, or one key twice")
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f'{argument} must look like "key=value,key=value", each key once, with numbers, words, true, false, none '
            f"or (tuples), got {text!r}"
        ) from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a shell has eaten the quotes
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)
