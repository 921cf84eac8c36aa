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


class EngineFallbackWarning(UserWarning):
    """The engine cannot run a codec's base model here, so transformers' modules do, slower; the message says why."""


class LossyTextWarning(UserWarning):
    """Bytes of a document are lost before it is compressed: they are not UTF-8, or the tokenizer changes them.

    Attributes:
        documents: indices of these documents; first_byte: offset of the first lost byte in the first of them.
    """

    def __init__(self, documents: list[int], first_byte: int) -> None:
        self.documents, self.first_byte = documents, first_byte
        others = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
        super().__init__(
            f"texts[{documents[0]}]{others}: bytes that tokens cannot represent, from byte {first_byte} on, are lost; "
            "exact=True keeps every byte"
        )


class CodedUnitsWarning(UserWarning):
    """A model cannot read coded units: they are decoded, and their text is compressed to learned units first."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: a model cannot read coded units; they are decoded, and the text is compressed to learned units, "
            "from which the result comes"
        )
