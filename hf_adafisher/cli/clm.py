r"""Train or fine-tune a causal language model with AdaFisherW or any other optimizer, on one command.

A small GPT-2 on the text that comes with Python, no network needed; the same on WikiText-2 with AdamW:

    hf-adafisher clm --output_dir out
    hf-adafisher clm --dataset wikitext-2 --optim adamw --learning_rate 1e-3 --output_dir out

Your own text, a pretrained model, options from a file (the same names as keys), an interrupted run:

    hf-adafisher clm --train_file a.txt --validation_file b.txt --test_file c.txt --output_dir out
    hf-adafisher clm --model_name_or_path gpt2 --dataset roneneldan/TinyStories --streaming --max_steps 500 \
        --learning_rate 5e-5 --use_lora --output_dir out
    hf-adafisher clm config.yaml
    hf-adafisher clm --output_dir out --resume_from_checkpoint last

The output directory then holds results.json, learning_curve.png, the model, its tokenizer and a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_adafisher.experiments.runs.arguments import show_help
from hf_adafisher.experiments.runs.clm import ClmRun
from hf_adafisher.experiments.runs.clm_arguments import (
    ClmTrainingArguments,
    DataArguments,
    ModelArguments,
    parse_clm_arguments,
)
from hf_adafisher.experiments.runs.clm_setup import prepare_clm_run
from hf_adafisher.experiments.runs.run import run_script

ARGUMENTS = {"Model": ModelArguments, "Data": DataArguments, "Training": ClmTrainingArguments}
"""Dataclasses of the arguments, by the titles of their groups in the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return the exit status: 0; 1 if the run diverged; 2 for bad input."""
    if show_help(argv, "hf-adafisher clm", str(__doc__), ARGUMENTS):
        return 0
    return run_script(prepared, argv)


def prepared(argv: Sequence[str] | None = None) -> ClmRun:
    """Prepare the run of a command line."""
    return prepare_clm_run(*parse_clm_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
