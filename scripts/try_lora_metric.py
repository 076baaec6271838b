"""Try a metric for LoRA pairs: that of A from B and that of B from A, since the loss sees their product alone.

    python scripts/try_lora_metric.py --model FOLDER_OR_NAME --text train.txt valid.txt --output out/lora.json

A pretrained causal language model, adapters on all of its linear layers at each rank; AdamW, AdaFisherW by the root,
SpectralAdaFisher as it is, and with the metric: with ``G`` the momentum of ``A (r, in)`` and ``P`` the inverse root of
``B^T B / mean diag + rho``, the step is ``P polar(P G b) b`` in the place of ``a polar(a G b) b``; of ``B`` likewise
with ``A A^T``. Rates are swept with seed 0, the best of each runs on with the other seeds. Leaves the validation loss
of every run, means, and paired differences from AdamW and from the rule as it is with 95 % intervals.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from hf_adafisher import AdaFisherW, SpectralAdaFisher
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.paired import paired_interval
from hf_adafisher.optimizers.polar import polar_factor

METRIC = "spectral, metric of the pair"
RATES = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "adafisherw": (1e-3, 4e-3, 1e-2, 3e-2),
    "spectral": (1e-2, 2e-2, 4e-2, 8e-2),
    METRIC: (1e-2, 2e-2, 4e-2, 8e-2),
}
BATCH, LENGTH = 8, 128


class PairSpectralAdaFisher(SpectralAdaFisher):
    """SpectralAdaFisher in which LoRA's matrices take the metric of one side from their partner."""

    def __init__(self, model: Any, **options: Any) -> None:
        self._partners: dict[Tensor, tuple[Tensor, bool]] = {}
        for module in model.modules():
            if hasattr(module, "lora_A"):
                for name, a in module.lora_A.items():
                    b = module.lora_B[name].weight
                    self._partners |= {a.weight: (b, True), b: (a.weight, False)}
        super().__init__(model, **options)

    def _move_matrices(self, members: Sequence[Any]) -> None:
        for member, momentum in zip(members, self._momenta(members), strict=True):
            partner, is_a = self._partners[member.param]
            rho = member.group["relative_damping"]
            gram = partner.mT @ partner if is_a else partner @ partner.mT
            gram = gram / gram.diagonal().mean().clamp_min(1e-30) + rho * torch.eye(len(gram))
            values, vectors = torch.linalg.eigh(gram)
            inner = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.mT
            outer = momentum.square().mean(0 if is_a else 1, keepdim=True)
            outer = (outer / outer.mean().clamp_min(1e-30) + rho).rsqrt()
            whitened = inner @ momentum * outer if is_a else outer * momentum @ inner
            o = polar_factor(whitened[None])[0]
            self._move([member], (inner @ o * outer if is_a else outer * o @ inner)[None])


def run(name: str, rate: float, rank: int, seed: int, args: argparse.Namespace, ids: tuple[Tensor, Tensor]) -> float:
    """Fine-tune; return the validation loss."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(params, lr=rate, weight_decay=0.0),
        "adafisherw": lambda: AdaFisherW(model, lr=rate, step_size="root"),
        "spectral": lambda: SpectralAdaFisher(model, lr=rate),
        METRIC: lambda: PairSpectralAdaFisher(model, lr=rate),
    }[name]()
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    train, validation = ids
    for _ in range(args.steps):
        starts = torch.randint(len(train) - LENGTH, (BATCH,))
        batch = torch.stack([train[i : i + LENGTH] for i in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss.item() for b in validation.reshape(-1, 4 * BATCH, LENGTH)]
    return statistics.mean(losses)


def main() -> int:
    """Sweep, run on, compare."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs=2, type=Path, required=True, metavar=("TRAIN", "VALID"))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13, 14])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    train, validation = (torch.tensor(tokenizer(text[:4_000_000])["input_ids"]) for text in texts)
    ids = train, validation[: 4 * 4 * BATCH * LENGTH]
    sweep = [(rank, name, rate) for rank in args.ranks for name, rates in RATES.items() for rate in rates]
    found = {job: run(job[1], job[2], job[0], 0, args, ids) for job in tqdm(sweep, desc="rates")}
    ranks: dict[str, Any] = {}
    for rank in args.ranks:
        rows: dict[str, Any] = {}
        for name, rates in RATES.items():
            losses = {rate: found[rank, name, rate] for rate in rates}
            best = min(losses, key=lambda rate: losses[rate])
            seeds = [run(name, best, rank, s, args, ids) for s in tqdm(args.seeds, desc=f"r={rank}, {name}")]
            rows[name] = {"rates": losses, "best": best, "losses": seeds, "mean": statistics.mean(seeds)}
        for name, row in rows.items():
            row["minus adamw"] = paired_interval(row["losses"], rows["adamw"]["losses"])
            row["minus spectral"] = paired_interval(row["losses"], rows["spectral"]["losses"])
            print(f"r={rank} {name}, {row['best']}: {row['mean']:.4f}", row["minus adamw"], row["minus spectral"])
        ranks[f"r={rank}"] = rows
        write_json(args.output, {"model": args.model, "steps": args.steps, "seeds": args.seeds, "ranks": ranks})
    return 0


if __name__ == "__main__":
    sys.exit(main())
