"""The results file: runs (machine, versions, marks) and one entry per case that names its run.

A file is added to, case by case: measuring some cases again replaces theirs and leaves the others with the run that
made them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

SCHEMA = 1
STATUSES = ("ok", "wrong", "failed", "missing", "skipped")
"""Of a contender: measured; its answer is not the right one; it raised; its package is not installed; it does not apply
(another dtype, no backward, too much memory). All but `ok` carry a reason and no time."""
CASE_FIELDS = {
    "key",
    "op",
    "shape",
    "dtype",
    "direction",
    "device",
    "set",
    "cold",
    "input_sets",
    "run",
    "work",
    "marks",
    "disturbance",
    "contenders",
}
CONTENDER_FIELDS = {"name", "kind", "status", "reason", "checked"}
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


def load_all(paths: Sequence[str | Path]) -> dict | None:
    """The results files among `paths` that exist, as one; None when there is none.

    Raises:
        ResultsError: as `load`, or two files have the same case.
    """
    found = [load(path) for path in paths if Path(path).is_file()]
    if not found:
        return None
    joined = {
        "schema": SCHEMA,
        "runs": {name: facts for own in found for name, facts in own["runs"].items()},
        "cases": [case for own in found for case in own["cases"]],
    }
    validate(joined)
    return joined


def validate(results: dict) -> None:
    """Raise `ResultsError` unless the results have this module's schema."""
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ResultsError(
            f"results: expected schema {SCHEMA}, got {results.get('schema') if isinstance(results, dict) else results!r}"
        )
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
        for contender in case["contenders"]:
            _validate_contender(f"{name}, {contender.get('name', '?')}", contender)


def _validate_contender(name: str, contender: dict) -> None:
    if missing := CONTENDER_FIELDS - contender.keys():
        raise ResultsError(f"{name}: lacks {', '.join(sorted(missing))}")
    if contender["status"] not in STATUSES:
        raise ResultsError(f"{name}: expected a status of {', '.join(STATUSES)}, got {contender['status']!r}")
    timed = TIME_FIELDS & contender.keys()
    if contender["status"] == "ok" and timed != TIME_FIELDS:
        raise ResultsError(f"{name}: lacks {', '.join(sorted(TIME_FIELDS - timed))}")
    if contender["status"] != "ok" and (timed or not contender["reason"]):
        raise ResultsError(f"{name}: status {contender['status']!r} needs a reason and no time")


def put(results: dict, run: str, environment: dict, case: dict) -> None:
    """Add a case, or replace the one of its key; runs that no case names any more go."""
    results["runs"][run] = environment
    for index, old in enumerate(results["cases"]):
        if old["key"] == case["key"]:
            results["cases"][index] = case
            break
    else:
        results["cases"].append(case)
    used = {entry["run"] for entry in results["cases"]}
    results["runs"] = {name: facts for name, facts in results["runs"].items() if name in used}


def save(results: dict, path: str | Path) -> None:
    """Write the file whole: an interrupted write leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def contender(case: dict, name: str) -> dict | None:
    """The measured contender of a name in a case, None when it has no time."""
    for entry in case["contenders"]:
        if entry["name"] == name and entry["status"] == "ok":
            return entry
    return None


def default_backend(case: dict) -> dict | None:
    """The backend that the op chooses by itself for this case, when it was measured."""
    for entry in case["contenders"]:
        if entry["kind"] == "backend" and entry.get("default") and entry["status"] == "ok":
            return entry
    return None


def seconds(entry: dict) -> float:
    """The time that is compared: the median, of graph replays on a GPU where there are any."""
    return (entry.get("graph_seconds") or entry["seconds"])["median"]


def disturbed(entry: dict) -> float:
    """Share of the processors that others had while a case was timed."""
    return sum((entry["disturbance"] or {}).values())


def best_peer(case: dict) -> dict | None:
    """The fastest measured peer of a case; marks and backends are none."""
    peers = [entry for entry in case["contenders"] if entry["kind"] == "peer" and entry["status"] == "ok"]
    return min(peers, key=seconds, default=None)
