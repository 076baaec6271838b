"""Published numbers that a report shows beside a comparison's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_adafisher.optimizers.factory.catalog import canonical_name

_KEYS = {"source", "measure", "by", "values"}


@dataclass(frozen=True)
class PublishedResults:
    """Published numbers for the setting of a comparison.

    Attributes:
        source: Publication and table.
        metric: Metric as the title of a column.
        values: Numbers by the optimizer's name.
    """

    source: str
    metric: str
    values: Mapping[str, float]

    @property
    def title(self) -> str:
        """Title of the column."""
        return f"paper: {self.metric}"

    @property
    def note(self) -> str:
        """Note below the table."""
        return (
            f'The column "{self.title}" is {self.source}, as published: measured on other machines, with the '
            "learning rates of its authors."
        )


def read_published_results(config: Mapping[str, Any]) -> PublishedResults | None:
    """Read the published numbers of a configuration, or None if it has none for its setting.

    Args:
        config: With ``"paper": {"source": text, "measure": title, "values": {optimizer: number}}``. With
            ``"by": "dataset"`` the values have one more level, the value of that shared argument; a list of arguments
            has as many levels.

    Raises:
        ValueError: A missing or an unknown key, or values that are no numbers.
    """
    paper = config.get("paper")
    if paper is None:
        return None
    unknown = sorted(set(paper) - _KEYS)
    if unknown or not {"source", "measure", "values"} <= set(paper):
        raise ValueError(f'"paper" needs "source", "measure" and "values", may have "by"; unknown: {unknown or "none"}')
    values = paper["values"]
    by = decided_by(paper)
    for name in by:
        values = values.get(str(config.get("common", {}).get(name)), {})
        if not isinstance(values, Mapping):
            raise ValueError(f'the values of "paper" need a level for each of "by", {by}, got {values} there')
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError(f'the values of "paper" are numbers by optimizer, got {values}; is "by" missing?')
    by_optimizer = {canonical_name(name): value for name, value in values.items()}
    return PublishedResults(paper["source"], paper["measure"], by_optimizer) if values else None


def decided_by(paper: Mapping[str, Any]) -> list[str]:
    """Return the shared arguments on which the published numbers depend, outermost first."""
    by = paper.get("by", [])
    return by if isinstance(by, list) else [by]
