"""What the documentation names exists: links, files, commands, config keys, metrics."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Read by the code host alone; `mkdocs.yml` excludes it from the site.
TEMPLATE = ROOT / "docs/pull_request_template.md"
SOURCES = ROOT / "megatron_muloco"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`((?:\.\./)?(?:configs|tools|launch|docs|tests|requirements)/[^`\s]*)`")
COMMAND_PATH = re.compile(r"(?<![\w/.-])((?:configs|tools|launch)/[\w./-]+\.(?:yaml|py|sbatch))")
SOURCE_PATH = re.compile(r"`((?:megatron_muloco/)?[a-z_]+/[a-z_]+\.py)`")
MAKE = re.compile(r"\bmake ([a-z][a-z0-9-]*(?:\|[a-z]+)*)")
# A bare word after "make" is prose; a verb is written in backticks, or begins a line of a block.
IN_CODE = re.compile(r"`[^`\n]+`|^```.*?^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SECTIONS = "model|parallel|data|training|inner|outer|checkpoint|monitor"
CONFIG_KEY = re.compile(rf"`((?:{SECTIONS})(?:\.(?!py`)[a-z_]+)+)(?:[:=][^`]*)?`")
METRIC = re.compile(r"`((?:muloco|muon|perf)/[a-z_]+)`")
OPTION = re.compile(r"--[a-z][\w-]*")
# Homes, scratch directories and mounts of whoever wrote the page.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|work|tmp|mnt|Users)/[\w.]+")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text: str) -> Iterator[str]:
    """Yield what is written as code, fenced or between backticks."""
    return (match.group() for match in IN_CODE.finditer(text))


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that a viewer makes from the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command that runs a tool, the launcher or a job template."""
    for span in code(text):
        lines = span.strip("`").replace("\\\n", " ")
        # Between backticks a command may be wrapped; in a block every line is one.
        for line in lines.splitlines() if span.startswith("```") else [" ".join(lines.split())]:
            if re.match(r"(\$ )?(sudo )?(\S*python |deepspeed |sbatch )", line):
                yield shlex.split(line.removeprefix("$ "), comments=True)


def script_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the script of this repository that a command runs, and the words after it."""
    for index, word in enumerate(words):
        if re.fullmatch(r"(tools|launch)/\S+\.(py|sbatch)", word):
            return ROOT / word, words[index + 1 :]
        if word == "-m" and words[index + 1].startswith("tools."):
            module = ROOT / words[index + 1].replace(".", "/")
            package = module / "__main__.py"
            return package if package.exists() else module.with_suffix(".py"), words[index + 2 :]
    return None, []


def options_of(script: Path) -> set[str]:
    """Return the options that a script declares, read from its source: nothing is imported."""
    if script.name == "pretrain.py" or script.suffix == ".sbatch":  # shims of the program
        script = SOURCES / "training/main.py"
    calls = [node for node in ast.walk(ast.parse(script.read_text("utf-8"))) if is_call(node)]
    arguments = [argument for call in calls for argument in call.args]
    texts = [each.value for each in arguments if isinstance(each, ast.Constant)]
    return {text for text in texts if isinstance(text, str) and OPTION.fullmatch(text)} | {"--help"}


def is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a node is a call."""
    return isinstance(node, ast.Call)


def config_keys() -> set[str]:
    """Return every key of the configuration reference, and the sections on the way to it."""
    reference = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"^\| `([a-z_.]+)`", reference, re.MULTILINE))
    return keys | {key.rpartition(".")[0] for key in keys}


@pages
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
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
def test_commands_name_existing_scripts_and_options(page: Path) -> None:
    wrong = []
    for words in commands(page.read_text(encoding="utf-8")):
        script, rest = script_of(words)
        if script is None:
            continue
        if not script.is_file():
            wrong.append(" ".join(words))
            continue
        given = {word.partition("=")[0] for word in rest if OPTION.match(word)}
        wrong += [f"{script.name} {option}" for option in sorted(given - options_of(script))]
    assert not wrong


@pages
def test_config_keys_and_metrics_are_in_the_reference(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(CONFIG_KEY.findall(text))
    for words in commands(text) if page.name != "errors.md" else ():  # it shows what is refused
        named |= {word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)}
    assert not sorted(named - config_keys())
    if page.name == "CHANGELOG.md" or page.parent.name == "decisions":  # they name what was
        return
    metrics = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
    assert not [tag for tag in sorted(set(METRIC.findall(text))) if f"`{tag}`" not in metrics]


@pages
def test_no_path_of_one_machine(page: Path) -> None:
    assert not MACHINE_PATH.findall(page.read_text(encoding="utf-8"))


@pages
def test_prose_fits_100_columns_and_lists_stand_apart(page: Path) -> None:
    # The site's Markdown starts a list only after a blank line or another item; in a fence or a
    # table, lines are as long as they have to be. Pages of measurements are written by tools.
    if page.parent == ROOT or page.parent.name in ("performance", "reference"):
        return
    text = FENCE.sub("```", page.read_text(encoding="utf-8"))
    wrong, before = [], ""
    for line in text.splitlines():
        item = re.match(r"(- |\d+\. )", line)
        if item and before and not re.match(r"(- |\d+\. |  )", before):
            wrong.append(line)
        if len(line) > 100 and not line.lstrip().startswith("|"):
            wrong.append(line)
        before = line
    assert not wrong


def test_every_page_is_on_the_map() -> None:
    docs = ROOT / "docs"
    listed = {
        (docs / target.partition("#")[0]).resolve()
        for target in LINK.findall((docs / "README.md").read_text(encoding="utf-8"))
    }
    on_disk = {page.resolve() for page in docs.rglob("*.md")} - {docs / "README.md", TEMPLATE}
    # Result pages of measurements are reached through the pages that use them.
    results = {page for page in on_disk if page.parent.name == "performance"}
    assert not on_disk - listed - results


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    # As text: a loader that knows the plug-ins' tags is not installed here.
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(site[site.index("\nnav:") :])["nav"]
    targets = set(re.findall(r"[\w./-]+\.md", str(nav)))
    on_disk = {
        str(path.relative_to(ROOT / "docs"))
        for path in (ROOT / "docs").rglob("*.md")
        if path != TEMPLATE
    }
    packages = {f"reference/api/{path.parent.name}.md" for path in SOURCES.glob("*/__init__.py")}
    assert targets == on_disk | packages


def test_the_glossary_has_every_word_once() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)
    repeated = {word for word in words if words.count(word) > 1} - {"word", "---"}
    assert not repeated


def test_methods_in_the_readme_are_those_shipped() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"paper"}
    assert not [run for run in sorted(runs) if run not in readme]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
