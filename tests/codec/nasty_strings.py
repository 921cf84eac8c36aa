"""Texts that break tokenizers, Unicode handling, allocation of units, or files; used to prove exact mode."""

from __future__ import annotations

LONG = 1_000_000
"""Characters of the longest texts."""


def nasty_texts(long: int = LONG) -> dict[str, str]:
    """Strings by name; ``long`` is the length of those that are long on purpose."""
    return {
        "empty": "",
        "one character": "x",
        "one space": " ",
        "one newline": "\n",
        "NUL": "\0",
        "NUL inside": "before\0after\0\0end",
        "all control characters": "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
        "CRLF": "first\r\nsecond\r\n\r\nthird\r\n",
        "CR alone": "first\rsecond\r\rthird",
        "mixed line ends": "a\nb\r\nc\rd\u2028e\u2029f\x0bg\x0ch\x85i",
        "no newline at the end": "line\nline",
        "tabs": "\tname\t\tvalue\t\n\t\t\t1\n",
        "leading and trailing blanks": "   \n  text between blanks  \n   ",
        "runs of blanks": "".join(f"{n}:{' ' * n}|" for n in range(1, 70)),
        "blanks of Unicode": "a\u00a0b\u1680c\u2000d\u2009e\u202ff\u205fg\u3000h\u200bi\ufeffj",
        "blanks and newlines alone": " \n\t \r\n" * 50,
        "blanks before digits": "total     1984,   37 of      100",
        "emoji": "🙂🙃😀🤖🎉",
        "emoji ZWJ sequences": "👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 👁️‍🗨️ ❤️‍🔥 🧑🏻‍🤝‍🧑🏾",
        "flags and keycaps": "🇩🇪🇯🇵🇺🇳 #️⃣ 1️⃣ *️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "broken emoji sequence": "👩\u200d 👨\u200d\u200d\u200d👧 \u200d🏿",
        "combining marks": "Z̷̢̛͍a̴͖͊l̸̰͝g̵̳̎o̶̙͒ e\u0301 \u00e9 a\u0308\u0323 q\u0307\u0323 \u0301",
        "a thousand combining marks": "o" + "\u0301" * 1000,
        "composed and decomposed": "\u00c5 A\u030a \u212b \uac00 \u1100\u1161 \ufb01 \u2126 \u03a9",
        "compatibility characters": "①②③ ｆｕｌｌｗｉｄｔｈ ﬃ ﷺ ㎏ Ⅷ ½ ⅔ ™ ª",
        "right to left": "שָׁלוֹם עוֹלָם العَرَبِيَّة ١٢٣ فارسی ‏(test)‎",
        "direction controls": "\u202eabc\u202c \u2066def\u2069 \u200eghi\u200f",
        "Indic": "नमस्ते दुनिया क्‍ष তোমার நன்றி ശ്രീ",
        "Thai, Lao, Khmer, Burmese": "ภาษาไทยไม่มีเว้นวรรค ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ",
        "Chinese, Japanese, Korean": "漢字仮名交じり文 简体与繁體 한국어 문장, ｶﾀｶﾅ ゔ",
        "rare ideographs": "𠀀𠀁𪚥𰻞 \U000323af",
        "scripts mixed in one word": "pаypаl ΑBΓdЕж αβγ-абв-abc ｅx",
        "old and invented scripts": "𐎀𐎁𐎂 𒀀𒀁 𓀀𓁐 ᚠᚢᚦ 𐐷",
        "mathematics": "∑_{i=1}^{∞} 1/i² = π²/6; 𝒜𝔅ℂ𝟙; ∀x∈ℝ: ⌊x⌋≤x; a⃗·b⃗",
        "byte order mark first": "\ufeffThe mark stands first.",
        "byte order mark inside": "one\ufefftwo\ufffethree",
        "replacement characters": "\ufffd a \ufffd\ufffd b",
        "noncharacters": "\ufdd0\ufdef\uffff\U0001fffe\U0010ffff",
        "private use": "\ue000\uf8ff\U000f0000\U00100000",
        "lone high surrogate": "a\ud83d b",
        "lone low surrogate": "\udc00 at the start",
        "surrogates apart": "\ud83d\ude00 as two halves, \ude00\ud83d swapped",
        "tag characters": "a\U000e0041\U000e0042\U000e007f",
        "variation selectors": "A\ufe00B\ufe0fC\U000e0100D",
        "soft hyphens and joiners": "in\u00advis\u00adi\u00adble\u2060word\u200cjoin\u200d",
        "special tokens": "<|endoftext|> <|im_start|>user\nhello<|im_end|> <s></s> <unk> [CLS] [MASK] <pad>",
        "special tokens broken up": "<|endof text|> <|endoftext |> <|im_<|im_start|>start|>",
        "special token alone": "<|endoftext|>",
        "special tokens repeated": "<|endoftext|>" * 100,
        "byte tokens in text": "<0x00><0xFF> \\x00 \\u0000 Ġthe Ċ ▁word ##ing @@",
        "HTML": "<p class='a'>1 &lt; 2 &amp;&amp; 3 &gt; 2&nbsp;&#x1F642;</p><!-- end -->",
        "JSON": '{"a": [1, 2.50, -3e-10, null], "b\\n": {"c": "\\u00e9"}}',
        "Python": 'def f(x: int = 0) -> str:\n\t"""Doc."""\n    return f"{x!r:>{10}}"  # tabs and blanks\n',
        "C": '#include <stdio.h>\nint main(void){for(int i=0;i<10;++i)printf("%d\\n",i^0x1F);return 0;}\n',
        "shell": "find . -name '*.gz' -print0 | xargs -0 -n1 sh -c 'zcat \"$0\" | wc -c' && echo $?\n",
        "regular expressions": r"^(?:[^\\/]|\\.)*\/(?<=[\w-]{3,})\b.*?$",
        "diff": "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-old \n+new\t\n unchanged\n\\ No newline at end of file\n",
        "CSV": 'id,"name, first",value\r\n1,"say ""no""",\r\n,,\r\n',
        "base64": "TWFueSBoYW5kcyBtYWtlIGxpZ2h0IHdvcmsu" * 8 + "==",
        "hexadecimal": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "long number": "3" + "1415926535897932384626433832795028841971" * 20,
        "digits of other scripts": "٠١٢٣٤٥٦٧٨٩ ०१२३ ๐๑๒ 〇一二三 𝟘𝟙𝟚",
        "punctuation": "!?!?...---___***///\\\\\\|||~~~```'''\"\"\"((([[[{{{<<<>>>}}}]]])))",
        "quotes and dashes": "“curly” ‘single’ „low“ «guillemets» – — ― … ′ ″",
        "very long word": "pneumono" + "ultramicroscopicsilico" * 400 + "volcanoconiosis",
        "very long URL": "https://example.org/" + "a1-b2_c3/" * 300 + "?q=" + "%20" * 200,
        "one line, long": "the cat sat on the mat and " * 200,
        "repeats with one change": "tick " * 500 + "tock " + "tick " * 500,
        "every code point of a block": "".join(map(chr, range(0x0400, 0x0530))),
        "random letters": _random_letters(2000),
        "one character, many times": "a" * long,
        "one newline, many times": "\n" * min(long, 20_000),
        "one emoji, many times": "🙂" * min(long, 5_000),
    }


def nasty_bytes() -> dict[str, bytes]:
    """Byte strings by name; most are not UTF-8."""
    return {
        "empty bytes": b"",
        "UTF-8": "plain text, given as bytes: é".encode(),
        "Latin-1": "café, naïve, Zoë".encode("latin-1"),
        "UTF-16": "two bytes each".encode("utf-16"),
        "UTF-32": "four bytes each".encode("utf-32-be"),
        "Shift JIS": "漢字かな".encode("shift_jis"),
        "every byte": bytes(range(256)),
        "every byte, backwards": bytes(range(255, -1, -1)),
        "cut in a character": "ends in half an é".encode()[:-1],
        "overlong slash": b"a\xc0\xafb",
        "encoded surrogate": b"a\xed\xa0\xbdb",
        "past the last code point": b"\xf4\x90\x80\x80",
        "lone continuation bytes": b"\x80\xbf text \x80",
        "gzip header": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        "zeros": bytes(1000),
    }


def _random_letters(count: int) -> str:
    """Letters without any pattern that a model could know, the same on every machine."""
    state, letters = 1, []
    for _ in range(count):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        letters.append(chr(97 + (state >> 33) % 26))
    return "".join(letters)
