"""The documentation runs: every python block of a page, in order, in one namespace."""

import contextlib
import functools
import importlib.util
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import factordisc

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
# Kinds that nobody executes. "py", "Python" and the like are none of them, so no example escapes.
# A text block is what the python block above it prints, or for reading.
NOT_RUN = {"text", "bash", "console"}


class Block(NamedTuple):
    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    return [
        Block(match["kind"].strip(), match["text"], page.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(page)
    ]


def run(name: str, page: str) -> int:
    """Runs the python blocks of a page and returns how many there were."""
    namespace: dict[str, object] = {"__name__": name}
    found = blocks(page)
    executed = 0
    for i, block in enumerate(found):
        if block.kind != "python":
            continue
        # The empty lines make a traceback point at the line of the page.
        code = compile("\n" * block.line + block.text, name, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        executed += 1
        following = found[i + 1] if i + 1 < len(found) else Block("", "", 0)
        expected = following.text if following.kind == "text" else ""
        if printed.getvalue() or expected:
            where = f"{name}, line {block.line}: the text block below is what it prints"
            assert printed.getvalue() == expected, where
    return executed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_block_runs_and_prints_what_the_page_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same graphs and gradients as the default backend, without the C++ compiler it needs.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["README.md", "theory.md", "guide.md", "faq.md"])
def test_the_pages_that_teach_have_blocks_to_run(name: str) -> None:
    page = next(path for path in PAGES if path.name == name).read_text(encoding="utf-8")
    assert sum(block.kind == "python" for block in blocks(page)) >= 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_run_or_of_a_kind_that_is_not(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    kinds = {block.kind for block in blocks(page) if not block.kind.startswith("{")}
    assert kinds <= {"python", *NOT_RUN}
    # An unclosed, indented or ~~~ fence would hide a block from the pattern.
    fences = len(re.findall(r"^\s*(?:```|~~~)", page, re.MULTILINE))
    assert fences == 2 * len(blocks(page))


def load_forms() -> dict[str, factordisc.Factorisation]:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/forms/pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FORMS


def test_every_form_has_a_page_with_its_equation_picture_data_example_and_limits() -> None:
    forms = load_forms()
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/forms").glob("*.md")}
    index = pages.pop("index")
    assert set(pages) == set(forms)
    for name, page in pages.items():
        assert f"$$\n{forms[name].to_latex()}\n$$" in page, name
        assert f"(../images/forms/{name}.png)" in page
        headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
        assert headings == ["Data it needs", "Example", "When not to use it"], name
        assert "```python" in page
        assert f"({name}.md)" in index


def test_the_runner_reports_a_broken_block() -> None:
    page = "```python\nx = 1\n```\n\n```python\nx.nothing\n```\n"
    with pytest.raises(AttributeError, match="nothing"):
        run("page.md", page)


def test_the_runner_reports_another_output() -> None:
    page = "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    with pytest.raises(AssertionError, match=r"page.md, line 1: the text block below"):
        run("page.md", page)


def test_the_runner_keeps_one_namespace_per_page() -> None:
    assert run("page.md", "```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n") == 2


def test_every_public_name_stands_in_the_api() -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto(?:class|function):: factordisc\.(\w+)$", api, re.MULTILINE))
    assert documented | {"diagnostics"} == set(factordisc.__all__)
    assert ".. automodule:: factordisc.diagnostics\n" in api


def test_the_design_lists_every_module_below_those_that_it_imports() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed: dict[str, str] = {}
    wing = ""
    for heading, module in re.findall(r"^(?:(\w[\w ]+):|- `(\w+)`: .*)$", design, re.MULTILINE):
        wing = heading or wing
        if module:
            listed[module] = wing
    files = {path.stem: path for path in (ROOT / "factordisc").glob("[!_]*.py")}
    assert set(listed) == set(files)
    order = list(listed)
    for module, path in files.items():
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^from factordisc\.(\w+) import", text, re.MULTILINE)
        for several in re.findall(r"^from factordisc import (.+)$", text, re.MULTILINE):
            imported += several.split(", ")
        for other in imported:
            assert order.index(other) < order.index(module), f"{module} imports {other}"
            wings = {listed[other], listed[module]}
            assert wings != {"Tensors", "Algebra"}, f"{module} imports {other}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_of_the_repository_exist(path: Path) -> None:
    page = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
