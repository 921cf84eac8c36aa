"""``ztok decompress``: a ``.ztok`` file back to text."""

from __future__ import annotations

import argparse
from pathlib import Path

from ztok_fast.cli import common, streams


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "decompress",
        help="turn a .ztok file, or a corpus in Parquet, back into text",
        description="Decompress a .ztok file, or a Parquet file that `ztok compress --corpus` made. Coded units, "
        "and a file made with --exact, give the original byte for byte; any other gives an approximation.",
    )
    parser.add_argument("file", metavar="FILE", help="a .ztok file, or a Parquet file of Z-tokens or coded units")
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="OUT",
        help="file to write, a new folder for several documents, or OUT.parquet for those of Parquet (default: -, all "
        "documents to stdout)",
    )
    parser.add_argument("--document", type=int, metavar="N", help="decompress only document N, counted from 0")
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ztok_fast.cli import coded, corpus

    if corpus.is_parquet(options.file):
        return corpus.decompress(options)
    if coded.is_coded(options.file):
        return coded.decompress(options, _check_output)
    from ztok_fast.codec.errors import ExactMismatchError, ZFileError
    from ztok_fast.codec.learned_file import stated_documents

    documents, wanted = stated_documents(common.check_batch_name(options.file)), options.document
    if wanted is not None and not 0 <= wanted < documents:
        raise common.UsageError(f"--document: expected 0 to {documents - 1}, got {wanted}")
    output = None if options.output == "-" else Path(options.output)
    if output is not None:
        _check_output(output, documents if wanted is None else 1, options.file)
    codec = common.load_codec(options)
    z = codec.load(options.file)
    if wanted is not None:
        z = z[wanted]
    with common.progress_bar(z.tokens, "decompress") as progress:
        try:
            texts = codec.decompress_bytes(z, progress=progress)
        except (ExactMismatchError, ZFileError) as error:
            raise common.UsageError(f"{options.file}: {error}") from error
    if output is None:
        for data in texts:
            streams.write(data)
        return 0
    from ztok_fast.files import replace_atomically

    # The output appears under its name only when it is complete.
    with replace_atomically(output) as temporary:
        if len(texts) == 1:
            temporary.write_bytes(texts[0])
        else:
            temporary.mkdir()
            for index, data in enumerate(texts):
                (temporary / f"{index:04d}.txt").write_bytes(data)
    return 0


def _check_output(output: Path, documents: int, source: str) -> None:
    if documents == 1:
        common.check_output(output, inputs=[source])
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise common.UsageError(
            f"output {output}: expected a new or empty folder for {documents} documents, got one that exists; "
            "--document N takes one of them"
        )
    common.check_parent(output)
