"""Errors of the codec layer; all are ``ValueError``, so that callers may catch either."""


class BaseModelError(ValueError):
    """A base model cannot be found, read or written."""
