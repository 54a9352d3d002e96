"""The documents: every link leads somewhere, and both languages say the same."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")]
NOTEBOOKS = [*ROOT.glob("docs/**/*.ipynb")]
ENGLISH = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
CODE_BLOCK = re.compile(r"^ *```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)


def name(page):
    return page.relative_to(ROOT).as_posix()


def translation(page):
    """Return the Japanese page for an English one."""
    if page.parent == ROOT:
        return page.with_suffix(".ja.md")
    return page.parent / "ja" / page.name


def in_japanese(target, page):
    """Return where the Japanese page must link to for a link of the English `page`."""
    if target == translation(page):  # each page links to itself in the other language
        return page
    if isinstance(target, Path) and translation(target).exists():
        return translation(target)
    return target


def read(page):
    """Return the text of a page, or that of a notebook's cells that are text."""
    text = page.read_text(encoding="utf-8")
    if page in NOTEBOOKS:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def code_blocks(page):
    """Return (language, lines without comments) of each code block."""
    blocks = CODE_BLOCK.findall(read(page))
    return [
        (language, [re.sub("(^|  )#.*", "", line).strip() for line in code.splitlines()])
        for language, code in blocks
    ]


def table_numbers(page):
    """Return the numbers in each row of the tables, in no order: that of the words may differ."""
    rows = [line for line in read(page).splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"[+-]?(?:± )?\d+(?:[.,]\d+)*", row)) for row in rows]


def links(page):
    """Return (path, anchor), or (URL, ""), for each link outside of code blocks."""
    text = CODE_BLOCK.sub("", read(page))
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)|<(https?://[^>]+)>", text)
    found = []
    for target in map("".join, targets):
        if target.startswith("http"):
            found.append((target, ""))
        else:
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page):
    """Return the anchors that GitHub makes of a page's headings, or Jupyter of a notebook's."""
    headings = re.findall("^#+ (.+)$", CODE_BLOCK.sub("", read(page)), re.MULTILINE)
    if page in NOTEBOOKS:
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        if isinstance(target, Path):
            assert target.exists(), target
            assert not anchor or anchor in anchors(target), f"{name(target)}#{anchor}"


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_both_languages_say_the_same(page):
    other = translation(page)
    assert code_blocks(page) == code_blocks(other)
    assert table_numbers(page) == table_numbers(other)
    expected = Counter(in_japanese(target, page) for target, _ in links(page))
    assert expected == Counter(target for target, _ in links(other))
