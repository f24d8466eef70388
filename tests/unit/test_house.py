"""The package keeps the limits of `tools/house_report.py`, and that report counts as it says."""

from pathlib import Path

import pytest

from tools.house_report import Measure, Module, Sources, measures, read_sources

REPORT = measures(read_sources())


@pytest.mark.parametrize("measure", REPORT, ids=lambda measure: measure.name)
def test_the_package_keeps_its_limits(measure: Measure) -> None:
    assert measure.holds, "\n".join([str(measure), *measure.culprits])


def house(tmp_path: Path, **files: str) -> Sources:
    """Write a package; ``outer__guard`` is the file ``outer/guard.py``."""
    for name, text in files.items():
        path = tmp_path / "house" / Path(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return read_sources(tmp_path / "house")


def value(sources: Sources, name: str) -> float:
    return next(measure.value for measure in measures(sources) if name in measure.name)


def test_files_that_are_no_modules_are_not_counted(tmp_path: Path) -> None:
    sources = house(tmp_path, a__x="X = 1\n", a__y="Y = 1\n\nZ = 2\n", b__z="def f(): ...\n")
    assert value(sources, "modules") == 3
    assert value(sources, "median module") == 1
    assert value(sources, "largest module") == 3


def test_importers_are_found_through_exports_and_inside_functions(tmp_path: Path) -> None:
    sources = house(
        tmp_path,
        a__x="X = 1\n",
        a__y="Y = 1\n",
        b__z="from house.a import X\n\ndef f():\n    from house.a import y\n",
    )
    exporting = Module("a", True, "from house.a.x import X\n")
    public = Module("", True, "from house.b.z import f\n")
    others = [file for file in sources.files if not file.is_init]
    sources = Sources("house", [exporting, public, *others])
    assert sources.importers == {"a.x": {"b.z"}, "a.y": {"b.z"}, "b.z": {""}}
    small = next(m for m in measures(sources) if "one importer" in m.name)
    assert small.value == round(200 / 3, 1)  # b.z is public
    assert "a.x (1 lines) is imported by b.z alone" in small.culprits


def test_packages_that_import_each_other_around_a_third_are_a_cycle(tmp_path: Path) -> None:
    line = "def f():\n    from house.{} import g\n"
    files = {"a__x": line.format("b.x"), "b__x": line.format("c"), "c": line.format("a.x")}
    cycles = next(m for m in measures(house(tmp_path, **files)) if "cycles" in m.name)
    assert (cycles.value, cycles.holds) == (1, False)
    assert list(cycles.culprits) == ["a -> b (a.x)", "b -> c (b.x)", "c -> a (c)"]
    straight = house(tmp_path, **(files | {"c": "def f(): ...\n"}))
    assert value(straight, "cycles") == 0


def test_functions_are_measured_with_their_docstrings(tmp_path: Path) -> None:
    inner = "    def g():\n        '''Do.\n\n        Much.\n        '''\n"
    sources = house(tmp_path, a__x=f"def f():\n{inner}\n@property\nasync def h(): ...\n")
    assert [lines for _, lines in sources.modules[0].functions()] == [6, 1, 5]
    assert value(sources, "longest function") == 6


def test_comments_are_counted_where_they_say_something() -> None:
    text = "\n".join(
        [
            "# ----------------------",
            "# ---- the mean ---------",
            "# Sums are fp32: bf16 would lose the small replicas.",
            "#",
            "a = 1  # paper, equation 3",
            "",
            "b = '# no comment'  # noqa: E501",
            "c = 2  # type: ignore[misc]",
        ]
    )
    module = Module("outer.x", False, text)
    assert (module.comment_lines(), module.filled_lines()) == (2, 7)


@pytest.mark.parametrize(
    ("docstring", "riddle"),
    [
        ("Outer guard: the weight of a replica.", False),
        ("Checks after each outer step that anchors agree. What differs is named.", False),
        ("Isolates replicas.", False),
        ("Ranks: which is which?", True),
        ("What a rank holds.", True),
        ("", True),
    ],
)
def test_first_sentences_that_are_riddles_are_found(
    docstring: str, riddle: bool, tmp_path: Path
) -> None:
    sources = house(tmp_path, a__x=f'"""{docstring}"""\n\ndef f(): ...\n')
    found = next(m for m in measures(sources) if "riddle" in m.name)
    assert any(line.startswith("a.x:") for line in found.culprits) == riddle
