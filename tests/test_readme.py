"""What the README and the pages of docs/ show must run, and what they link to must be there."""

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
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
CALLS = re.findall(r"^(?:`|.* `)?(hf-adafisher \w[^`\n]*?)(?:`|$)", TEXT.replace("\\\n", " "), re.M)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LINKS = [
    (page, link)
    for page in PAGES
    for link in sorted(set(re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8"))))
]


def test_the_readme_is_a_front_door() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 8000 and len(text.splitlines()) <= 150
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for page, link in LINKS if page == README}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: getattr(value, "name", value))
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    name, _, wanted = link.partition("#")
    path = page.parent / name if name else page
    assert path.exists()
    if wanted:  # of a heading
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        assert wanted in [anchor(heading) for heading in headings]


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


@pytest.mark.parametrize(("name", "path"), re.findall(r"\[`(test_\w+)`\]\(\.\./([\w/.-]+)\)", TEXT))
def test_every_test_that_a_table_links_to_exists(name: str, path: str) -> None:
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_path_exists() -> None:
    paths = set(re.findall(r"(?<![\w/.])(?:scripts|docs|hf_adafisher|tests)/[\w/.-]*\w", TEXT))
    assert len(paths) > 5 and not {path for path in paths if not (ROOT / path).exists()}


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
