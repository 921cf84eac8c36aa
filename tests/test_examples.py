"""The examples run, and the notebook is stored without outputs."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str):
    """The namespace of an example's module; its main() is called by the tests."""
    return runpy.run_path(str(EXAMPLES / name))


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == {
        "README.md",
        "compress_corpus.py",
        "engine_generate.py",
        "ops_backend.py",
        "patch_peft_model.py",
        "ray_coded.py",
        "tour.ipynb",
    }


@pytest.mark.parametrize("backend", [[], ["--backend", "reference"]], ids=["best", "reference"])
def test_ops_backend(backend):
    # aot_eager compiles the same graph without a C++ compiler
    before, after = run("ops_backend.py")["main"](["--compiler", "aot_eager", "--steps", "20", *backend])
    assert after < before


def test_patch_peft_model():
    before, after = run("patch_peft_model.py")["main"]()
    assert after < before


def test_engine_generate(capsys):
    texts = run("engine_generate.py")["main"]()
    assert len(texts) == 6 and all(texts)
    assert "bit for bit" in capsys.readouterr().out


def test_ray_coded_without_ray(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main = run("ray_coded.py")["main"]
    main([])
    assert "60 texts came back" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected the package ray"):
        main(["docs.parquet"])


def test_compress_corpus(tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text(f"A small text, {path.name}.", encoding="utf-8")
    main = run("compress_corpus.py")["main"]
    assert main([*map(str, texts), "--out", str(tmp_path / "out.ztok")]) == [path.read_text() for path in texts]
    assert (tmp_path / "out.ztok").is_file()
    assert len(main([])) == 4
    assert "all came back" in capsys.readouterr().out


def test_notebook(capsys):
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"cell {number}: strip the outputs"
        source = "".join(cell["source"])
        exec(compile(source, f"tour.ipynb, code cell {number}", "exec"), namespace)
    assert "Z-tokens" in capsys.readouterr().out
