"""Check of the arguments of all cells, by the parsers of the runs themselves, before the first one starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.identity import data_fingerprints

_SHOWN = 5
# These depend on the machine that checks, which need not be the one that runs.
_OF_THE_MACHINE = {
    "bf16", "bf16_full_eval", "deepspeed", "fp16", "fp16_full_eval", "fsdp", "fsdp_config", "tf32", "torch_compile",
}  # fmt: skip


def check_cells(cells: Sequence[Cell]) -> None:
    """Parse the arguments of every cell as its run will.

    Raises:
        ValueError: Cells that would fail at their start: unknown arguments and optimizers, values of another type or
            out of range, data files that are not there, missing libraries; the message holds the first five reasons.
    """
    problems: dict[str, list[str]] = {}
    with _quiet():
        for cell in cells:
            try:
                _check(cell)
            except (ValueError, ImportError) as error:
                problems.setdefault(" ".join(str(error).split()), []).append(cell.name)
    if problems:
        lines = [f"{names[0]}{_others(names)}: {problem}" for problem, names in problems.items()]
        more = f"\nand {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        count = sum(map(len, problems.values()))
        raise ValueError(f"{count} of {len(cells)} cells cannot run:\n" + "\n".join(lines[:_SHOWN]) + more)


def _check(cell: Cell) -> None:
    missing = [name for name, fingerprint in data_fingerprints(cell).items() if fingerprint is None]
    if missing:
        raise ValueError(f"{missing[0]} does not exist: {cell.all_settings[missing[0]]}")
    arguments = {key: value for key, value in cell.all_settings.items() if key not in _OF_THE_MACHINE}
    _parser(cell.task)([*Cell(arguments).arguments(), "--output_dir", "unused"])


def _parser(task: str) -> Callable[[Sequence[str]], tuple[Any, ...]]:
    from hf_adafisher.experiments.runs.clm_arguments import parse_clm_arguments
    from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments

    return {"clm": parse_clm_arguments, "image": parse_image_arguments}[task]


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of runs, which each of them will say again, off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
