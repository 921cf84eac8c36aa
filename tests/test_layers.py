"""Imports point one way: no cycle, nothing below imports what is above, and every module can be imported alone."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ztok_fast"
LAYERS = (
    {"ops", "native", "sources", "files", "profiling"},
    {"patching", "peft_lora"},
    {"engine"},
    {"codec"},
    {"evaluation"},
    {"train"},
    {"cli", "doctor", "demo"},
)
"""From the bottom: the first part of a module's name under the package."""


def all_modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = all_modules()


def imported(name: str, in_functions: bool = True) -> set[str]:
    """What a module imports, in its functions too or at its top alone; not what only types need."""
    path, found = MODULES[name], set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef) and not in_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.update(
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def layer(name: str) -> int:
    head = name.split(".")[1]
    (found,) = (rank for rank, names in enumerate(LAYERS) if head in names)
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") and name.split(".")[1] != "__main__"])
def test_nothing_imports_what_is_above(name):
    own = {other for other in IMPORTS[name] if other.startswith("ztok_fast.")}
    above = sorted(other for other in own if layer(other) > layer(name))
    assert not above, f"{name} imports {above}"
    foreign = [other for other in IMPORTS[name] if other.split(".")[0] in ("bench", "tests")]
    assert not foreign, f"{name} imports {foreign}, which is no part of the package"


def test_no_module_imports_itself_by_way_of_others():
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        # Ops find their backends when they are first called.
        own = imported(name, in_functions=False) if name.startswith("ztok_fast.ops.") else IMPORTS[name]
        for other in sorted(own & MODULES.keys()):
            walk(other, [*path, name])
        finished.add(name)

    for name in MODULES:
        walk(name, [])


IMPORT_EACH = """
import importlib.util, json, os, sys, traceback
import torch, transformers, peft, accelerate, safetensors, huggingface_hub  # not of the package, and slow to import
if importlib.util.find_spec("triton"):
    import triton.language
failed = {}
for name in json.loads(sys.argv[1]):
    assert not any(loaded.partition(".")[0] == "ztok_fast" for loaded in sys.modules)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            os.write(write, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        message = pipe.read().decode()
    if os.waitpid(child, 0)[1] or message:
        failed[name] = message
print(json.dumps(failed))
"""


def test_every_module_can_be_imported_alone():
    """Each in a process of its own, into which nothing of the package was imported before."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    if not importlib.util.find_spec("triton"):
        names = [name for name in names if not name.rpartition(".")[2].startswith("triton")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, json.dumps(names)],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {}
