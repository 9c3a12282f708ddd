"""README and the papers' cards have the form that CONTRIBUTING promises, and say what the stored results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cards import ROOT, stored

SECTIONS = [
    "Where it is in the code",
    "Use it in your code",
    "Commands",
    "Claim",
    "Measured here",
    "Differences from the authors",
    "Data",
    "Limits",
]
CARDS = sorted(path.parent.name for path in ROOT.glob("*/README.md") if (path.parent / "__init__.py").is_file())


def problems(card: str, paper: str) -> list[str]:
    """What of the form of a card is missing."""
    found = []
    opening, *parts = re.split(r"^## ", card, flags=re.M)
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}
    if list(sections) != SECTIONS:
        found.append(f"sections are {list(sections)}")
    if not 80 <= len(card.splitlines()) <= 150:
        found.append(f"{len(card.splitlines())} lines")
    if not opening.startswith("# ") or not re.search(r"^!\[.+\]\(.+\)$", opening, flags=re.M):
        found.append("idea and image do not open it")
    rows = [line for line in sections.get(SECTIONS[0], "").splitlines() if line.startswith("| ")]
    if len(rows) < 3 or "read first" not in rows[1 if rows[1:2] and "---" not in rows[1] else 2]:
        found.append("the first row of its first table does not say which file opens the idea")
    for name in re.findall(r"`((?:[a-z_]+/)[^` ]*|[a-z_]+\.py)`", "\n".join(rows)):
        if not all((ROOT / paper / one).exists() for one in spelled_out(name)):
            found.append(f"there is no {name}")
    first = re.search(r"^```sh\n(\S.*?)(?:  |$)", sections.get("Commands", ""), flags=re.M)
    if first is None or first[1] != ("make demo" if paper == "stvit" else f"make demo PAPER={paper}"):
        found.append("its commands do not begin with the demo")
    if not re.search(r"^\| --- ", sections.get("Claim", ""), flags=re.M) or "hold" not in sections["Claim"]:
        found.append("its claim has no table or no verdict")
    return found


def spelled_out(name: str) -> list[str]:
    """`models/{vit,tokens}.py` -> both files."""
    before, brace, rest = name.partition("{")
    inner, _, after = rest.partition("}")
    return [f"{before}{one}{after}" for one in inner.split(",")] if brace else [name]


@pytest.mark.parametrize("paper", CARDS)
def test_form_of_a_card(paper: str) -> None:
    assert not problems((ROOT / paper / "README.md").read_text(), paper)


def test_a_card_of_another_form_is_noticed() -> None:
    card = (ROOT / "stvit" / "README.md").read_text()
    wrong = {
        "\n## Data\n": "\n## Data sets\n",
        "](glyphs.png)": "] (glyphs.png)",
        "read first": "read it",
        "models/tokens.py": "models/tokns.py",
        "make demo ": "make demos ",
        "hold": "stand",
        "\n## Limits\n": "\n## Limits\n" + "\n" * 80,
    }
    for old, new in wrong.items():
        assert old in card
        assert problems(card.replace(old, new), "stvit"), new


@pytest.mark.parametrize("paper", CARDS)
def test_links_and_images_of_cards_exist(paper: str) -> None:
    folder = ROOT / paper
    for file in [folder / "README.md", ROOT / "results" / f"{paper.upper()}.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", file.read_text() if file.is_file() else ""):
            assert (file.parent / link).exists(), f"{file.relative_to(ROOT)}: {link}"


def test_readme_is_short_and_says_of_every_paper_whether_it_is_done_and_its_claim_holds() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    rows = re.findall(r"^\| ([a-z_0-9]+) \| .+ \| (.+) \|$", text, flags=re.M)
    rows = [row for row in rows if row[0] != "package"]
    assert len(rows) == 10
    for paper, state in rows:
        if paper not in CARDS:
            assert state == "planned"
            continue
        holds = stored(f"claims/{paper}")["holds"]
        words, link = re.fullmatch(r"(.+) \(\[card\]\((.+)\)\)", state).groups()
        assert words.startswith(f"done; its claim {holds}") and Path(link) == Path(paper, "README.md")
    assert {paper for paper, _ in rows} >= set(CARDS)
