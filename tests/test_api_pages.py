"""Every public name is on a page of the API reference, and what the pages name exists."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import ztok_fast
from ztok_fast import engine, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs/api").glob("*.md"))
DIRECTIVES = [name for page in PAGES for name in re.findall(r"(?m)^::: ([\w.]+)$", page.read_text())]


def find(path: str):
    """The module, or the object in a module, of a dotted name."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def documented() -> set[int]:
    """Ids of the objects on the pages; a module stands for its public names."""
    found = set()
    for directive in DIRECTIVES:
        value = find(directive)
        found.add(id(value))
        if inspect.ismodule(value):
            found.update(id(getattr(value, name)) for name in getattr(value, "__all__", dir(value)))
    return found


@pytest.mark.parametrize("name", DIRECTIVES)
def test_what_a_page_names_has_a_docstring(name):
    assert inspect.getdoc(find(name))


@pytest.mark.parametrize("module", [ztok_fast, engine, ops], ids=lambda m: m.__name__)
def test_every_public_name_is_on_a_page(module):
    on_a_page = documented()
    missing = [n for n in module.__all__ if n != "__version__" and id(getattr(module, n)) not in on_a_page]
    assert not missing
    for name in set(module.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(module, name)), name


def test_ops_are_exported_from_the_modules_that_define_them():
    """The pages are made from sources: in a family `name` would be the module of that name, not the op."""
    tree = ast.parse((ROOT / "ztok_fast/ops/__init__.py").read_text())
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert modules
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
