"""Long texts to tokens and back in bounded memory.

A tokenizer needs some 200 bytes for every character that it is given at once. So a long text is cut, and each cut is
checked: the text after it, alone, must give the tokens that it gives behind the text before. Where a tokenizer has no
such place (it marks the start of a text, say), the text is tokenised whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ztok_fast.codec.errors import CodecError
from ztok_fast.profiling import TOKENISE, stage

CUT_CHARS = 1 << 16
"""Characters tokenised at once."""

CONTEXT_CHARS = 1 << 10
"""Characters after a cut over which both tokenisations must agree."""

CUT_TOKENS = 1 << 14
CONTEXT_TOKENS = 1 << 6
"""As the two above, for tokens to text."""

_TRIES = 16


def originals_and_texts(texts: Sequence[str | bytes]) -> tuple[list[bytes], list[str]]:
    """The bytes of every document, and its text, in which others stand for bytes that are not UTF-8.

    Raises:
        CodecError: a document is neither a string nor bytes, or ``texts`` is one document.
    """
    if isinstance(texts, (str, bytes)):
        raise CodecError(f"texts: expected a list of strings, got one {type(texts).__name__}; put it in a list")
    originals, contents = [], []
    for index, text in enumerate(texts):
        if not isinstance(text, (str, bytes)):
            raise CodecError(f"texts[{index}]: expected a string or bytes, got {type(text).__name__}")
        original = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        originals.append(original)
        contents.append(original.decode("utf-8", "replace"))
    return originals, contents


def tokenize(tokenizer, texts: Sequence[str]) -> list[array]:
    """The tokens of every text, without special tokens, as arrays of C ints; the same as of the whole text at once."""
    with stage(TOKENISE):
        return _tokenize_all(tokenizer, texts)


def _tokenize_all(tokenizer, texts: Sequence[str]) -> list[array]:
    found: list[array] = []
    short: list[str] = []

    def flush() -> None:
        if short:
            ids = tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"]
            found.extend(array("i", own) for own in ids)
            short.clear()

    waiting = 0
    for text in texts:
        if len(text) > CUT_CHARS + CONTEXT_CHARS:
            flush()
            waiting = 0
            found.append(_tokenize_long(tokenizer, text))
            continue
        short.append(text)
        waiting += len(text)
        # Short texts go together: the tokenizer works on them in parallel.
        if waiting > 4 * CUT_CHARS:
            flush()
            waiting = 0
    flush()
    return found


def _tokenize_long(tokenizer, text: str) -> array:
    tokens, start = array("i"), 0
    while len(text) - start > CUT_CHARS + CONTEXT_CHARS:
        ahead = text[start : start + CUT_CHARS + CONTEXT_CHARS]
        cut = _cut(tokenizer, ahead) if tokenizer.is_fast else None
        if cut is None:
            return array("i", _ids(tokenizer, text))
        ids, size = cut
        tokens.extend(ids)
        start += size
    tokens.extend(_ids(tokenizer, text[start:]))
    return tokens


def _cut(tokenizer, text: str) -> tuple[list[int], int] | None:
    """The first tokens of ``text`` and how many characters they stand for, up to a cut that is sure; or ``None``."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    last = next((k for k in range(len(ends), 0, -1) if ends[k - 1] <= CUT_CHARS), 0)
    nearby = range(last, max(0, last - CONTEXT_CHARS), -1)
    # Before white space the tokenizer's own first step cuts too; other places matter where there is none.
    at_space = (k for k in nearby if text[ends[k - 1]].isspace() and not text[ends[k - 1] - 1].isspace())
    for k in _first_distinct(at_space, nearby):
        if _ids(tokenizer, text[ends[k - 1] :]) == ids[k:]:
            return ids[:k], ends[k - 1]
    return None


def _first_distinct(preferred: Iterator[int], others: Sequence[int]) -> Iterator[int]:
    """At most `_TRIES` of the preferred, then as many of the others."""
    for source in (preferred, iter(others)):
        for _, k in zip(range(_TRIES), source):
            yield k


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def detokenize(tokenizer, tokens: Sequence[int]) -> bytes:
    """The text of tokens as UTF-8; the same as of all tokens at once."""
    with stage(TOKENISE, rows=len(tokens)):
        return _detokenize(tokenizer, tokens)


def _detokenize(tokenizer, tokens: Sequence[int]) -> bytes:
    found, start = [], 0
    while len(tokens) - start > CUT_TOKENS + CONTEXT_TOKENS:
        stop = _cut_tokens(tokenizer, tokens, start + CUT_TOKENS)
        if stop is None:
            return _decode(tokenizer, tokens).encode("utf-8", "surrogatepass")
        found.append(_decode(tokenizer, tokens[start:stop]).encode("utf-8", "surrogatepass"))
        start = stop
    found.append(_decode(tokenizer, tokens[start:]).encode("utf-8", "surrogatepass"))
    return b"".join(found)


def _cut_tokens(tokenizer, tokens: Sequence[int], end: int) -> int | None:
    """A place at or before ``end`` where the texts on both sides join to the text of all; or ``None``."""
    for cut in range(end, end - _TRIES, -1):
        before, after = tokens[cut - CONTEXT_TOKENS : cut], tokens[cut : cut + CONTEXT_TOKENS]
        if _decode(tokenizer, before) + _decode(tokenizer, after) == _decode(tokenizer, [*before, *after]):
            return cut
    return None


def _decode(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def as_text(data: bytes) -> str:
    """UTF-8 as a string, other bytes as surrogates."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")
