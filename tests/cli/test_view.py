"""``ztok view``: what is on the page, that no text breaks it, and how it is used."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from tests.cli import chromium
from tests.cli.conftest import TEXT, assert_mistake
from ztok_fast.cli import view
from ztok_fast.cli.measure import measure
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.slots import written_tokens
from ztok_fast.evaluation.evaluate import evaluate

NASTY = (
    "</script><script>window.hacked = 1</script><!-- <img src=x onerror='window.hacked = 1'> "
    '"&amp;" @@DATA@@ \\u003c \u2028\u2029\x00\x1b\u202e\ufeff\x7f tab\there\r\n' + TEXT
).encode() + b"\xff\xfe end \xe2\x82\n"


@pytest.fixture(scope="module")
def slots_folder(tmp_path_factory, base_folder):
    """A codec of slots with random weights: it guesses little, so high ratios come back wrong."""
    folder = tmp_path_factory.mktemp("codecs") / "slots"
    torch.manual_seed(3)
    base = load_base(str(base_folder))
    config = ZTokConfig(
        base_model="tiny",
        base_fingerprint=base.fingerprint,
        emission="slots",
        segment_length=16,
        num_codebooks=3,
        codebook_size=base.model.get_input_embeddings().weight.shape[0],
        max_unit_length=16,
        lora_rank=2,
    )
    ZTokCodec(base, config).save_pretrained(folder)
    shutil.copytree(base_folder, folder / "base")
    return folder


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory, slots_folder):
    """The page of `NASTY` by the codec of slots at the ratios 2, 4 and 8."""
    from ztok_fast.cli.main import main

    folder = tmp_path_factory.mktemp("pages")
    source = folder / "a <b> & 'c' \u2028.txt"
    source.write_bytes(NASTY)
    arguments = [str(source), "-o", str(folder / "page.html"), "-r", "4", "2", "8", "4", "--codec", str(slots_folder)]
    assert main(["view", *arguments]) == 0
    return folder / "page.html"


class Scripts(HTMLParser):
    """The scripts of a page as a browser cuts them, and every attribute that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts, self.loads, self.title, self._inside = [], [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag in ("link", "img", "iframe", "base", "object", "embed") or {"src", "href"} & {a for a, _ in attributes}:
            self.loads.append((tag, attributes))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data


def data_of(path) -> dict:
    return json.loads(Scripts(path.read_text(encoding="utf-8")).scripts[0])


@pytest.mark.parametrize("kind", ["slots", "pooled"])
def test_the_page_holds_what_measure_found(ztok, tmp_path, kind, slots_folder, codec_folder):
    folder = slots_folder if kind == "slots" else codec_folder
    (tmp_path / "a.txt").write_text(TEXT, newline="")
    result = ztok("view", tmp_path / "a.txt", "-o", tmp_path / "v.html", "--ratio", 2, 8, "--codec", folder)
    assert result.status == 0 and result.out.startswith(f"{tmp_path / 'v.html'}: ")
    data, codec = data_of(tmp_path / "v.html"), ZTokCodec.from_pretrained(folder)
    assert "".join(data["tokens"]) == TEXT and data["kind"] == kind and data["notices"] == []
    assert [own["ratio"] for own in data["ratios"]] == [2, 8]
    for own in data["ratios"]:
        m = measure(codec, TEXT, own["ratio"])
        assert len(data["tokens"]) == len(data["bits"]) == len(m.tokens) == sum(own["lengths"])
        assert own["lengths"] == m.unit_lengths
        assert max(abs(a - b) for a, b in zip(data["bits"], m.surprisal.tolist())) <= 0.051
        assert {int(index) for index in own["instead"]} == {i for i, wrong in enumerate(m.wrong) if wrong}
        numbers = dict(zip([name for name, _ in data["numbers"]], own["numbers"]))
        assert numbers["Z-tokens"] == str(m.z.ztokens) and numbers["plain rate"] == f"{m.z.rate:.2f}"
        assert numbers["own bits H₀"] == f"{m.base_bits:.2f}" and numbers["efficiency η"] == f"{m.efficiency:.2f}"
        assert numbers["residual bits"] == f"{m.residual_bits:.2f}"
        assert numbers["free-running"] == f"{100 * m.free_running:.1f} %"
        if kind == "slots":
            starts = [sum(own["lengths"][:unit]) for unit in range(len(own["lengths"]))]
            named = {
                start + place: code
                for start, codes, places in zip(starts, own["codes"], own["places"])
                for code, place in zip(codes, places)
            }
            told = written_tokens(m.z).tolist()
            assert named == {i: token for i, token in enumerate(told) if token >= 0} and m.guessed == [
                t < 0 for t in told
            ]
            assert numbers["told"] == f"{100 * len(named) / len(told):.1f} %"
            assert all(m.tokens[i] == token for i, token in named.items())
        else:
            assert own["codes"] == m.z.codes.tolist() and own["places"] is None and all(m.guessed)
            assert numbers["told"] == "-"


def test_bits_of_the_measurement_are_those_of_the_evaluation(slots_folder):
    codec = ZTokCodec.from_pretrained(slots_folder)
    m, found = measure(codec, TEXT, 4), evaluate(codec, [TEXT], ratio=4)
    assert 0 < m.residual_bits == pytest.approx(found.residual_bits, rel=1e-5)
    assert m.base_bits == pytest.approx(found.own_bits, rel=1e-5) and m.free_running == pytest.approx(
        found.free_running
    )
    assert m.z.rate == pytest.approx(found.plain_rate)
    assert m.efficiency == pytest.approx((m.base_bits - m.residual_bits) / m.z.rate)


def test_no_text_breaks_the_page(nasty_page):
    page = nasty_page.read_text(encoding="utf-8")
    parts = Scripts(page)
    assert len(parts.scripts) == 2 and parts.scripts[1].lstrip().startswith('"use strict"')
    assert parts.loads == [] and not re.search(r"https?:|@import|url\(", page)
    data = json.loads(parts.scripts[0])
    assert "".join(data["tokens"]) == NASTY.decode("utf-8", "replace")
    assert parts.scripts[0].isascii() and not set("<>&") & set(parts.scripts[0])
    assert data["name"] == "a <b> & 'c' \u2028.txt" and parts.title.startswith("a <b> & 'c' \ufffd.txt")
    assert [own["ratio"] for own in data["ratios"]] == [2, 4, 8]
    first_bad = NASTY.index(b"\xff")
    assert len(data["notices"]) == 1 and f"not UTF-8, from byte {first_bad}" in data["notices"][0]


def test_long_text_is_cut_with_a_notice(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat. 🙂 " * 40)
    result = tiny("view", tmp_path / "a.txt", "--tokens", 50, "--ratio", 4)
    data = data_of(tmp_path / "a.txt.html")
    total = len(tiny_tokens(tmp_path / "a.txt"))
    assert 45 <= len(data["tokens"]) <= 50 < total
    assert f"the first 50 of {total} tokens are shown" in data["notices"][0] and data["notices"][0] in result.err
    result = tiny("view", tmp_path / "a.txt", "--tokens", 0, "--ratio", 4)
    assert len(data_of(tmp_path / "a.txt.html")["tokens"]) == total and result.err == ""


def tiny_tokens(path) -> list[int]:
    from transformers import AutoTokenizer

    from tests.cli.conftest import TOKENIZER

    return AutoTokenizer.from_pretrained(TOKENIZER)(path.read_text(), add_special_tokens=False)["input_ids"]


def test_ratios_that_nobody_asked_for_are_those_that_the_codec_gives(tiny, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    tiny("view", tmp_path / "a.txt")
    # Its units have at most eight tokens.
    assert [own["ratio"] for own in data_of(tmp_path / "a.txt.html")["ratios"]] == [2, 4, 8]


def test_a_page_of_a_hundred_kilobytes_is_small():
    tokens, texts = 40_000, ["ab<"] * 40_000
    ratio = {
        "ratio": 2.0,
        "numbers": ["1.00"] * 10,
        "lengths": [2] * (tokens // 2),
        "codes": [[2000, 1999, 1998]] * (tokens // 2),
        "places": [[0, 1, 2]] * (tokens // 2),
        "instead": dict.fromkeys(range(tokens // 2), " word"),
    }
    data = {"name": "a", "tokens": texts, "bits": [10.5] * tokens, "ratios": [ratio] * 4}
    assert len(view.render(data)) < 6e6


def test_mistakes(ztok, tiny, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    assert_mistake(ztok("view", tmp_path / "none.txt"), "none.txt", "no such file")
    assert_mistake(ztok("view", tmp_path), "folder")
    assert_mistake(ztok("view", source, "-o", tmp_path / "v.txt"), "v.txt", "ends in .html")
    assert_mistake(ztok("view", source, "-o", "-"), "standard output")
    assert_mistake(ztok("view", "-"), "-o", ".html")
    assert_mistake(ztok("view", source, "--tokens", "-1"), "--tokens", "-1")
    assert_mistake(tiny("view", source, "--ratio", 2, 100), "ratio", "got 100")
    assert_mistake(tiny("view", source, "--ratio", "nan"), "ratio", "nan")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert_mistake(ztok("view", tmp_path / "empty.txt"), "empty")
    page = tmp_path / "page.html"
    page.write_text(TEXT)
    assert_mistake(ztok("view", page, "-o", page), "would be overwritten")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt", "page.html"]
    assert ztok("view", source, "--ratio", "two").status == 2


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.binary() is None:
        pytest.skip(f"needs a Chromium on the PATH, one of {', '.join(chromium.NAMES)}")
    with chromium.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(browser, nasty_page):
    browser.open(nasty_page)
    yield browser
    assert browser.errors == []


def marks(page) -> dict:
    """What is marked: the tokens of every unit, the positions of named and wrong tokens, what is selected."""
    return page.run(
        "(() => { const all = [...document.querySelectorAll('#text .t')];"
        " const at = (name) => all.flatMap((node, index) => node.classList.contains(name) ? [index] : []);"
        " return {lengths: [...document.querySelectorAll('#text .u')].map((unit) => unit.children.length),"
        " named: at('w'), wrong: at('x'), shown: document.getElementById('shown').textContent,"
        " spoken: document.getElementById('ratio').getAttribute('aria-valuetext'),"
        " numbers: [...document.querySelectorAll('#numbers td.now')].map((cell) => cell.textContent)} })()"
    )


def expected_marks(own: dict) -> dict:
    starts = [sum(own["lengths"][:unit]) for unit in range(len(own["lengths"]))]
    return {
        "lengths": own["lengths"],
        "named": [start + place for start, places in zip(starts, own["places"]) for place in places],
        "wrong": sorted(int(index) for index in own["instead"]),
        "shown": f"r = {own['ratio']:g}",
        "spoken": f"r = {own['ratio']:g}",
        "numbers": own["numbers"],
    }


def test_the_slider_moves_the_marks(opened, nasty_page):
    ratios = data_of(nasty_page)["ratios"]
    assert ratios[-1]["instead"], "a random model guesses wrong"
    opened.run("document.getElementById('ratio').focus()")
    for key, at in ((None, 0), ("ArrowRight", 1), ("End", 2), ("ArrowLeft", 1), ("Home", 0)):
        if key:
            opened.press(key)
        assert marks(opened) == expected_marks(ratios[at]), key


def test_the_text_is_shown_and_runs_nothing(opened, nasty_page):
    text = "".join(data_of(nasty_page)["tokens"])
    shown = opened.run("document.getElementById('text').textContent")
    for hidden in "\x00\x1b\r":
        text = text.replace(hidden, chr(0x2400 + ord(hidden)))
    for hidden in "\u2028\u2029\u202e\ufeff\x7f":
        text = text.replace(hidden, f"⟨U+{ord(hidden):04X}⟩")
    assert shown == text
    assert opened.run("typeof window.hacked") == "undefined"
    assert opened.run("performance.getEntriesByType('resource').length") == 0
    assert opened.run("document.querySelectorAll('img, script[src], link').length") == 0


def test_the_page_runs_no_other_script(browser, nasty_page, tmp_path):
    # Whatever got into the page, the browser would not run it: the policy names the page's own script by its hash.
    text = nasty_page.read_text(encoding="utf-8")
    (tmp_path / "a.html").write_text(text.replace("</body>", "<script>window.hacked = 1</script></body>"))
    browser.open(tmp_path / "a.html")
    assert browser.run("typeof window.hacked") == "undefined" and marks(browser)["lengths"]
    assert any("Content Security Policy" in str(error) for error in browser.errors)
    browser.errors.clear()


def test_units_by_keyboard_and_by_pointing(opened, nasty_page):
    own, tokens = data_of(nasty_page)["ratios"][2], data_of(nasty_page)["tokens"]
    opened.run("document.getElementById('ratio').focus()")
    opened.press("End")
    opened.run("document.querySelector('#text .u[tabindex=\"0\"]').focus()")
    detail = "document.getElementById('detail').innerText"
    selected = "[...document.querySelectorAll('#text .u')].indexOf(document.activeElement)"
    count = len(own["lengths"])
    for key, unit in (("ArrowRight", 1), ("End", count - 1), ("ArrowRight", count - 1), ("Home", 0), ("ArrowLeft", 0)):
        opened.press(key)
        assert opened.run(selected) == unit
        assert f"Z-token {unit + 1} of {count}" in opened.run(detail)
    starts = [sum(own["lengths"][:unit]) for unit in range(count)]
    wrong_units = [
        u for u in range(count) if any(str(starts[u] + i) in own["instead"] for i in range(own["lengths"][u]))
    ]
    after = [unit for unit in wrong_units if unit > 0]
    opened.press("n")
    assert opened.run(selected) == after[0]
    opened.press("n")
    assert opened.run(selected) == after[1]
    opened.press("p")
    assert opened.run(selected) == after[0]
    assert opened.run("document.querySelectorAll('#text .u[tabindex=\"0\"], #text .u[aria-selected=true]').length") == 1
    # Pointing at another unit shows its Z-token.
    unit = next(u for u in range(count) if own["codes"][u] and u != after[0] and tokens[starts[u]].strip().isalnum())
    opened.point_at(f"document.querySelectorAll('#text .u')[{unit}].firstChild")
    rows = opened.run(
        "[...document.querySelector('#detail table').tBodies[0].rows].map((row) =>"
        " [...row.cells].slice(1, 3).map((cell) => Number(cell.textContent)))"
    )
    assert f"Z-token {unit + 1} of {count}" in opened.run(detail)
    assert rows == [list(pair) for pair in zip(own["codes"][unit], own["places"][unit])]
    label = opened.run(f"document.querySelectorAll('#text .u')[{unit}].getAttribute('aria-label')")
    assert label.startswith(f"Unit {unit + 1}: “") and f"{len(own['codes'][unit])} named" in label


def test_a_long_text_is_laid_out_in_blocks(browser, nasty_page, tmp_path):
    data = data_of(nasty_page)
    lines = [f"line {line} of a long text\n" for line in range(2000)]
    data["tokens"], data["bits"] = [part for line in lines for part in (line[:5], line[5:])], [2.0] * 4000
    own = data["ratios"][0]
    own |= {"lengths": [2] * 2000, "codes": [[7]] * 2000, "places": [[1]] * 2000, "instead": {"3999": "x"}}
    data["ratios"] = [own]
    (tmp_path / "long.html").write_text(view.render(data))
    browser.open(tmp_path / "long.html")
    assert browser.run("document.getElementById('text').textContent") == "".join(lines)
    assert browser.run("document.querySelectorAll('#text > .b').length") == 4000 / 300 // 1 + 1
    assert browser.run("document.getElementById('ratio').disabled")
    browser.run("document.querySelector('#text .u').focus()")
    browser.press("n")
    assert browser.run("document.activeElement === [...document.querySelectorAll('#text .u')].at(-1)")
    top, bottom = browser.run("((r) => [r.top, r.bottom])(document.activeElement.getBoundingClientRect())")
    assert 0 <= top < bottom <= browser.run("innerHeight")
    assert browser.errors == []


def test_what_was_written_instead(opened, nasty_page):
    own = data_of(nasty_page)["ratios"][2]
    opened.run("document.getElementById('ratio').focus()")
    opened.press("End")
    index, text = next((i, t) for i, t in own["instead"].items() if t.strip().isalnum() and t.isascii())
    token = f"document.querySelectorAll('#text .t')[{index}]"
    assert opened.run(f"{token}.title") == f"wrong: “{text}” was written instead"
    assert opened.run(f"getComputedStyle({token}).textDecorationStyle") == "wavy"
    width = f"(opened => opened.getBoundingClientRect().width)({token})"
    mark = f"getComputedStyle({token}, '::after').content"
    narrow = opened.run(width)
    assert opened.run(mark).startswith('"✗"') and "instead" not in opened.run(mark)
    opened.press("Tab")
    opened.press(" ")
    assert opened.run(f"{token}.dataset.instead") == f"“{text}”"
    assert "attr(data-instead)" in opened.run(mark) or text in opened.run(mark)
    assert opened.run(width) > narrow, "the mark holds the other token"
    came_back = [own["instead"].get(str(i), token) for i, token in enumerate(data_of(nasty_page)["tokens"])]
    assert "".join(came_back[-8:]) in opened.run("document.getElementById('back').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(opened, scheme):
    opened.prefer(scheme)
    colours = opened.run(
        "(() => { const style = getComputedStyle(document.documentElement); const found = {};"
        " for (const name of ['page', 'ink', 'quiet', 'panel', 'now', 'line', 'wrong', 'focus',"
        " ...[...Array(8).keys()].map((at) => 's' + at)]) found[name] = style.getPropertyValue('--' + name).trim();"
        " return found })()"
    )
    assert (luminance(colours["page"]) > 0.5) == (scheme == "light")
    for at in range(8):
        assert contrast(colours["ink"], colours[f"s{at}"]) >= 4.5, at
        assert contrast(colours["wrong"], colours[f"s{at}"]) >= 3, at
        assert contrast(colours["line"], colours[f"s{at}"]) >= 3, at
    levels = [contrast(colours["page"], colours[f"s{at}"]) for at in range(8)]
    assert levels == sorted(levels) and levels[-1] > 2
    for behind in ("page", "panel", "now"):
        assert contrast(colours["ink"], colours[behind]) >= 7 and contrast(colours["quiet"], colours[behind]) >= 4.5
    assert contrast(colours["focus"], colours["page"]) >= 3
    shown = opened.run("getComputedStyle(document.body).backgroundColor")
    assert [int(part) for part in re.findall(r"\d+", shown)] == list(bytes.fromhex(colours["page"][1:]))


def luminance(colour: str) -> float:
    parts = [value / 255 for value in bytes.fromhex(colour[1:])]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
