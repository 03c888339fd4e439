# SPDX-License-Identifier: Apache-2.0
"""Links between the documents lead somewhere, and every page of docs/ can be reached from the README."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# [text](target) and ![text](target); code is not looked at.
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the names that the headings of a page get."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files of ours that a page links to, each with the anchor in it or nothing."""
    found = []
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if not target.startswith(("https://", "http://", "mailto:")):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        assert target.exists(), f"{page.name} links to {target.relative_to(ROOT)}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to #{anchor}, which {target.name} has not"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        found = {target for target, _ in links(page) if target.suffix == ".md" and target.exists()}
        found |= {file for target, _ in links(page) if target.is_dir() for file in target.glob("*.md")}
        waiting += found - reached
    assert not [str(page.relative_to(ROOT)) for page in documents() if page not in reached]
