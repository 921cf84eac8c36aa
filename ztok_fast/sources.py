"""Which sources a compiled part was built from.

The build runs this file (``python ztok_fast/sources.py cpu sources.cpp``) and compiles the digest of the part's C++ and
CUDA sources into its library; `ztok_fast.native` compares it with the sources that lie beside the package. So a library
left over from other sources, after a change of branch say, is found before it is loaded. An installed package has no
sources beside it, and nothing to compare: its Python and its libraries came together.

It imports nothing of the package: the build may run it without torch.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FOLDERS = {"cpu": ("common", "cpu"), "cuda": ("common", "cuda"), "host": ("host",)}
SUFFIXES = (".h", ".cuh", ".inc", ".cpp", ".cu")


def digest(part: str, csrc: Path | None = None) -> str | None:
    """SHA-256, in hexadecimal, of the names and contents of a part's sources; None where there are none.

    Args:
        part: "cpu", "cuda" or "host".
        csrc: the folder that holds `FOLDERS`; None for the one beside the package.
    """
    csrc = csrc or CSRC
    folders = [csrc / name for name in FOLDERS[part]]
    if not all(folder.is_dir() for folder in folders):
        return None
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
            text = path.read_bytes()
            state.update(f"{folder.name}/{path.name} {len(text)}\n".encode() + text)
    return state.hexdigest()


def _mark(part: str) -> str:
    return f"ztok_{part}_sources="


def recorded(part: str, library: Path) -> str | None:
    """The digest compiled into a library, which is not loaded for it; None for a file without one.

    Raises:
        OSError: the file cannot be read.
    """
    if library.stat().st_size == 0:
        return None
    mark = _mark(part).encode()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(mark)
        found = data[at + len(mark) : at + len(mark) + 64] if at >= 0 else b""
    text = found.decode("ascii", "replace")
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None


def main(part: str, output: str) -> None:
    """Write the C++ file that keeps a part's digest in its library."""
    text = f"{_mark(part)}{digest(part)}"
    Path(output).write_text(f'__attribute__((used)) static const char ztok_{part}_sources[] = "{text}";\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
