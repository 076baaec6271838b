"""Measure changes to the spectral AdaFisher against the rule as it is, and its parts against Muon, with paired seeds.

    python scripts/try_spectral_variants.py --seeds 10 11 12 13 14 --output_dir out/variants
    python scripts/try_spectral_variants.py --task image --variants "every head of them apart" --output_dir out/vit

Tasks are those of the presets lm-scratch and vit-finetune (without its layer-wise decay), at 0.02 and 3e-4;
``--set key=value`` changes their arguments. A variant is a patch of the optimizer in the process of its run, so that
what does not earn its place is in no other file. "Muon in this code" is the rule without its metric, with Muon's
polynomials and no bound, and everything else by AdamW: Muon with Moonlight's size of a step, and one rate for all, half
the rule's, which was the best of 0.005, 0.01 and 0.02 with seed 9.
Leaves ``variants.json`` and ``variants.md``: test loss or accuracy, mean difference from the reference, and its 95 %
interval by Student's t. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_adafisher import SpectralAdaFisher
from hf_adafisher.cli.clm import prepared as prepare_clm
from hf_adafisher.cli.image import prepared as prepare_image
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.comparison.cells import use_local_data
from hf_adafisher.experiments.comparison.configuration import PRESETS
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.paired import LEAST_SEEDS, paired_interval
from hf_adafisher.experiments.report.tuning import RATE
from hf_adafisher.experiments.runs.run import run_script
from hf_adafisher.optimizers import polar, spectral
from hf_adafisher.optimizers.polar import polar_factor

TASKS: dict[str, tuple[Callable[..., Any], str, float, str]] = {
    "text": (prepare_clm, "lm-scratch.json", 0.02, "loss"),
    "image": (prepare_image, "vit-finetune.json", 3e-4, "accuracy"),
}
AS_IT_IS = "as it is"


def directions(rows: float = 0.5, columns: float = 0.5, back: bool = True) -> Callable[..., Tensor]:
    """``spectral_directions`` with other powers of the two factors, or without the way back."""

    def found(momenta: Sequence[Tensor], relative_damping: float, polar_dtype: Any = None) -> Tensor:
        m = torch.stack(list(momenta))
        m = m / m.abs().amax((1, 2), keepdim=True).clamp_min(1e-38)
        r, c = m.square().mean(2, keepdim=True), m.square().mean(1, keepdim=True)
        a = (r / r.mean(1, keepdim=True).clamp_min(1e-38) + relative_damping) ** -rows
        b = (c / c.mean(2, keepdim=True).clamp_min(1e-38) + relative_damping) ** -columns
        o = polar_factor(a * m * b, polar_dtype)
        return a * o * b if back else o

    return found


def use_directions(**options: Any) -> Callable[[], None]:
    """Patch for ``directions``."""
    return lambda: setattr(spectral, "spectral_directions", directions(**options))


def normalised_rows(**options: Any) -> Callable[[], None]:
    """NorMuon: rows of the direction over the root of the average of their mean squares, decay 0.95."""
    averages: dict[Tensor, Tensor] = {}
    move = SpectralAdaFisher._move

    def moved(self: SpectralAdaFisher, members: Sequence[Any], found: Tensor) -> None:
        squares = found.square().mean(2, keepdim=True)
        for member, square, o in zip(members, squares, found, strict=True):
            average = averages.setdefault(member.param, torch.zeros_like(square)).lerp_(square, 0.05)
            o.div_((average / (1 - 0.95**member.step)).sqrt().clamp_min(1e-12))
        move(self, members, found)

    def patch() -> None:
        use_directions(**options)()
        SpectralAdaFisher._move = moved  # type: ignore[method-assign]

    return patch


def cautious() -> None:
    """No step where the direction and the gradient disagree in sign; the others keep the size of the whole."""
    move = SpectralAdaFisher._move

    def moved(self: SpectralAdaFisher, members: Sequence[Any], found: Tensor) -> None:
        grads = torch.stack([member.grad.flatten(1) for member in members])
        move(self, members, found * (found * grads > 0))

    SpectralAdaFisher._move = moved  # type: ignore[method-assign]


def momentum_warm_up(steps: int = 100) -> None:
    """Momentum of 0.85 to 0.95 in the first steps."""
    inner = SpectralAdaFisher._momenta

    def momenta(self: SpectralAdaFisher, members: Sequence[Any]) -> list[Tensor]:
        group = {**members[0].group, "beta": 0.85 + 0.1 * min(members[0].step / steps, 1.0)}
        return inner(self, [member._replace(group=group) for member in members])

    SpectralAdaFisher._momenta = momenta  # type: ignore[method-assign]


def split_projections(parts: int) -> Callable[[], None]:
    """Query, key and value of GPT-2's fused projection ``(in, 3 in)``, or its heads, as matrices of their own."""

    def patch() -> None:
        inner = spectral.spectral_directions

        def split(momenta: Sequence[Tensor], relative_damping: float, polar_dtype: Any = None) -> Tensor:
            rows, columns = momenta[0].shape
            n = parts if columns == 3 * rows else 1
            found = inner([piece for m in momenta for piece in m.chunk(n, 1)], relative_damping, polar_dtype)
            return found.reshape(-1, n, rows, columns // n).movedim(1, 2).reshape(-1, rows, columns)

        spectral.spectral_directions = split

    return patch


def relative_step(size: float) -> Callable[[], None]:
    """Hyperball's: hidden matrices move by ``lr * size`` of their norm instead of a root mean square of 0.2 lr."""

    def patch() -> None:
        def move(self: SpectralAdaFisher, members: Sequence[Any], found: Tensor) -> None:
            for member, direction in zip(members, found, strict=True):
                p = member.param.detach()
                p.mul_(1 - member.group["lr"] * member.group["weight_decay"])
                length = member.group["lr"] * size * p.norm() / direction.norm().clamp_min(1e-12)
                p.sub_(direction.reshape(p.shape) * length)

        SpectralAdaFisher._move = move  # type: ignore[method-assign]

    return patch


def constant(module: Any, name: str, value: Any) -> Callable[[], None]:
    """Patch of a number."""
    return lambda: setattr(module, name, value)


def rest_by_adamw() -> None:
    """Everything but hidden matrices by AdamW: the rule's rate and beta, Muon's beta2 of 0.95, and no bound."""
    squares: dict[Tensor, Tensor] = {}

    def move(self: SpectralAdaFisher, members: Sequence[Any]) -> None:
        for member in members:
            p, grad, m, group = member.param.detach(), member.grad, member.exp_avg, member.group
            m.lerp_(grad, 1 - group["beta"])
            v = squares.setdefault(member.param, torch.zeros_like(p)).lerp_(grad.square(), 0.05)
            root = (v / (1 - 0.95**member.step)).sqrt_().add_(1e-10)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(m, root, value=-group["lr"] / (1 - group["beta"] ** member.step))
            self._last_steps.pop(id(member.param), None)

    SpectralAdaFisher._move_by_root = move  # type: ignore[assignment]


def together(*patches: Callable[[], None]) -> Callable[[], None]:
    """Patch of several."""

    def patch() -> None:
        for one in patches:
            one()

    return patch


def no_patch() -> None:
    """The rule as it is; options may differ."""


NO_METRIC = use_directions(rows=0.0, columns=0.0)
MUON_POLYNOMIALS = constant(polar, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
NO_BOUND = {"optim_args": "max_relative_step=None"}
HALF = {RATE: 0.5}
MUON = "Muon in this code, half the rate"
MUON_RULE = together(NO_METRIC, rest_by_adamw, MUON_POLYNOMIALS)

VARIANTS: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    AS_IT_IS: (no_patch, {}),
    "no metric (Muon's polar factor)": (NO_METRIC, {}),
    "everything else by AdamW, without the bound": (rest_by_adamw, {}),
    "no bound": (no_patch, NO_BOUND),
    "no bound, half the rate": (no_patch, NO_BOUND | HALF),
    "Muon's polynomials": (MUON_POLYNOMIALS, {}),
    "no Nesterov step": (no_patch, {"optim_args": "nesterov=False"}),
    MUON: (MUON_RULE, NO_BOUND | HALF),
    "metric of the rows alone": (use_directions(columns=0.0), {}),
    "metric without the way back (MuonEq)": (use_directions(back=False), {}),
    "rows normalised after it (NorMuon), with the metric": (normalised_rows(), {}),
    "rows normalised after it (NorMuon), no metric": (normalised_rows(rows=0.0, columns=0.0), {}),
    "cautious masking of hidden matrices": (cautious, {}),
    "momentum from 0.85 to 0.95 in 100 steps, hidden matrices": (momentum_warm_up, {}),
    "every head of them apart": (split_projections(3 * 4), {}),
    "three polar iterations": (constant(polar, "COEFFICIENTS", polar.COEFFICIENTS[:3]), {}),
    "relative steps of lr (Hyperball)": (relative_step(1.0), {}),
}
"""Changes to the rule, each with its options; ``RATE`` there multiplies the rate."""

ADDITIONS: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "Muon with the metric": (together(rest_by_adamw, MUON_POLYNOMIALS), NO_BOUND | HALF),
    "Muon with the diagonal for everything else": (together(NO_METRIC, MUON_POLYNOMIALS), NO_BOUND | HALF),
    "Muon with four other polynomials": (together(NO_METRIC, rest_by_adamw), NO_BOUND | HALF),
    "Muon with the bound": (MUON_RULE, HALF),
}
"""Changes to ``MUON``, which they are compared with: the parts of the rule, each alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    known = [*VARIANTS, *ADDITIONS]
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--variants", nargs="+", choices=known, default=known, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13, 14])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other arguments of the task")
    parser.add_argument("--local_data", type=Path, help="folder to take the data from, where there is no network")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    references = [AS_IT_IS, *([MUON] if ADDITIONS.keys() & set(args.variants) else [])]
    variants = list(dict.fromkeys([*references, *args.variants]))
    todo = [(args, variant, seed) for seed in args.seeds for variant in variants]
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for _ in tqdm(pool.imap(_run, todo, chunksize=1), total=len(todo), desc="runs"):
            _write(args, variants)
    return 0


def _folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    words = "-".join("".join(c if c.isalnum() else " " for c in variant).split())
    return args.output_dir / "runs" / f"{words}-{seed}"


def _run(job: tuple[argparse.Namespace, str, int]) -> None:
    args, variant, seed = job
    folder = _folder(args, variant, seed)
    patch, options = (VARIANTS | ADDITIONS)[variant]
    prepare, preset, rate, _ = TASKS[args.task]
    config = json.loads((PRESETS / preset).read_text())
    if args.local_data is not None:
        config = use_local_data(config, args.local_data)
    settings = dict(config["common"])
    settings |= {"optim": "spectral-adafisher", RATE: rate, **dict(pair.split("=", 1) for pair in args.set)}
    settings |= {**options, RATE: float(settings[RATE]) * options.get(RATE, 1.0), "seed": seed}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    if (folder / "results.json").exists():
        record = folder / "arguments.json"
        if not record.exists() or json.loads(record.read_text()) != words:
            raise ValueError(f"{folder} holds a run with other or unknown arguments: use another --output_dir")
        return
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(words))
    patch()
    with (folder / "log.txt").open("w") as log:
        sys.stdout = sys.stderr = log
        status = run_script(prepare, [*words, "--output_dir", str(folder)])
    if status and not (folder / "results.json").exists():
        raise RuntimeError(f"{variant!r} with seed {seed} failed: see {folder / 'log.txt'}")


def _write(args: argparse.Namespace, variants: Sequence[str]) -> None:
    metric = TASKS[args.task][3]
    values: dict[str, dict[int, float]] = {}
    for variant in variants:
        for seed in args.seeds:
            path = _folder(args, variant, seed) / "results.json"
            if path.exists():
                values.setdefault(variant, {})[seed] = json.loads(path.read_text())["test"][metric]
    rows = []
    for variant, found in values.items():
        reference = MUON if variant in ADDITIONS else AS_IT_IS
        seeds = sorted(found.keys() & values.get(reference, {}).keys())
        row: dict[str, Any] = {"variant": variant, "values": found, "mean": statistics.mean(found.values())}
        if variant != reference and len(seeds) >= LEAST_SEEDS:
            pair = [found[s] for s in seeds], [values[reference][s] for s in seeds]
            row |= dict(zip(("difference", "low", "high"), paired_interval(*pair), strict=True))
            row |= {"seeds": len(seeds), "reference": reference}
        rows.append(row)
    write_json(args.output_dir / "variants.json", {"task": args.task, "metric": metric, "rows": rows})
    lines = [f"| variant | seeds | test {metric} | difference, 95 % interval | from |", "|---|---|---|---|---|"]
    for row in rows:
        text = "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**row) if "difference" in row else ""
        shown = f"{row['variant']} | {len(row['values'])} | {row['mean']:.3f} | {text} | {row.get('reference', '')}"
        lines.append(f"| {shown} |")
    (args.output_dir / "variants.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
