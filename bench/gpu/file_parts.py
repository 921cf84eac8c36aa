"""Splitting a large file into parts under a size limit, and joining them again with a check.

A base model often has to reach a machine through a channel that bounds the size of one file. The
parts lie beside a small JSON manifest with the SHA-256 of each part and of the whole; joining
checks all of them, so that a missing, short or mixed-up part is an error and never a broken model.

    python -m bench.gpu.file_parts split model.gguf parts/ --part-mb 60
    python -m bench.gpu.file_parts join parts/model.gguf.parts.json restored/
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from ztok_fast.codec.atomic import replace_atomically

MANIFEST_SUFFIX = ".parts.json"
MANIFEST_FORMAT = "ztok-file-parts-1"


class FilePartsError(ValueError):
    """A file cannot be split, or parts cannot be joined; the message names the file and the fault."""


def split_file(path: str | Path, folder: str | Path, part_bytes: int = 60_000_000) -> Path:
    """Write ``path`` as parts of at most ``part_bytes`` bytes into ``folder``.

    Returns the manifest's path, ``<folder>/<file name>.parts.json``. The parts are
    ``<file name>.part000``, ``.part001``, ... of nearly equal size; an empty file has no parts.

    Raises:
        FilePartsError: the file does not exist, or ``part_bytes`` is not positive.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise FilePartsError(f"path: expected an existing file to split, got {path}")
    if part_bytes < 1:
        raise FilePartsError(f"part_bytes: expected a positive number of bytes, got {part_bytes}")
    size = path.stat().st_size
    count = -(-size // part_bytes)
    even = -(-size // count) if count else 0
    folder.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    parts = []
    with path.open("rb") as source:
        for index in range(count):
            name = f"{path.name}.part{index:03d}"
            data = source.read(even)
            (folder / name).write_bytes(data)
            whole.update(data)
            parts.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = folder / (path.name + MANIFEST_SUFFIX)
    description = {
        "format": MANIFEST_FORMAT,
        "name": path.name,
        "bytes": size,
        "sha256": whole.hexdigest(),
        "parts": parts,
    }
    manifest.write_text(json.dumps(description, indent=2) + "\n")
    return manifest


def join_file(manifest: str | Path, target: str | Path, parts_folder: str | Path | None = None) -> Path:
    """Join the parts that ``manifest`` lists; returns the path of the whole file.

    ``target`` is the file to write, or an existing folder that receives it under its own name. The
    parts are looked for in ``parts_folder``, by default the manifest's folder. The result appears
    only once every size and SHA-256 agrees.

    Raises:
        FilePartsError: the manifest or a part is missing, foreign, short or altered.
    """
    description = _read_manifest(Path(manifest))
    source = Path(parts_folder) if parts_folder is not None else Path(manifest).parent
    target = Path(target)
    if target.is_dir():
        target = target / description["name"]
    whole = hashlib.sha256()
    with replace_atomically(target) as temporary, temporary.open("wb") as out:
        for part in description["parts"]:
            data = _read_part(source / part["name"], part)
            whole.update(data)
            out.write(data)
        if whole.hexdigest() != description["sha256"]:
            raise FilePartsError(
                f"{description['name']}: expected SHA-256 {description['sha256']} of the joined file, "
                f"got {whole.hexdigest()}; the manifest's parts are not in order"
            )
    return target


def _read_manifest(path: Path) -> dict:
    try:
        description = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FilePartsError(f"manifest {path}: expected a readable {MANIFEST_SUFFIX} file, got: {error}") from error
    if not isinstance(description, dict) or description.get("format") != MANIFEST_FORMAT:
        raise FilePartsError(f"manifest {path}: expected format {MANIFEST_FORMAT!r}, got another JSON file")
    try:
        names = [description["name"], *(part["name"] for part in description["parts"])]
        sizes = [description["bytes"], *(part["bytes"] for part in description["parts"])]
        hashes = [description["sha256"], *(part["sha256"] for part in description["parts"])]
    except (KeyError, TypeError) as error:
        raise FilePartsError(f"manifest {path}: expected name, bytes, sha256 and parts, missing {error}") from error
    for name in names:
        # A manifest comes from outside: its names must not lead out of the folder.
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise FilePartsError(f"manifest {path}: expected plain file names, got {name!r}")
    if not all(isinstance(size, int) for size in sizes) or not all(isinstance(value, str) for value in hashes):
        raise FilePartsError(f"manifest {path}: expected integers as bytes and strings as sha256")
    return description


def _read_part(path: Path, part: dict) -> bytes:
    if not path.is_file():
        raise FilePartsError(f"part {path}: expected an existing file of {part['bytes']} bytes, got none")
    data = path.read_bytes()
    if len(data) != part["bytes"] or hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise FilePartsError(
            f"part {path}: expected {part['bytes']} bytes with SHA-256 {part['sha256']}, got {len(data)} bytes "
            "with other contents; copy the part again"
        )
    return data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.file_parts", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="write a file as parts and a manifest")
    split.add_argument("file")
    split.add_argument("folder")
    split.add_argument("--part-mb", type=float, default=60.0, help="largest part in MB of 10^6 bytes (default 60)")
    join = commands.add_parser("join", help="join the parts of a manifest and check the SHA-256")
    join.add_argument("manifest")
    join.add_argument("target", help="file to write, or an existing folder")
    options = parser.parse_args(argv)
    try:
        if options.command == "split":
            print(split_file(options.file, options.folder, int(options.part_mb * 1e6)))
        else:
            print(join_file(options.manifest, options.target))
    except (FilePartsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
