"""Memory is bounded: a long text costs little more than its tokens and codes."""

import subprocess
import sys

SCRIPT = """
import resource
from ztok_fast import ZTokCodec
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
codec = ZTokCodec.from_pretrained("ztok-mini")
codec.decompress(codec.compress(["a" * 10_000]))
before = peak()
text = "a" * 3_000_000
z = codec.compress([text])
assert z.tokens > 100_000 and len(codec.decompress_tokens(z)[0]) == z.tokens
print(peak() - before)
"""

MOST_MB = 150
"""Measured are 45 MB; with the whole text given to the tokenizer at once it was 424 MB."""


def printed_by(script: str) -> int:
    """The last number that a script prints in a process of its own."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split()[-1])


def test_a_long_text_needs_little_memory():
    assert printed_by(SCRIPT) < MOST_MB


CODED = """
import resource
from ztok_fast.codec.coded import TextCoder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
coder, text = TextCoder.from_pretrained(), b"It was a dark and stormy night; the rain fell in torrents. " * 4000
coder.encode([text[:20_000]])
before = peak()
assert len(coder.tokens([text])[0]) > 50_000
coder.encode([text])
print(peak() - before)
"""

MOST_CODED_MB = 150
"""Measured are 28 MB. The logits of all tokens would take 750 MB, and with small tensors in their places 558 MB did."""


def test_a_long_text_is_coded_with_little_memory():
    assert printed_by(CODED) < MOST_CODED_MB
