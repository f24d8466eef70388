"""Documents from docstrings and from Debian packages."""

import sys
import textwrap

import pytest

from megatron_muloco.errors import ConfigError
from tools.corpora.debian import (
    SOURCES,
    dictionary_documents,
    gloss_documents,
    real_package,
)
from tools.corpora.docstrings import collect, definitions, is_held_out, package_versions

LONG = "A sentence that is long enough to count as prose in a document. "


def module(source):
    return definitions(textwrap.dedent(source))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two small packages on the path, with a repeated docstring and a directory of tests."""
    for name in ("alpha", "beta"):
        root = tmp_path / name
        (root / "tests").mkdir(parents=True)
        (root / "__init__.py").write_text(f'"""{LONG} Package {name}."""\n')
        (root / "tests" / "test_it.py").write_text(f'"""{LONG} Never read."""\n')
        (root / "broken.py").write_text(f'"""{LONG}"""\ndef f(:\n')
        (root / "many.py").write_text(
            f'def copied():\n    """{LONG} The same in both."""\n'
            + "".join(f'def f{i}(x):\n    """{LONG * 20}{name} {i}."""\n' for i in range(40))
        )
    monkeypatch.syspath_prepend(tmp_path)
    return ["alpha", "beta"]


def test_definitions_are_headed_by_dotted_names_and_arguments():
    (pieces,) = module(f'''
        """{LONG}module"""
        class Outer:
            """{LONG}class"""
            def method(self, first, second=2):
                """{LONG}method"""
        if True:
            def function(value):
                """{LONG}function"""
    ''')
    assert [heading for heading, _ in pieces] == [
        "",
        "class Outer",
        "Outer.method(first, second)",
        "function(value)",
    ]


def test_short_definitions_share_a_document_and_long_ones_do_not():
    short = "".join(f'def f{i}():\n    """{LONG}{i}"""\n' for i in range(3))
    long = "".join(f'def g{i}():\n    """{LONG * 20}{i}"""\n' for i in range(3))
    assert [len(pieces) for pieces in definitions(short)] == [3]
    assert [len(pieces) for pieces in definitions(long)] == [1, 1, 1]


@pytest.mark.parametrize("source", ["def f(:", "x = 1", '"""short"""', "\0"])
def test_source_without_prose_has_no_documents(source):
    assert definitions(source) == []


def test_collect_skips_tests_and_repeats_and_splits_by_text(packages):
    found = collect(packages, held_out_fraction=0.3, workers=1)
    texts = [doc.text for doc in (*found.train, *found.held_out)]
    assert len(texts) == len(set(texts)) == 82  # in each package 40 functions and its own docstring
    assert not any("Never read" in text for text in texts)
    assert sum("The same in both" in text for text in texts) == 1
    assert all(is_held_out(doc.text, 0.3) for doc in found.held_out)
    assert 5 < len(found.held_out) < 45  # binomial(82, 0.3): mean 25, standard deviation 4


def test_collect_is_the_same_twice_and_for_any_number_of_processes(packages):
    one, two = collect(packages, workers=1), collect(packages, workers=2)
    assert one == two
    assert one.versions == {"alpha": "unknown", "beta": "unknown"}


def test_digest_depends_on_the_text(packages):
    assert collect(packages, workers=1).digest != collect(packages[:1], workers=1).digest


def test_growing_held_out_fraction_only_moves_documents_there(packages):
    few, more = (collect(packages, held_out_fraction=f, workers=1) for f in (0.1, 0.5))
    assert set(few.held_out) <= set(more.held_out)


def test_missing_package_is_named():
    with pytest.raises(ConfigError, match="no_such_package"):
        collect(["no_such_package"], workers=1)


def test_versions_of_real_packages():
    versions = package_versions(["stdlib", "numpy", "megatron"])
    assert versions["stdlib"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert all(version != "unknown" for version in versions.values())


def test_dictionary_entries_are_grouped_without_edition_marks():
    text = "Abjure\n   To renounce.\n   [1913 Webster]\n\n   2. To reject.\n\nAble\n   Fit.\n"
    (document,) = dictionary_documents(text)
    assert document == ("Abjure\n   To renounce.\n   2. To reject.\n\nAble\n   Fit.")
    assert len(list(dictionary_documents(text * 30))) > 1


def test_glosses_name_every_word_of_the_synset():
    lines = [
        "  1 This software and database is being provided | licence\n",
        "00001740 00 a 02 able_bodied 0 fit(p) 1 001 = 05200169 n 0000 | (usually) with means  \n",
    ]
    assert list(gloss_documents(lines)) == ["able bodied, fit: (usually) with means"]


def test_versioned_package_is_found_through_the_one_that_depends_on_it():
    python, linux, dictionary, _ = SOURCES
    assert real_package(python, "python3-doc\n  Depends: python3.11-doc\n") == "python3.11-doc"
    assert real_package(linux, "linux-doc\n  Depends: linux-doc-6.1\n") == "linux-doc-6.1"
    assert real_package(dictionary, "") == "dict-gcide"
    assert real_package(python, "python3-doc\n  Depends: libjs-sphinxdoc\n") is None
