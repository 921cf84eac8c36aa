"""docs/performance.md from a small fixed results file."""

import pytest

from bench import performance, results


def entry(name, kind, milliseconds, **more):
    took = {"min": 0.9e-3 * milliseconds, "median": 1e-3 * milliseconds, "rounds": 9, "calls_per_sample": 1}
    base = {"name": name, "kind": kind, "status": "ok", "reason": None, "checked": True, "seconds": took}
    return base | {"gflops": 10.0, "gbs": 2.0, "roofline": 0.5} | more


def without_speed(name, kind, status, reason):
    return {"name": name, "kind": kind, "status": status, "reason": reason, "checked": False}


def nearest(M, ours, faiss):
    return {
        "key": f"codebook_assign[M={M},V=1024,d=64]/float32/forward", "op": "codebook_assign",
        "shape": {"M": M, "V": 1024, "d": 64}, "dtype": "float32", "direction": "forward", "device": "cpu",
        "set": "default", "cold": False, "input_sets": 1, "run": "r1",
        "marks": {"mm_gflops": {"float32": 90.0}, "copy_gbs": 19.0},
        "work": {"flops": 2e6, "bytes": 1e5, "floor_seconds": 1e-5},
        "implementations": [
            entry("cpp", "backend", ours, default=True, **{"with": {}}),
            entry("reference", "backend", 50.0, default=False, **{"with": {}}),
            entry("faiss", "baseline", faiss),
            entry("mm", "mark", 0.1),
            without_speed("cdist+argmin", "baseline", "wrong", "Mismatch: codes"),
            without_speed("vector-quantize-pytorch", "baseline", "missing", "it is not installed"),
        ],
    }  # fmt: skip


@pytest.fixture
def found():
    facts = {
        "command": "python -m bench --json x.json", "commit": "0123456789ab", "date": "2026-01-02T03:04:05+00:00",
        "python": "3.11.1", "packages": {"torch": "2.13.0", "transformers": None, "peft": None},
        "cpu": {"model": "Some CPU", "cores": 2, "threads": 2}, "cuda": {"devices": []},
        "variables": {"GOMP_SPINCOUNT": "0", "ZTOK_BACKEND": None},
        "marks": {"mm_gflops": {"float32": 100.0}, "mm_size": 2048, "copy_gbs": 20.0, "copy_bytes": 1},
    }  # fmt: skip
    return {"schema": results.SCHEMA, "runs": {"r1": facts}, "cases": [nearest(4096, 2.0, 4.0), nearest(256, 1.0, 0.5)]}


def test_the_document(found):
    text = performance.document({"cpu": found, "cuda": results.empty()})
    losing = next(line for line in text.splitlines() if line.startswith("|  256 | 1024 |  64"))
    assert "**1**" in losing and "0.50× **slower**" in losing  # a mark is no baseline
    winning = next(line for line in text.splitlines() if line.startswith("| 4096 | 1024 |  64"))
    assert "2.00×" in winning and "slower" not in winning
    assert "float32/forward: cdist+argmin: wrong: Mismatch: codes" in text
    assert "not measured: vector-quantize-pytorch (it is not installed)" in text
    assert "`python -m bench --json x.json`; commit 0123456789ab" in text and "GOMP_SPINCOUNT=0" in text
    assert text.split("## Measured on the GPU")[1].strip() == "Not measured."


def test_a_gpu_case_is_compared_by_its_graph_replays(found):
    ours = results.default_backend(found["cases"][0])
    assert results.seconds(ours) == 2e-3
    assert results.seconds({**ours, "graph_seconds": {"median": 0.5e-3}}) == 0.5e-3


def test_a_document_edited_by_hand_is_seen(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    monkeypatch.setattr(performance, "DOCUMENT", tmp_path / "p.md")
    results.save(found, tmp_path / "bench-cpu.json")
    assert performance.main([]) == performance.main(["--check"]) == 0
    (tmp_path / "p.md").write_text("edited by hand")
    assert performance.main(["--check"]) == 1
    assert "is not that of the results" in capsys.readouterr().err


def test_the_document_in_the_repository_is_that_of_its_results():
    assert performance.main(["--check"]) == 0
