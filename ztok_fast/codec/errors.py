"""Errors of the codec layer; all are ``ValueError``, so that callers may catch either."""


class BaseModelError(ValueError):
    """A base model cannot be found, read or written."""


class ZBatchError(ValueError):
    """Compressed documents whose parts do not fit together, or that another codec made."""


class ZFileError(ValueError):
    """A ``.ztok`` file or a compressed corpus is truncated, foreign, of another version or inconsistent."""


class ExactMismatchError(ValueError):
    """The bytes that came back are not those that were compressed."""


class CodecError(ValueError):
    """A codec cannot be found, does not fit its base model, or is asked for what it cannot do."""
