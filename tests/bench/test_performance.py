"""Targets and docs/performance.md from a small fixed results file, and what is no results file."""

import copy

import pytest

from bench import performance, results, targets


def entry(name, kind, milliseconds, **more):
    took = dict.fromkeys(("min", "p25", "median", "p75"), milliseconds * 1e-3) | {"rounds": 9, "calls_per_sample": 1}
    base = {"name": name, "kind": kind, "status": "ok", "reason": None, "checked": True, "seconds": took}
    return base | {"gflops": 10.0, "gbs": 2.0, "roofline": 0.5} | more


def without_speed(name, kind, status, reason, **more):
    return {"name": name, "kind": kind, "status": status, "reason": reason, "checked": False} | more


def nearest(M, d, ours, faiss, mm):
    return {
        "key": f"codebook_assign[M={M},V=1024,d={d}]/float32/forward", "op": "codebook_assign",
        "shape": {"M": M, "V": 1024, "d": d}, "dtype": "float32", "direction": "forward", "device": "cpu",
        "set": "default", "cold": False, "input_sets": 1, "run": "r1",
        "marks": {"mm_gflops": {"float32": 90.0}, "copy_gbs": 19.0},
        "disturbance": {"others": 0.01, "steal": 0.002},
        "work": {"flops": 2e6, "bytes": 1e5, "floor_seconds": 1e-5},
        "implementations": [
            entry("cpp", "backend", ours, default=True, **{"with": {}}),
            entry("reference", "backend", 50.0, default=False, **{"with": {}}),
            entry("faiss", "baseline", faiss),
            entry("mm", "mark", mm),
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
    cases = [nearest(4096, 64, 2.0, 4.0, 1.0), nearest(256, 64, 1.0, 0.5, 1.5), nearest(256, 576, 1.0, 3.0, 1.0)]
    return {"schema": 2, "runs": {"r1": facts}, "cases": cases}


def verdict(text, found, device="cpu"):
    (target,) = (t for t in targets.TARGETS if t.device == device and t.text == text)
    own = targets.judge(target, found["cases"])
    return own.measured(), own.said()


def test_a_target_is_met_on_every_shape_or_says_where_not(found):
    missed = "**met on 1 of 2**: 67 % short at codebook_assign[M=256,V=1024,d=64]/float32/forward"
    measured = "median 1.25× (0.50× to 2.00×, 2 shapes)"
    assert verdict("≥ 1.5× faiss IndexFlatL2, d = 64", found) == (measured, missed)
    assert verdict("≥ 1.2× faiss IndexFlatL2, d = 576", found) == ("3.00× (one shape)", "met")
    assert verdict("≥ 1.0× flash-kmeans, d = 128", found, "cuda") == ("not measured", "–")
    # The backend that would be chosen has no time: nothing is said, not that another one meets the target.
    found["cases"][2]["implementations"][0] = without_speed("cpp", "backend", "wrong", "Mismatch", default=True)
    assert verdict("≥ 1.2× faiss IndexFlatL2, d = 576", found)[0] == "not measured"


def test_several_adapters_are_compared_with_one_and_bandwidth_counts_the_bytes_of_each():
    def lora(n, ours):
        shape = {"M": 512, "in": 8, "out": 8, "r": 2, "n": n}
        return nearest(512, 64, ours, 1.0, 1.0) | {"op": "lora_linear", "key": f"lora{n}", "shape": shape}

    cases = [lora(1, 1.0), lora(3, 1.25)]
    assert targets.mixed_against_one(cases[1], cases) == pytest.approx(0.8)
    assert targets.mixed_against_one(cases[0], cases) is None
    ours, clone = entry("cpp", "backend", 2.0, default=True, gbs=6.0), entry("clone", "mark", 1.0, gbs=8.0)
    case = {"op": "ragged_unpack", "direction": "forward", "implementations": [ours, clone]}
    measure = targets.bandwidth_of("ragged_unpack", "clone")
    assert measure(case, [case]) == pytest.approx(0.75)
    for other in ({"direction": "forward+backward"}, {"op": "ragged_pack"}, {"implementations": [ours]}):
        assert measure(case | other, [case]) is None


def test_the_document(found):
    text = performance.document({"cpu": found})
    assert "| nearest code" in text and "median 1.25× (0.50× to 2.00×, 2 shapes)" in text
    assert "in 1 of them a baseline is faster than ours" in text
    losing = next(line for line in text.splitlines() if line.startswith("|  256 | 1024 |  64"))
    assert "**1**" in losing and "0.50× **slower**" in losing and "†" not in losing
    winning = next(line for line in text.splitlines() if line.startswith("| 4096 | 1024 |  64"))
    assert "2.00×" in winning and "slower" not in winning
    assert "had 1.2 % of the processors (median; 1.2 % at most)" in text
    assert "cdist+argmin: wrong: Mismatch: codes" in text
    assert "Not measured: vector-quantize-pytorch (it is not installed)." in text
    assert "`python -m bench --json x.json`; commit 0123456789ab" in text and "GOMP_SPINCOUNT=0" in text
    assert "ZTOK_BACKEND" not in text
    assert text.split("## Measured on the GPU")[1].strip() == "Not measured."


def test_what_ours_is_compared_with(found):
    """A mark or a variant of our own is no baseline that wins; a GPU case is compared by its graph replays."""
    case = found["cases"][0]
    case["implementations"] += [entry("separate ops", "variant", 0.1), entry("mm in blocks", "mark", 0.1)]
    assert results.best_baseline(case)["name"] == "faiss"
    case = copy.deepcopy(case) | {"device": "cuda"}
    case["implementations"][0]["graph_seconds"] = {**case["implementations"][0]["seconds"], "median": 0.5e-3}
    ours = results.default_backend(case)
    assert results.seconds(ours) == 0.5e-3
    case["implementations"][0]["graph_seconds"] = None
    assert results.seconds(ours) == 2e-3


def test_the_document_of_files_is_checked(found, tmp_path, capsys):
    results.save(found, tmp_path / "deep" / "r.json")
    assert results.load(tmp_path / "deep" / "r.json") == found
    none = str(tmp_path / "none.json")
    options = ["--cpu", str(tmp_path / "deep" / "r.json"), "--cuda", none, "--out", str(tmp_path / "p.md")]
    assert performance.main([*options, "--check"]) == 1
    assert performance.main(options) == 0
    assert performance.main([*options, "--check"]) == 0
    (tmp_path / "p.md").write_text("edited by hand")
    assert performance.main([*options, "--check"]) == 1
    assert "is not that of the results" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert performance.main(["--cpu", str(tmp_path / "bad.json")]) == 1
    assert "not JSON" in capsys.readouterr().err


def test_the_document_in_the_repository_is_that_of_its_results():
    assert performance.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=0), "expected schema 2"),
        (lambda r: r["runs"].clear(), "names run 'r1'"),
        (lambda r: r["cases"].append(r["cases"][0]), "stands twice"),
        (lambda r: r["cases"][0].pop("work"), "lacks work"),
        (lambda r: r["cases"][0]["implementations"][0].update(status="fine"), "expected a status of"),
        (lambda r: r["cases"][0]["implementations"][0].pop("seconds"), "lacks seconds"),
        (
            lambda r: r["cases"][0]["implementations"][0].update(status="wrong", reason="x"),
            "needs a reason and no time",
        ),
        (lambda r: r["cases"][0]["implementations"][5].update(reason=None), "needs a reason and no time"),
    ],
)
def test_a_broken_file_is_refused(found, change, message):
    change(found)
    with pytest.raises(results.ResultsError, match=message):
        results.validate(found)
