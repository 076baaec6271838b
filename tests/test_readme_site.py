"""The site of the documentation: its pages and links; `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import hf_adafisher
from hf_adafisher.optimizers.diagnostics.doctor import AILMENTS

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "out" / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER = (
    f"{CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=20000 --dump-dom"
).split()


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    module = ModuleType("hooks")
    module.__file__ = str(DOCS / "hooks.py")
    exec(compile((DOCS / "hooks.py").read_text(encoding="utf-8"), module.__file__, "exec"), module.__dict__)
    return module


def leaves(value: Any) -> list[str]:
    """Pages in a part of the navigation."""
    if isinstance(value, str):
        return [value]
    return [page for part in (value.values() if isinstance(value, dict) else value) for page in leaves(part)]


def test_the_navigation_has_every_page_once(hooks: ModuleType) -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = leaves(yaml.safe_load(text.partition("\nnav:\n")[2]))
    assert sorted(pages) == sorted([*(path.name for path in DOCS.glob("*.md")), *hooks.ORIGINS, *hooks.GENERATED])


def test_the_reference_has_every_public_name(hooks: ModuleType) -> None:
    assert sorted(name for names in hooks.API.values() for name in names) == sorted(hf_adafisher.__all__)


@pytest.mark.parametrize(
    ("page", "text", "moved"),
    [
        ("start.md", "[a](choose.md#tuning) [b](#top)", "[a](choose.md#tuning) [b](#top)"),
        ("start.md", "[a](../examples/dpo.py)", "[a](examples.md#dpo)"),
        ("method.md", "[a](../tests/README.md)", "[a](tests.md)"),
        ("method.md", "[a](../tests/test_regressions.py)", "[a](source/tests/test_regressions.py.md)"),
        ("index.md", "[a](docs/results.md#x) [b](https://a.org/b.md)", "[a](results.md#x) [b](https://a.org/b.md)"),
        ("tests.md", "[a](../docs/method.md)", "[a](method.md)"),
        ("results.md", "[a](results/benchmark) ![b](figures/c.svg)", "[a](archives.md#benchmark) ![b](figures/c.svg)"),
        ("results/digits-small/report.md", "![a](rates.svg)", "![a](rates.svg)"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(hooks: ModuleType, page: str, text: str, moved: str) -> None:
    shown = SimpleNamespace(file=SimpleNamespace(src_uri=page), parent=None, meta={})
    assert hooks.on_page_markdown(text, shown, None, None) == moved


def test_a_page_that_loads_something_from_the_network_is_an_error(hooks: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    link = '<a href="https://a.org">a</a><script src="assets/a.js"></script>'
    assert hooks.on_post_page(link, page, None) == link
    for tag in ('<script async src="https://a.org/a.js">', '<link rel="stylesheet" href="https://a.org/a.css">'):
        with pytest.raises(PluginError, match="loads https"):
            hooks.on_post_page(tag, page, None)


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    pytest.importorskip("latex2mathml")
    html = hooks.mathml(r"m = \frac{a}{b}", "math", "math", {}, None)
    assert (
        html.startswith('<div class="math"><math ')
        and "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>" in html
    )


def spoken(function: Any) -> str:
    """The texts in a function's source."""
    nodes = ast.walk(ast.parse(inspect.getsource(function)))
    return "\n".join(str(node.value) for node in nodes if isinstance(node, ast.Constant))


def test_the_troubleshooting_table_has_the_doctors_sentences() -> None:
    rows = re.findall(
        r"^\| [^|`]+ \| ([^|`]+) \| ([^|]+) \| `([\w-]+)` \|$",
        (DOCS / "choose.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert [finding for _, _, finding in rows] == list(AILMENTS)
    for sentence, arguments, finding in rows:
        said = spoken(AILMENTS[finding])
        assert all(part.strip() in said for part in re.split(r"\bN\b", sentence)), sentence
        assert all(name in said for name in re.findall(r"`(\w+)`", arguments)), arguments


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
@pytest.mark.skipif(not SITE.exists(), reason="needs the site: make docs")
def test_the_site_works_from_a_folder_and_on_a_phone(tmp_path: Path) -> None:
    def shown(address: str) -> str:
        command = [*BROWSER, f"--user-data-dir={tmp_path / 'profile'}", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    found = re.search(r">(\d+) matching documents<", shown(f"{(SITE / 'index.html').as_uri()}?q=damping"))
    assert found is not None and int(found[1]) > 5
    # A window has at least 500 pixels, a frame may have the 390 of a phone.
    base = f'<head><base href="{SITE.as_uri()}/">'
    measure = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    probe = f"<script>onload = () => parent.postMessage({measure}, '*')</script>"
    frame = "<script>onmessage = (event) => { document.title = event.data }</script>"
    (tmp_path / "phone.html").write_text(f'<title>?</title>{frame}<iframe width="390" height="900" src="page.html">')
    for name in ("index", "reference", "results", "api", "cli"):
        page = (SITE / f"{name}.html").read_text(encoding="utf-8")
        (tmp_path / "page.html").write_text(page.replace("<head>", base).replace("</body>", f"{probe}</body>"))
        title = re.search("<title>(.*?)</title>", shown((tmp_path / "phone.html").as_uri()))
        assert title is not None and title[1] == "0", f"{name} is {title and title[1]} pixels wider than a phone"
