"""Hooks of mkdocs: pages made from the code at build time, and links that work in the site as they do on a Git host."""

from __future__ import annotations

import ast
import io
import json
import posixpath
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ORIGINS = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "tests.md": "tests/README.md"}
"""Pages of the site that are files outside of docs/."""
PLACES = {
    **{origin: page for page, origin in ORIGINS.items()},
    "examples": "examples.md",
    "docs/results": "archives.md",
    "docs/figures": "archives.md#figures",
    "hf_adafisher/experiments/presets/paper": "configuration.md#presets",
}
"""Where links to files and folders that are no page of their own lead."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
TEST_LINK = re.compile(r'(?<=href=")((?:\.\./)*source/(tests/[^"]+\.py)\.html)(?="><code>(test_\w+)</code>)')
REMOTE = re.compile(r'<(?:script|img|iframe|link[^>]*stylesheet)\b[^>]*(?:src|href)="(https?:[^"]*)"')
API = {
    "Optimizers": ("AdaFisherW", "AdaFisher", "SpectralAdaFisher"),
    "Trainer": ("AdaFisherMixin", "AdaFisherTrainer", "AdaFisherTrainingArguments"),
    "Callbacks": ("AdaFisherCallback", "CurvatureCallback", "DoctorCallback"),
    "Optimizers by name": ("create_optimizer", "OptimizerFactory", "available_optimizers", "optimizer_state_bytes"),
    "Layers of your own": ("register_layer", "LayerRule"),
}
"""The public names by theme; a test holds that these are all."""
SHARED = """::: hf_adafisher.optimizers.base.kronecker_diagonal.KroneckerDiagonalOptimizer
    options:
      inherited_members: true
      show_root_heading: false
      show_root_toc_entry: false
      filters: ["!^_", "!^(damping_of|decoupled|divides_by_root|momentum_key|options_class|root_steps|state_shapes)$"]
"""
"""Methods of AdaFisher, AdaFisherW and SpectralAdaFisher, without those that their classes define for each other."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let blocks of ``math`` be formulas, as on Git hosts."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": mathml}]
    }
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of ``ORIGINS`` and ``GENERATED``, and one for every linked file outside of docs/."""
    pages = {uri: (ROOT / origin).read_text(encoding="utf-8") for uri, origin in ORIGINS.items()}
    pages |= {uri: make() for uri, make in GENERATED.items()}
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for uri, text in (texts | pages).items():
        for path in linked_paths(uri, text):
            if site_uri(path).startswith("source/"):
                pages[site_uri(path)] = source_page(path)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    schema = json.dumps(configuration_schema(), indent=2)
    files.append(File.generated(config, "assets/configuration.schema.json", content=schema))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages in the site, and name reports by their comparison."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        place, _, anchor = site_uri(posixpath.normpath(posixpath.join(folder_of(here), match[1]))).partition("#")
        anchor = match[2] or (f"#{anchor}" if anchor else "")
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + anchor

    if page.parent is None:  # nothing to navigate to: the page takes the room
        page.meta.setdefault("hide", ["navigation"])
    if here.endswith("/report.md"):
        markdown = markdown.replace("# Comparison of optimizers", f"# {here.split('/')[-2]}", 1)
    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to tests to their lines."""

    def at_line(match: re.Match[str]) -> str:
        lines = (ROOT / match[2]).read_text(encoding="utf-8").splitlines()
        number = next(i for i, line in enumerate(lines, 1) if line.lstrip().startswith(f"def {match[3]}("))
        return f"{match[1]}#__codelineno-0-{number}"

    if page.file.src_uri == "api.md":  # blocks of code in docstrings
        html = html.replace("::</p>", ":</p>")
        html = re.sub(r"<pre>.*?</pre>", lambda match: match[0].replace("``", ""), html, flags=re.DOTALL)
    return TEST_LINK.sub(at_line, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Check that a page needs nothing from the network."""
    if remote := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} loads {remote[1]}: the site must open without a network")
    return output


def folder_of(uri: str) -> str:
    """Return the folder in the repository that relative links of a page start from."""
    return posixpath.dirname(ORIGINS.get(uri, f"docs/{uri}"))


def linked_paths(uri: str, text: str) -> set[str]:
    """Return the paths in the repository that a page links to."""
    return {posixpath.normpath(posixpath.join(folder_of(uri), match[1])) for match in LINK.finditer(text)}


def site_uri(path: str) -> str:
    """Return the page or file of the site, from its root, that shows a file or folder of the repository."""
    if path in PLACES:
        return PLACES[path]
    if path.startswith("examples/"):
        return f"examples.md#{Path(path).stem}"
    if path.startswith("docs/results/") and (ROOT / path).is_dir():
        return f"archives.md#{posixpath.basename(path)}"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def source_page(path: str) -> str:
    """Show a file of the repository; the search leaves it out."""
    text = (ROOT / path).read_text(encoding="utf-8")
    head = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path}\n\n"
    return f"{head}{fenced(text, 'python' if path.endswith('.py') else 'text')}"


def examples_page() -> str:
    """Show every program of examples/, each under its docstring."""
    text = [
        "# Examples",
        "Short programs to start from. `--smoke` runs each for two steps on a CPU, without a network.",
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(source)) or ""
        text += [
            f"## {path.stem}",
            about,
            fenced(source.split('"""', 2)[2].lstrip(), "python", f"examples/{path.name}"),
        ]
    return "\n\n".join(text)


def archives_page() -> str:
    """List the archives of the comparisons, and the numbers behind the pictures."""
    text = [
        "# Archives",
        "One folder a comparison: every run as a line of `runs.jsonl.gz`, a table of all runs, and the report made of "
        "them by `hf-adafisher report docs/results/NAME`.",
    ]
    docs = ROOT / "docs"
    for folder in [*sorted(p for p in (docs / "results").iterdir() if p.is_dir()), docs / "figures"]:
        text.append(f"## {folder.name}")
        report = folder / "report.md"
        if report.exists():
            text.append(report.read_text(encoding="utf-8").split("\n\n")[1])
        names = sorted(path.relative_to(docs).as_posix() for path in folder.iterdir() if path.is_file())
        text.append(
            " · ".join(f"[{posixpath.basename(name).replace('report.md', 'report')}]({name})" for name in names)
        )
    return "\n\n".join(text)


def api_page() -> str:
    """Ask mkdocstrings for every public name."""
    text = ["# Python", "Everything below is imported from `hf_adafisher`."]
    for theme, names in API.items():
        text += [f"## {theme}", *(f"::: hf_adafisher.{name}" for name in names)]
        if theme == "Optimizers":
            text += ["## Methods of these optimizers", SHARED]
        if theme == "Trainer":  # fields that are made of the optimizers' options are not seen in the source
            text[-1] += "\n    options: {docstring_options: {warn_missing_types: false, warn_unknown_params: false}}"
    return "\n\n".join(text)


def cli_page() -> str:
    """Show the help of every command."""
    from hf_adafisher.cli.main import COMMANDS, FIGURES

    text = ["# Command line", fenced(help_of(), "text")]
    for name, (_, line) in COMMANDS.items():
        text += [f"## hf-adafisher {name}", f"{line[0].upper()}{line[1:]}.", fenced(help_of(name), "text")]
        if name == "figures":
            for figure in FIGURES:
                text += [f"### hf-adafisher figures {figure}", fenced(help_of(name, figure), "text")]
    return "\n\n".join(text)


def help_of(*words: str) -> str:
    """Return the help of a command."""
    from hf_adafisher.cli.main import main

    shown = io.StringIO()
    with (
        mock.patch.dict("os.environ", {"COLUMNS": "92"}),
        mock.patch.object(sys, "argv", ["hf-adafisher"]),
        redirect_stdout(shown),
        suppress(SystemExit),
    ):
        main([*words, "--help"])
    return shown.getvalue()


def configuration_page() -> str:
    """Describe the files that ``hf-adafisher compare`` reads, and list the presets."""
    from hf_adafisher.experiments.comparison.configuration import PRESETS, available_presets, load_configuration

    schema = configuration_schema()
    rows = [f"| `{key}` | {value['description']} |" for key, value in schema["properties"].items()]
    text = [
        "# Configuration files",
        "`hf-adafisher compare FILE` reads a comparison from a JSON file. An unknown key or a value of another kind is "
        "an error that names its place; `--dry_run` checks a file and lists its cells.",
        "\n".join(["| key | meaning |", "|---|---|", *rows]),
        "A [JSON schema](assets/configuration.schema.json), made from these checks, serves editors: "
        "`hf-adafisher list --schema > configuration.schema.json`. `hf-adafisher clm FILE` and "
        "`hf-adafisher image FILE` read JSON or YAML with the names of their [arguments](cli.md) as keys.",
        "## Presets",
        "A preset is such a file with a name: `hf-adafisher compare NAME`.",
    ]
    for name in available_presets():
        config = load_configuration(Path(name))
        optimizers = dict.fromkeys(one for entry in config["cells"] for one in as_list(entry["optim"]))
        text += [
            f"### {name}",
            config.get("description", ""),
            f"Optimizers: {', '.join(f'`{o}`' for o in optimizers)}.",
        ]
        content = (PRESETS / f"{name}.json").read_text(encoding="utf-8")
        text.append('??? note "File"\n\n' + "\n".join(f"    {line}" for line in fenced(content, "json").splitlines()))
    return "\n\n".join(text)


def configuration_schema() -> dict[str, Any]:
    """Return the JSON schema of configurations."""
    from hf_adafisher.experiments.comparison import configuration

    return configuration.configuration_schema()


def as_list(value: Any) -> list[Any]:
    """Return a list of one value, or the list that it is."""
    return value if isinstance(value, list) else [value]


def fenced(text: str, language: str, title: str = "") -> str:
    """Return a block of code."""
    heading = f' title="{title}"' if title else ""
    return f"``````{language}{heading}\n{text.rstrip()}\n``````"


GENERATED = {
    "examples.md": examples_page,
    "archives.md": archives_page,
    "api.md": api_page,
    "cli.md": cli_page,
    "configuration.md": configuration_page,
}
"""Pages made at build time: their paths in the site, and what makes their Markdown."""


def mathml(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """Turn a block of LaTeX into MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    return f'<div class="{css_class}">{convert(source.strip(), display="block")}</div>'
