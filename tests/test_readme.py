"""What the README shows must run."""

from __future__ import annotations

import io
import re
import shlex
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.cli.main import COMMANDS, main
from hf_adafisher.experiments.comparison.configuration import available_presets

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "\n".join([TEXT, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))])
CALLS = re.findall(r"^(?:`|.* `)?(hf-adafisher \w[^`\n]*?)(?:`|$)", PAGES.replace("\\\n", " "), re.M)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_plain_pytorch_example_runs() -> None:
    (example,) = [block for block in PYTHON_BLOCKS if "torch.nn.Sequential" in block]
    scope: dict[str, object] = {}
    exec(example, scope)
    assert not any(module._forward_hooks for module in scope["model"].modules())  # type: ignore[attr-defined]


def test_the_stock_trainer_example_builds_the_optimizer(tmp_path: Path) -> None:
    from hf_adafisher import AdaFisherW
    from tests.model_zoo import family

    (example,) = [block for block in PYTHON_BLOCKS if "optimizer_cls_and_kwargs" in block]
    record = family("gpt2")
    scope = {"model": record.build(), "dataset": record.dataset(8)}
    exec(example.replace('"out"', f'"{tmp_path}", use_cpu=True, report_to="none"'), scope)
    optimizer = scope["trainer"].create_optimizer()  # type: ignore[attr-defined]
    assert isinstance(optimizer, AdaFisherW) and optimizer.defaults["lr"] == 1e-4


def test_the_trl_example_leaves_each_beta_to_its_own(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    (example,) = [block for block in PYTHON_BLOCKS if "AdaFisherMixin" in block]
    scope: dict[str, Any] = {}
    exec(example.replace('"out"', f'"{tmp_path}", use_cpu=True, report_to="none", bf16=False'), scope)
    args = scope["args"]
    assert (args.optim, args.learning_rate, args.beta) == ("adafisherw", 1e-6, 0.1)
    assert args.optimizer_options() == {"beta": 0.9}
    assert issubclass(scope["MyTrainer"], scope["DPOTrainer"])


@pytest.mark.parametrize(("name", "path"), re.findall(r"\[`(test_\w+)`\]\(([\w/.-]+)\)", TEXT))
def test_every_test_that_a_table_links_to_exists(name: str, path: str) -> None:
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|docs|hf_adafisher|tests)/[\w/.-]*\w", TEXT))))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@cache
def known_options(*words: str) -> frozenset[str]:
    """Options in the help of a command."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), suppress(SystemExit):
        patch.setattr(sys, "argv", ["hf-adafisher"])
        main([*words, "--help_all" if words[0] in ("clm", "image") else "--help"])
    return frozenset(re.findall(r"--[\w-]+", shown.getvalue()))


def test_commands_are_found() -> None:
    assert len(CALLS) > 30 and sum("hf-adafisher compare" in call for call in CALLS) > 8


@pytest.mark.parametrize("call", sorted(set(CALLS)))
def test_every_command_has_the_options_that_are_shown(call: str) -> None:
    words = shlex.split(call, comments=True)[1:]
    if words[0] in ("COMMAND", "--help"):
        return
    assert words[0] in COMMANDS
    names = words[:2] if words[0] == "figures" else words[:1]
    known = set(known_options(*names))
    if words[0] == "figures":  # they pass the arguments of a run on
        known |= known_options("clm") | known_options("image")
    assert {word.split("=")[0] for word in words if re.match("--[a-z]", word)} <= known
    if words[0] == "compare" and len(words) > 1 and not words[1].isupper():
        assert words[1] in available_presets()
