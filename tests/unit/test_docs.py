"""What the documentation names exists: links, files, verbs of the Makefile."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = ROOT / "megatron_muloco"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`((?:\.\./)?(?:configs|tools|launch|docs|tests|requirements)/[^`\s]*)`")
COMMAND_PATH = re.compile(r"(?<![\w/.-])((?:configs|tools|launch)/[\w./-]+\.(?:yaml|py|sbatch))")
SOURCE_PATH = re.compile(r"`((?:megatron_muloco/)?[a-z_]+/[a-z_]+\.py)`")
MAKE = re.compile(r"\bmake ([a-z][a-z0-9-]*(?:\|[a-z]+)*)")
# A bare word after "make" is prose; a verb is written in backticks, or begins a line of a block.
IN_CODE = re.compile(r"`[^`\n]+`|^```.*?^```", re.MULTILINE | re.DOTALL)
# Homes, scratch directories and mounts of whoever wrote the page.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|work|tmp|mnt|Users)/[\w.]+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text: str) -> Iterator[str]:
    """Yield what is written as code, fenced or between backticks."""
    return (match.group() for match in IN_CODE.finditer(text))


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that a viewer makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            broken.append(target)
    assert not broken


@pages
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*NAMED_PATH.findall(text), *COMMAND_PATH.findall(text)}
    missing = [name for name in sorted(named) if not any(ROOT.glob(name.rstrip("/.,")))]
    assert not missing


@pages
def test_named_modules_exist(page: Path) -> None:
    named = set(SOURCE_PATH.findall(page.read_text(encoding="utf-8")))
    places = (ROOT, SOURCES)
    assert not [name for name in sorted(named) if not any((p / name).is_file() for p in places)]


@pages
def test_named_verbs_are_in_the_makefile(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    spans = code(page.read_text(encoding="utf-8"))
    verbs = {verb for span in spans for names in MAKE.findall(span) for verb in names.split("|")}
    assert not verbs - targets


@pages
def test_no_path_of_one_machine(page: Path) -> None:
    assert not MACHINE_PATH.findall(page.read_text(encoding="utf-8"))


def test_every_page_is_on_the_map() -> None:
    docs = ROOT / "docs"
    listed = {
        (docs / target.partition("#")[0]).resolve()
        for target in LINK.findall((docs / "README.md").read_text(encoding="utf-8"))
    }
    on_disk = {page.resolve() for page in docs.rglob("*.md")} - {docs / "README.md"}
    # Result pages of measurements are reached through the pages that use them.
    results = {page for page in on_disk if page.parent.name == "performance"}
    assert not on_disk - listed - results


def test_methods_in_the_readme_are_those_shipped() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"paper"}
    assert not [run for run in sorted(runs) if run not in readme]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
