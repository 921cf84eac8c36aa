"""Targets and docs/performance.md from a small fixed results file."""

import copy

import pytest

from bench import performance, targets
from bench.micro import results


def entry(name, kind, milliseconds, **more):
    took = {"min": milliseconds, "p25": milliseconds, "median": milliseconds, "p75": milliseconds}
    took = {key: value * 1e-3 for key, value in took.items()} | {"rounds": 9, "calls_per_sample": 1}
    base = {"name": name, "kind": kind, "status": "ok", "reason": None, "checked": True}
    return base | {"seconds": took, "gflops": 10.0, "gbs": 2.0, "roofline": 0.5} | more


def without_speed(name, kind, status, reason):
    return {"name": name, "kind": kind, "status": status, "reason": reason, "checked": False}


def nearest(M, d, ours, faiss, mm):
    shape = {"M": M, "V": 1024, "d": d}
    return {
        "key": f"codebook_assign[M={M},V=1024,d={d}]/float32/forward",
        "op": "codebook_assign",
        "shape": shape,
        "dtype": "float32",
        "direction": "forward",
        "device": "cpu",
        "set": "default",
        "cold": False,
        "input_sets": 1,
        "run": "r1",
        "marks": {"mm_gflops": {"float32": 90.0}, "copy_gbs": 19.0},
        "disturbance": {"others": 0.01, "steal": 0.002},
        "work": {"flops": 2e6, "bytes": 1e5, "floor_seconds": 1e-5},
        "contenders": [
            entry("cpp", "backend", ours, default=True, **{"with": {}}),
            entry("reference", "backend", 50.0, default=False, **{"with": {}}),
            entry("faiss", "peer", faiss),
            entry("mm", "mark", mm),
            without_speed("cdist+argmin", "peer", "wrong", "Mismatch: codes"),
            without_speed("vector-quantize-pytorch", "peer", "missing", "vector-quantize-pytorch is not installed"),
        ],
    }


@pytest.fixture
def found():
    facts = {
        "command": "python -m bench --json x.json",
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
        "python": "3.11.1",
        "packages": {"torch": "2.13.0", "transformers": None, "peft": None},
        "cpu": {"model": "Some CPU", "cores": 2, "threads": 2},
        "cuda": {"devices": []},
        "variables": {"GOMP_SPINCOUNT": "0", "ZTOK_BACKEND": None},
        "marks": {"mm_gflops": {"float32": 100.0}, "mm_size": 2048, "copy_gbs": 20.0, "copy_bytes": 1},
    }
    cases = [nearest(4096, 64, 2.0, 4.0, 1.0), nearest(256, 64, 1.0, 0.5, 1.5), nearest(256, 576, 1.0, 3.0, 1.0)]
    return {"schema": 1, "runs": {"r1": facts}, "cases": cases}


def verdict(text, found, device="cpu"):
    (target,) = (t for t in targets.TARGETS if t.device == device and t.text == text)
    return targets.judge(target, found["cases"])


def test_the_file_is_one(found):
    results.validate(found)


def test_a_target_is_met_on_every_shape_or_says_where_not(found):
    missed = verdict("≥ 1.5× faiss IndexFlatL2, d = 64", found)
    assert missed.measured() == "median 1.25× (0.50× to 2.00×, 2 shapes)"
    assert missed.said() == "**met on 1 of 2**: 67 % short at codebook_assign[M=256,V=1024,d=64]/float32/forward"
    met = verdict("≥ 1.2× faiss IndexFlatL2, d = 576", found)
    assert (met.measured(), met.said()) == ("3.00× (one shape)", "met")
    none = verdict("≥ 1.0× flash-kmeans, d = 128", found, "cuda")
    assert (none.measured(), none.said()) == ("not measured", "–")


def test_what_was_not_measured_decides_no_target(found):
    """The backend that would be chosen has no time: nothing is said, not that another one meets the target."""
    found["cases"] = [found["cases"][2]]
    found["cases"][0]["contenders"][0] = without_speed("cpp", "backend", "wrong", "Mismatch") | {
        "default": True,
        "with": {},
    }
    assert verdict("≥ 1.2× faiss IndexFlatL2, d = 576", found).measured() == "not measured"


def test_several_adapters_are_compared_with_one():
    def lora(n, ours):
        case = nearest(512, 64, ours, 1.0, 1.0)
        case |= {"op": "lora_linear", "key": f"lora{n}", "shape": {"M": 512, "in": 8, "out": 8, "r": 2, "n": n}}
        return case

    cases = [lora(1, 1.0), lora(3, 1.25)]
    assert targets.mixed_against_one(cases[1], cases) == pytest.approx(0.8)
    assert targets.mixed_against_one(cases[0], cases) is None


def test_bandwidth_counts_the_bytes_of_each():
    ours = entry("cpp", "backend", 2.0, default=True, **{"with": {}}) | {"gbs": 6.0}
    case = {
        "op": "ragged_unpack",
        "direction": "forward",
        "contenders": [ours, entry("clone", "mark", 1.0) | {"gbs": 8.0}],
    }
    measure = targets.bandwidth_of("ragged_unpack", "clone")
    assert measure(case, [case]) == pytest.approx(0.75)
    assert measure(case | {"direction": "forward+backward"}, [case]) is None
    assert measure(case | {"op": "ragged_pack"}, [case]) is None
    assert measure(case | {"contenders": [ours]}, [case]) is None


def test_the_document(found):
    text = performance.document({"cpu": found})
    assert "| nearest code" in text and "median 1.25× (0.50× to 2.00×, 2 shapes)" in text
    assert "in 1 of them a peer is faster than ours" in text
    losing = next(line for line in text.splitlines() if line.startswith("|  256 | 1024 |  64"))
    assert "**1**" in losing and "0.50× **slower**" in losing
    winning = next(line for line in text.splitlines() if line.startswith("| 4096 | 1024 |  64"))
    assert "2.00×" in winning and "slower" not in winning
    assert "†" not in losing
    assert "had 1.2 % of the processors (median; 1.2 % at most)" in text
    assert "cdist+argmin: wrong: Mismatch: codes" in text
    assert "Not measured: vector-quantize-pytorch (vector-quantize-pytorch is not installed)." in text
    assert "`python -m bench --json x.json`; commit 0123456789ab" in text and "GOMP_SPINCOUNT=0" in text
    assert "ZTOK_BACKEND" not in text
    assert text.split("## Measured on the GPU")[1].strip() == "Not measured."


def test_a_mark_or_our_own_variant_is_no_peer_that_wins(found):
    case = found["cases"][0]
    case["contenders"] += [entry("separate ops", "variant", 0.1), entry("mm in blocks", "mark", 0.1)]
    assert results.best_peer(case)["name"] == "faiss"


def test_a_gpu_case_is_compared_by_its_graph_replays(found):
    case = copy.deepcopy(found["cases"][0])
    case["device"] = "cuda"
    case["contenders"][0]["graph_seconds"] = {**case["contenders"][0]["seconds"], "median": 0.5e-3}
    assert results.seconds(case["contenders"][0]) == 0.5e-3
    case["contenders"][0]["graph_seconds"] = None
    assert results.seconds(case["contenders"][0]) == 2e-3


def test_check_notices_another_document(found, tmp_path, capsys):
    results.save(found, tmp_path / "cpu.json")
    options = [
        "--cpu",
        str(tmp_path / "cpu.json"),
        "--cuda",
        str(tmp_path / "none.json"),
        "--out",
        str(tmp_path / "p.md"),
    ]
    assert performance.main([*options, "--check"]) == 1
    assert performance.main(options) == 0
    assert performance.main([*options, "--check"]) == 0
    (tmp_path / "p.md").write_text("edited by hand")
    assert performance.main([*options, "--check"]) == 1
    assert "is not that of the results" in capsys.readouterr().err


BREAKS = {
    "another schema": (lambda r: r.update(schema=0), "expected schema 1"),
    "no run": (lambda r: r["runs"].clear(), "names run 'r1'"),
    "a case twice": (lambda r: r["cases"].append(r["cases"][0]), "stands twice"),
    "a field lost": (lambda r: r["cases"][0].pop("work"), "lacks work"),
    "an unknown status": (lambda r: r["cases"][0]["contenders"][0].update(status="fine"), "expected a status of"),
    "ok without a time": (lambda r: r["cases"][0]["contenders"][0].pop("seconds"), "lacks seconds"),
    "wrong with a time": (
        lambda r: r["cases"][0]["contenders"][0].update(status="wrong", reason="x"),
        "needs a reason and no time",
    ),
    "missing without a reason": (
        lambda r: r["cases"][0]["contenders"][5].update(reason=None),
        "needs a reason and no time",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_refused(found, name):
    found = copy.deepcopy(found)
    change, message = BREAKS[name]
    change(found)
    with pytest.raises(results.ResultsError, match=message):
        results.validate(found)


def test_a_file_is_written_whole_and_read_again(found, tmp_path):
    results.save(found, tmp_path / "deep" / "r.json")
    assert results.load(tmp_path / "deep" / "r.json") == found
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(results.ResultsError, match="not JSON"):
        results.load(tmp_path / "bad.json")
