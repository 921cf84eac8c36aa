"""The results file: runs (machine, versions, marks) and one entry per case that names its run.

The status of an implementation in a case is `ok` (measured), `wrong` (its answer), `failed` (it raised), `missing` (its
package is not installed) or `skipped` (another dtype, no backward, too much memory). All but `ok` carry a reason and no
time.

A file is added to, case by case: measuring some cases again replaces theirs and leaves the others with the run that
made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ztok_fast.files import replace_atomically

SCHEMA = 2


class ResultsError(ValueError):
    """A results file that is not one."""


def empty() -> dict:
    return {"schema": SCHEMA, "runs": {}, "cases": []}


def load(path: str | Path) -> dict:
    """Read a results file.

    Raises:
        ResultsError: it is not JSON, or has another schema.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    schema = results.get("schema") if isinstance(results, dict) else results
    if schema != SCHEMA:
        raise ResultsError(f"{path}: expected schema {SCHEMA}, got {schema!r}")
    return results


def load_all(paths: Iterable[str | Path]) -> dict:
    """Results files as one.

    Raises:
        ResultsError: as `load`.
    """
    joined = empty()
    for own in map(load, sorted(paths)):
        joined["runs"] |= own["runs"]
        joined["cases"] += own["cases"]
    return joined


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
