"""Compress long text into short sequences of discrete latent codes (Z-tokens) and back.

Public names are imported on first use, so that `import ztok_fast` stays cheap and never loads transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.coded_file import CodedFile
    from ztok_fast.codec.config import ZTokConfig
    from ztok_fast.codec.corpus import compress_corpus, read_corpus, write_corpus
    from ztok_fast.codec.learned_file import LearnedFile
    from ztok_fast.codec.zbatch import ZBatch
    from ztok_fast.evaluation.answers import evaluate_answers
    from ztok_fast.evaluation.evaluate import evaluate
    from ztok_fast.ops.backends import backend
    from ztok_fast.patching import patch

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS = {
    "CodedFile": "ztok_fast.codec.coded_file",
    "LearnedFile": "ztok_fast.codec.learned_file",
    "ZBatch": "ztok_fast.codec.zbatch",
    "ZTokCodec": "ztok_fast.codec.codec",
    "ZTokConfig": "ztok_fast.codec.config",
    "backend": "ztok_fast.ops.backends",
    "compress_corpus": "ztok_fast.codec.corpus",
    "evaluate": "ztok_fast.evaluation.evaluate",
    "evaluate_answers": "ztok_fast.evaluation.answers",
    "patch": "ztok_fast.patching",
    "read_corpus": "ztok_fast.codec.corpus",
    "write_corpus": "ztok_fast.codec.corpus",
}

__all__ = [
    "CodedFile",
    "LearnedFile",
    "ZBatch",
    "ZTokCodec",
    "ZTokConfig",
    "__version__",
    "backend",
    "compress_corpus",
    "evaluate",
    "evaluate_answers",
    "patch",
    "read_corpus",
    "write_corpus",
]


def __getattr__(name: str):
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'ztok_fast' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
