"""What ships with the package: codecs and base models, by folder name."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"


def codec_folder(name: str | Path) -> Path:
    """The folder of a codec: the path itself where it is a folder, else one that ships under this name."""
    folder = Path(name)
    return folder if folder.is_dir() else MODELS / str(name)


def shipped_codecs() -> list[str]:
    """Names of the codecs that ship."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def shipped_base(name: str) -> Path | None:
    """The folder of a base model that ships under this name, if there is one."""
    folder = MODELS / name / "base"
    return folder if name and Path(name).name == name and folder.is_dir() else None
