"""Result of a diagnosis: findings in sentences, and the numbers they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong for this optimizer.

    Attributes:
        ailment: What it is, one of the names of ``hf_adafisher.optimizers.diagnostics.doctor.AILMENTS``.
        sentence: What was seen, what it does and what to change.
        argument: The argument to change, as the optimizer or Trainer names it. AdaFisherTrainingArguments has
            most of the optimizer's with ``adafisher_`` before them, and takes all of them in ``optim_args``.
        numbers: What the sentence is made from.
    """

    ailment: str
    sentence: str
    argument: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Findings about the settings of a run, after a few of its steps; ``str()`` of it is a text for people.

    Attributes:
        optimizer: The optimizer's class, with its form where it has several.
        steps: Number of steps that it has made.
        findings: What is wrong, the most serious first; empty for a healthy run.
        numbers: What was measured, healthy or not; None where it is not known.
    """

    optimizer: str
    steps: int
    findings: tuple[Finding, ...]
    numbers: Mapping[str, Any]

    @property
    def healthy(self) -> bool:
        """True where nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        count = len(self.findings)
        found = f"{count} finding{'s' * (count > 1)}" if count else "nothing was found"
        lines = [f"{self.optimizer} after {self.steps} steps: {found}."]
        lines += [f"{i}. [{one.ailment}] {one.sentence}" for i, one in enumerate(self.findings, 1)]
        lines += [f"  {name.replace('_', ' ')}: {_shown(value)}" for name, value in self.numbers.items()]
        return "\n".join(lines)


def _shown(value: Any) -> str:
    """A number, a name or what contains them, in a few words."""
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return listed([_shown(one) for one in value]) or "none"
    return str(value)


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many there are more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
