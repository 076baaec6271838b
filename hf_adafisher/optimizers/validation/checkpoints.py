"""Checks of a saved optimizer state: its kind, its model, and the options that it changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

logger = logging.getLogger(__name__)

Groups = Sequence[Mapping[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]
_NOT_SHOWN = ("params", "param_names", "initial_lr")


def check_kind(kind: str, keys: Set[str], decoupled: bool | None, groups: Groups) -> None:
    """Check that saved parameter groups were written by this kind of optimizer; torch loads any without a word.

    Args:
        kind: The optimizer's name, for the message.
        keys: Options that its groups have and those of other kinds lack.
        decoupled: Its ``decoupled_weight_decay``, by which Adam differs from AdamW; None where it has no such option.
        groups: ``state_dict["param_groups"]``.

    Raises:
        ValueError: They were not.
    """
    for group in groups:
        saved = group.get("decoupled_weight_decay", decoupled)
        if not group.keys() >= keys or saved != decoupled:
            raise foreign_checkpoint(kind, group)


def foreign_checkpoint(kind: str, options: Mapping[str, Any], writers: str = "") -> ValueError:
    """Return the error about a checkpoint with these options, which are not those of ``kind``."""
    shown = ", ".join(f"{key}={value}" for key, value in sorted(options.items()) if key not in _NOT_SHOWN)
    looks = f"; they are {writers}'s" if writers else ""
    return ValueError(
        f"this checkpoint was not written by {kind} (its options are {shown}{looks}): resume with the optimizer that "
        "wrote it, or start without the optimizer state"
    )


def check_fixed_options(own: Groups, saved: Groups, names: Iterable[str]) -> None:
    """Check that a checkpoint has the optimizer's values of the options that no checkpoint may change.

    Raises:
        ValueError: One differs.
    """
    for name in names:
        for own_group, saved_group in zip(own, saved, strict=False):
            if name in saved_group and saved_group[name] != own_group[name]:
                raise ValueError(
                    f"the checkpoint was written with {name}={saved_group[name]} and this optimizer built with "
                    f"{own_group[name]}, which decides the shapes of its state: build it with the same value"
                )


def check_shapes(expected: Sequence[tuple[str, Shapes]], state_dict: Mapping[str, Any]) -> None:
    """Check that the tensors of a saved state fit the model.

    Args:
        expected: Name and state shapes of every parameter, in the order of the groups.
        state_dict: The saved state.

    Raises:
        ValueError: They do not; the message names the parameter.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(saved_ids) != len(expected):
        return  # torch's own message says which groups differ
    for saved_id, (name, shapes) in zip(saved_ids, expected, strict=True):
        saved = state_dict["state"].get(saved_id)
        found = {key: tuple(value.shape) for key, value in saved.items()} if saved else shapes
        if found != shapes:
            raise ValueError(
                f"the saved state of {name} does not fit the model: saved {found}, needed {shapes}; "
                "resume with the model, and the version of hf_adafisher, that the checkpoint was written with, or "
                "start without the optimizer state"
            )


def warn_changed_options(own: Groups, saved: Groups, names: Iterable[str]) -> None:
    """Warn of these options where a checkpoint is about to change the values that the optimizer was built with.

    Args:
        own: ``optimizer.param_groups``.
        saved: ``state_dict["param_groups"]``.
        names: The options.
    """
    names = list(names)
    changed = {
        f"{name}: {group[name]} -> {saved_group[name]}"
        for group, saved_group in zip(own, saved, strict=False)
        for name in names
        if name in group and name in saved_group and group[name] != saved_group[name]
    }
    if changed:
        logger.warning(
            "The checkpoint's options replace those given to the optimizer (%s). To change them, set them in "
            "optimizer.param_groups after loading.",
            ", ".join(sorted(changed)),
        )
