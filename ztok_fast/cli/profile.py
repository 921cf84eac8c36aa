"""``ztok bench``: where the time of compress, decompress and generate goes, on the user's own files.

`ztok_fast.cli.profile_files` has ``ztok bench files``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, profile_files, report

if TYPE_CHECKING:
    from ztok_fast.cli.profile_ways import Work
from ztok_fast.profiling import Profile

EPILOG = """\
stages: tokenise (both ways), model passes (the base with an adapter), halting, quantise, head (choosing tokens or
codes); rest is Python and small tensor operations between them. Host share: the part of the time in which the main
thread is in no torch op and not in the tokenizer, by torch's profiler in a run of its own. Batch occupancy: rows that
still run over rows of the batch, over all steps. Passes: of the model for a segment; fewer than it has tokens where it
was drafted and verified. Roofline: the least time that the int8 products and the read
bandwidth of this machine, measured in the same run, allow for the linear layers and the head, over the time taken.
docs/benchmarks.md says more.
"""

VARIABLES = {"GOMP_SPINCOUNT": "0"}
"""Set before torch is loaded, unless the user has set them. Threads that spin for work, on a machine with as many busy
processes as cores, turn microseconds into ticks of the scheduler."""

PROFILED_SHARE, MOST_PROFILES = 0.2, 20
"""Of the seconds, so much is for runs whose stages are recorded, and at most so many: the fastest of them is shown."""


def add_commands(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time a codec on your files, by stage; compare sizes",
        description="Measure on your own files: the time of a codec by stage, or the size of coded units beside "
        "general compressors. `ztok bench WHAT --help` lists the options.",
    )
    kinds = bench.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    for what in ("compress", "decompress", "generate"):
        _add_way(kinds, what)
    profile_files.add_command(kinds)


def _add_way(kinds, what: str) -> None:
    parser = kinds.add_parser(
        what,
        help=f"time {what}",
        description=f"Time {what} on your own files: tokens per second, time per stage, memory, and the share of what "
        "this machine can do, beside Hugging Face + PEFT in the same run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="text files, - for stdin, or .ztok files (not for compress)"
    )
    parser.add_argument("-r", "--ratio", type=float, default=4.0, help="text tokens per Z-token (default: 4)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="for all timed rounds; one is the least (default: 10)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="use the first N text tokens of the files (default: 4096)"
    )
    parser.add_argument(
        "--max-new-ztokens", type=int, default=32, metavar="N", help="generate: new Z-tokens a document (default: 32)"
    )
    parser.add_argument("--no-baselines", action="store_true", help="time this package alone")
    parser.add_argument("--gguf", metavar="FILE.gguf", help="SmolLM2 at Q8_0, to time llama.cpp where it is installed")
    parser.add_argument("--trace", metavar="OUT.json", help="also write the stages as a Chrome trace")
    parser.add_argument("--json", metavar="OUT", help="also write the results to a JSON file")
    parser.add_argument("--plot", metavar="OUT.png", help="also draw the results; needs ztok-fast[bench]")
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    outputs = _check(options)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    codec = common.load_codec(options)

    from ztok_fast.cli import profile_ways as ways

    work = ways.read_work(options, codec)
    result, stages = measure(options, work)
    from ztok_fast.files import replace_atomically

    if "json" in outputs:
        with replace_atomically(outputs["json"]) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if "trace" in outputs:
        stages.write_trace(outputs["trace"], f"ztok {options.what}")
    if "plot" in outputs:
        from ztok_fast.cli.profile_plot import draw

        with replace_atomically(outputs["plot"]) as temporary:
            draw(result, temporary)
    print(render(result))
    return 0


def _check(options: argparse.Namespace) -> dict[str, Path]:
    """Refuse what cannot be done, before any work; the output files that are asked for."""
    for name in ("tokens", "max_new_ztokens"):
        if getattr(options, name) < 1:
            raise common.UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if not 0 < options.seconds < float("inf"):
        raise common.UsageError(f"--seconds: expected a finite number above 0, got {options.seconds}")
    if options.device != "cpu":
        raise common.UsageError(f"--device {options.device}: expected cpu, stages are timed on the CPU only")
    if options.files.count("-") > 1:
        raise common.UsageError("FILE: expected stdin (-) at most once")
    for name in options.files:
        if name != "-":
            common.check_input(name)
    if options.gguf is not None:
        common.check_input(options.gguf)
    inputs = [own for own in options.files if own != "-"]
    return common.check_outputs(options, (("trace", ".json"), ("json", None), ("plot", ".png")), inputs)


def measure(options: argparse.Namespace, work: Work) -> tuple[dict, Profile]:
    """Time all ways in turns, then the codec's stages.

    Returns:
        The results, JSON-serialisable, and the profile of the stages.
    """
    import torch

    from ztok_fast import doctor, profiling
    from ztok_fast.cli import profile_machine as machine
    from ztok_fast.cli import profile_ways as ways
    from ztok_fast.codec.shipped import codec_folder

    codec, small = work.codec, work.small()
    own = ways.Way(ways.OURS, ways.ours)
    own.call(small)
    engine = codec.model.engine
    precision = "float" if engine is None else engine.name
    weights = machine.Weights.of(codec, precision)
    # Twice, before and after, because the clock of a shared machine moves: the better one counts.
    weight_bytes = weights.of_pass(None) * weights.bytes_each
    marks = machine.calibrate(precision, weight_bytes)
    # Before the baselines are loaded: the peak is that of the codec alone.
    machine.reset_peak()
    ways.ours(work)
    peak = machine.memory("VmHWM")
    others, notes = [], []
    if not options.no_baselines:
        for found, sentences in (
            ways.baselines(work, codec_folder(options.codec), options.base),
            ways.llama_cpp(work, options.gguf),
        ):
            others += found
            notes += sentences
    for other in others:
        other.call(small)
    rounds = ways.take_turns([own, *others], work, options.seconds)
    stages = fastest_profile(lambda: ways.ours(work), PROFILED_SHARE * options.seconds)
    host = profiling.host_share(lambda: ways.ours(work))
    marks = marks.best(machine.calibrate(precision, weight_bytes))
    seconds, least = stages.seconds(), machine.least_seconds(stages, weights, marks)
    total = stages.nanoseconds / 1e9
    answer = ways.our_answer(work) if others else []
    result = {
        "command": options.what,
        "codec": options.codec,
        "engine": precision,
        "documents": work.documents,
        "amount": work.amount,
        "unit": work.unit,
        "ratio": work.ratio,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "ways": [
            {
                "name": way.name,
                "seconds": way.seconds,
                "tokens_per_second": work.amount / way.seconds,
                "memory_bytes": way.memory,
                "same": None if way is own else ways.agreement(answer, way.answer),
            }
            for way in [own, *others]
        ],
        "notes": notes,
        "stages": [
            {
                "name": name,
                "seconds": value,
                "share": value / total,
                "calls": sum(span.name == name for span in stages.spans),
                "rows": sum(span.rows for span in stages.spans if span.name == name),
                "roofline": least[name] / value if value and least.get(name) else None,
            }
            for name, value in seconds.items()
        ],
        "seconds": total,
        "host_share": host,
        "peak_memory_bytes": peak,
        "batch_occupancy": stages.occupancy,
        "segments": work.segments,
        "passes_per_segment": stages.passes / work.segments if work.segments else None,
        "roofline": sum(least.values()) / total,
        "marks": vars(marks),
        "environment": doctor.environment(),
    }
    return result, stages


def fastest_profile(call: Callable[[], object], seconds: float) -> Profile:
    """The stages of the fastest of the calls that this time allows; one at least."""
    from ztok_fast.profiling import profile

    found: list[Profile] = []
    stop = time.perf_counter() + seconds
    while not found or (time.perf_counter() < stop and len(found) < MOST_PROFILES):
        with profile() as own:
            call()
        found.append(own)
    return min(found, key=lambda own: own.nanoseconds)


def render(result: dict) -> str:
    """What ``ztok bench`` prints."""
    first, cpu, marks = result["ways"][0], result["environment"]["cpu"], result["marks"]
    head = (
        f"{result['command']}: {result['documents']:,} documents, {result['amount']:,} {result['unit']}, ratio "
        f"{result['ratio']:g}; {result['codec']}, engine {result['engine']}; {cpu['model']}, "
        f"{result['threads']} threads; median of {result['rounds']} rounds"
    )
    unit = f"{result['unit']}/s"
    ways = report.table(
        ("", "seconds", unit, "slower by", "memory", "same"),
        [
            (
                way["name"],
                report.number(way["seconds"], 3),
                report.number(way["tokens_per_second"], 0),
                "-" if way is first else report.number(way["seconds"] / first["seconds"]),
                _size(way["memory_bytes"]),
                report.percent(way["same"]),
            )
            for way in result["ways"]
        ],
    )
    stages = report.table(
        ("stage", "seconds", "share", "calls", "rows/call", "roofline"),
        [
            (
                own["name"],
                report.number(own["seconds"], 4),
                report.percent(own["share"]),
                f"{own['calls']:,}" if own["calls"] else "-",
                report.number(own["rows"] / own["calls"], 1) if own["rows"] else "-",
                report.percent(own["roofline"]),
            )
            for own in result["stages"]
        ],
    )
    facts = report.pairs(
        [
            ("host share", report.percent(result["host_share"])),
            ("peak memory", f"{_size(result['peak_memory_bytes'])} of the process, before any baseline was loaded"),
            ("batch occupancy", report.percent(result["batch_occupancy"])),
            *([("passes", _passes(result))] if result["segments"] else []),
            (
                "roofline",
                f"{report.percent(result['roofline'])} of {marks['products'] / 1e9:,.0f} G products/s "
                f"({marks['products_by']}) and {marks['read'] / 1e9:,.0f} GB/s ({marks['read_by']}, "
                f"{marks['read_bytes'] / 1e6:,.1f} MB)",
            ),
        ]
    )
    return "\n\n".join([head, ways, *result["notes"], stages, facts])


def _passes(result: dict) -> str:
    tokens = result["amount"] / result["segments"]
    return f"{result['passes_per_segment']:.1f} for a segment, which has {tokens:.1f} tokens, the means"


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MB"
