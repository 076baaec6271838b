"""Keywords of an optimizer's constructor that it does not have, with what to write instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

_ADAMS = {"betas": ("beta", "momentum"), "eps": ("damping", "relative_damping"), "learning_rate": ("lr",)}
"""Keywords that users of Adam and of training arguments are used to, and what they are called here."""


def check_keywords(cls: type, given: Iterable[str]) -> None:
    """Check keywords before Python does, whose error names the base class and no way out.

    Args:
        cls: Class that is called.
        given: Names of the keywords.

    Raises:
        TypeError: The constructor of ``cls`` does not take one of them.
    """
    signature = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
        return
    known = [name for name in signature if name != "self"]
    for name in given:
        if name not in known:
            usual = [word for word in _ADAMS.get(name, ()) if word in known]
            near = (usual or difflib.get_close_matches(name, known, n=1) or [""])[0]
            advice = f": write {near}={'betas[0]' if name == 'betas' else '...'}" if near else ""
            raise TypeError(f"{cls.__name__} has no option {name!r}{advice}; its options are {', '.join(known)}")
