"""Count the files, functions and calls of the package that one ``optimizer.step()`` of a two-layer MLP runs through.

``python scripts/trace_step.py [--optim adafisherw] [--list]`` prints them for a step by the root of the diagonal, and,
of optimizers with hooks, for an idle step and for one that refreshes the factors. ``docs/architecture.md`` quotes these
numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import hf_adafisher
from hf_adafisher import create_optimizer
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.optimizers.validation.training_modes import Needs

PACKAGE = Path(hf_adafisher.__file__).parent


def package_calls(run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Calls of the package's functions while ``run`` runs, by file and qualified name; comprehensions do not count."""
    calls: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            calls[str(Path(code.co_filename).relative_to(PACKAGE)), getattr(code, "co_qualname", code.co_name)] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def trace(name: str) -> dict[str, Counter[tuple[str, str]]]:
    """Calls of the steps of every form of an optimizer, all after the state exists.

    Returns:
        ``root``: without hooks; ``due`` and ``idle``: with hooks, the latter with idle neighbours.
    """
    traced = {}
    for options in optimizer_record(name).forms.values():
        hooks = Needs.LAYERS in optimizer_record(name).needs_with(options)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = create_optimizer(name, model, lr=1e-3, **options, **({"update_interval": 4} if hooks else {}))
        for step in range(9):
            model(torch.randn(32, 8)).square().mean().backward()
            calls = package_calls(optimizer.step)
            traced[{0: "due", 2: "idle"}.get(step % 4, "other") if hooks else "root"] = calls
            optimizer.zero_grad()
    return {kind: traced[kind] for kind in ("idle", "due", "root") if kind in traced}


def main() -> None:
    """Print the counts as a table, or as JSON."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default="adafisherw", help="adafisherw, adafisher, spectral-adafisher or kfac")
    parser.add_argument("--list", action="store_true", help="list the functions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    traced = trace(args.optim)
    counts = {
        kind: {"files": len({file for file, _ in calls}), "functions": len(calls), "calls": calls.total()}
        for kind, calls in traced.items()
    }
    if args.json:
        print(json.dumps(counts))
        return
    for kind, count in counts.items():
        print(f"{kind} step: " + ", ".join(f"{number} {what}" for what, number in count.items()))
        for (file, function), number in sorted(traced[kind].items()) if args.list else ():
            print(f"  {file}: {function} x {number}")


if __name__ == "__main__":
    main()
