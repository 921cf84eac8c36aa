"""The results file: runs (machine, versions, marks) and one entry per case that names its run.

A file is added to, case by case: measuring some cases again replaces theirs and leaves the others with the run that
made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ztok_fast.codec.atomic import replace_atomically

SCHEMA = 2
STATUSES = ("ok", "wrong", "failed", "missing", "skipped")
"""Of an implementation: measured; its answer is wrong; it raised; its package is not installed; it does not apply
(another dtype, no backward, too much memory). All but `ok` carry a reason and no time."""
CASE_FIELDS = set("key op shape dtype direction device set cold input_sets run work marks implementations".split())
IMPLEMENTATION_FIELDS = {"name", "kind", "status", "reason", "checked"}
TIME_FIELDS = {"seconds", "gflops", "gbs", "roofline"}


class ResultsError(ValueError):
    """A results file that is not one."""


def empty() -> dict:
    return {"schema": SCHEMA, "runs": {}, "cases": []}


def load(path: str | Path) -> dict:
    """Read and validate a results file.

    Raises:
        ResultsError: not JSON, another schema, or an entry that `validate` refuses.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    validate(results)
    return results


def load_all(paths: Iterable[str | Path]) -> dict:
    """Results files as one.

    Raises:
        ResultsError: as `load`, or two files have the same case.
    """
    joined = empty()
    for own in map(load, sorted(paths)):
        joined["runs"] |= own["runs"]
        joined["cases"] += own["cases"]
    validate(joined)
    return joined


def validate(results: dict) -> None:
    """Raise `ResultsError` unless the results have this module's schema."""
    schema = results.get("schema") if isinstance(results, dict) else results
    if schema != SCHEMA:
        raise ResultsError(f"results: expected schema {SCHEMA}, got {schema!r}")
    keys = set()
    for case in results["cases"]:
        name = case.get("key", "?")
        if missing := CASE_FIELDS - case.keys():
            raise ResultsError(f"{name}: lacks {', '.join(sorted(missing))}")
        if case["run"] not in results["runs"]:
            raise ResultsError(f"{name}: names run {case['run']!r}, which is not in the file")
        if name in keys:
            raise ResultsError(f"{name}: stands twice in the file")
        keys.add(name)
        for own in case["implementations"]:
            _validate_implementation(f"{name}, {own.get('name', '?')}", own)


def _validate_implementation(name: str, own: dict) -> None:
    ok = own.get("status") == "ok"
    if missing := (IMPLEMENTATION_FIELDS | (TIME_FIELDS if ok else set())) - own.keys():
        raise ResultsError(f"{name}: lacks {', '.join(sorted(missing))}")
    if not ok and (own["status"] not in STATUSES or TIME_FIELDS & own.keys() or not own["reason"]):
        raise ResultsError(f"{name}: status {own['status']!r} needs a reason and no time")


def put(results: dict, run: str, environment: dict, case: dict) -> None:
    """Add a case, or replace the one of its key; runs that no case names any more go."""
    results["runs"][run] = environment
    cases = {own["key"]: own for own in results["cases"]} | {case["key"]: case}
    results["cases"] = list(cases.values())
    used = {entry["run"] for entry in results["cases"]}
    results["runs"] = {name: facts for name, facts in results["runs"].items() if name in used}


def save(results: dict, path: str | Path) -> None:
    """Write the file whole, with the folders that are missing: an interrupted write leaves the old one."""
    with replace_atomically(Path(path)) as scratch:
        scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(case: dict, name: str) -> dict | None:
    """The entry of a name in a case, None when it has no time."""
    return next((own for own in case["implementations"] if own["name"] == name and own["status"] == "ok"), None)


def default_backend(case: dict) -> dict | None:
    """The backend that the op chooses by itself for this case, when it was measured."""
    own = (own for own in case["implementations"] if own["kind"] == "backend" and own.get("default"))
    return next((entry for entry in own if entry["status"] == "ok"), None)


def seconds(entry: dict) -> float:
    """The time that is compared: the median, of graph replays on a GPU where there are any."""
    return (entry.get("graph_seconds") or entry["seconds"])["median"]


def best_baseline(case: dict) -> dict | None:
    """The fastest measured baseline of a case; marks and backends are none."""
    found = [own for own in case["implementations"] if own["kind"] == "baseline" and own["status"] == "ok"]
    return min(found, key=seconds, default=None)
