"""Retired words stay retired: one idea has one word in code, configs, tests and docs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = (
    "megatron_muloco", "launch", "tools", "configs", "docs", "tests",
    "README.md", "CONTRIBUTING.md", "Makefile",
)  # fmt: skip
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".sbatch", ""}
# Pages that tell what was, or that explain old words.
HISTORY = (
    "docs/decisions/0013", "docs/glossary.md", "docs/experiments/LOG.md",
    "tests/unit/test_vocabulary.py",
)  # fmt: skip


@dataclass(frozen=True)
class Retired:
    """A word that is no longer used.

    Attributes:
        pattern: What is searched for in file names and texts, in any case. A blank also stands for
            a line break, with the ``#`` of a comment after it; ``~`` joins two words by a blank,
            ``_``, ``-`` or nothing.
        use: The word to use, for the failure message.
        found: Texts that the pattern has to find.
        honest: Texts that it must leave alone.
        exact_case: Whether the case matters, as in a class name that is a common word elsewhere.
        places: Beginnings of the paths that are searched; everywhere by default.
    """

    pattern: str
    use: str
    found: tuple[str, ...]
    honest: tuple[str, ...] = ()
    exact_case: bool = False
    places: tuple[str, ...] = field(default=("",))

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        """Find the word in a text."""
        flags = 0 if self.exact_case else re.IGNORECASE
        pattern = self.pattern.replace(" ", r"[\s#]+").replace("~", r"[\s#_-]*")
        return re.finditer(pattern, text, flags)


# The ways of computing Newton-Schulz, and the parameters of Muon.
MUON = (
    "megatron_muloco/optim/", "docs/concepts/muon.md", "docs/performance/muon_step.md",
    "docs/performance/newton_schulz.md", "tools/bench/muon_step.py", "tools/bench/newton_schulz.py",
    "tests/unit/test_muon", "tests/unit/test_units", "tests/unit/test_newton_schulz",
)  # fmt: skip

RETIRED = (
    # Numbers sent with a launch.
    Retired(
        r"\briders?\b|(?<![a-z])riders?_|_riders?(?![a-z])",
        "metadata (of a replica), line values (of the console lines)",
        ("as riders", "pack_riders", "riders_per_line", "rider_count"),
        ("providers", "overrides"),
    ),
    Retired(r"(\bclass |: |-> )Shown\b|\bShown\(", "ReplicaMetadata", ("-> Shown:", "Shown(x)"),
            ("class. Shown here", "is shown"), exact_case=True),
    # Compression.
    Retired(
        r"\b_?(Code(Config|Spec|Stats|Report)|LaunchedCode)\b",
        "LossyCompression, CodecSpec, CompressionStats, CompressionReport, LaunchedCompression",
        ("CodeSpec", "LaunchedCode"), ("CodecSpec", "code"), exact_case=True,
    ),
    Retired(
        r"\bcodec_chooser\b|\b_?code_(words|name|sums|report|metrics|rows)\b",
        "codec_lookup, compression_...",
        ("codec_chooser", "_code_sums"),
        ("code name", "exit_code"),
    ),
    Retired(
        r"\b(lossy|without a|with a lossy|what a|with no) codes?\b(?! block)"
        r"|\bcodes? (loses?|lost)\b|\bcode of (the|a) mean\b",
        "compression, or codec (`codes` are the integers that it writes)",
        ("what a code loses", "a lossy code", "the code of the mean it owns"),
        ("codes of four bits", "exit code", "without a code block"),
    ),
    Retired(
        r"\b(Encoded|Gathered|Exact|AllReduce|ChunkOwner)Mean\b|\bEncodingReducer\b",
        "AllReduce, ChunkedAllReduce, CompressedAllReduce, CompressedAllGather, CompressedReducer",
        ("EncodedMean", "ChunkOwnerMean"), ("encoded mean",), exact_case=True,
    ),
    # Newton-Schulz and the exchange of its matrices.
    Retired(r"\bMuonSettings\b", "MuonConfig", ("MuonSettings",),
            ("settings of Muon",)),
    Retired(
        r"\b(choose|automatic)_?form\b|\.form\b|\bform(?=[:=])|optim[./]forms\b"
        r"|\b(plain|triangle|gram|symmetric|duplicated|which|two|both) forms?\b",
        "ns_impl, implementation",
        ("choose_form", "ChooseForm", "settings.form", "form: str", "symmetric forms", "form=f"),
        ("in the form of torch", "closed form", "uniform", "form by shape"),
        places=MUON,
    ),
    Retired(
        r"\blanes?\b|(?<![a-z])_?lanes?_|_lanes?(?![a-z])", "(exchange) bucket",
        ("Lane(", "self._lanes", "each lane"), ("planes", "plane_count"),
    ),
    Retired(
        r"\b(plan_paths|(unit|shard|owner)_segments|optim[./]segments)\b",
        "plan_routes, RoutingPlan, ..._routes", ("plan_paths", "unit_segments"), ("plan paths",),
    ),
    Retired(r"\bsegments?\b", "route", ("for segment in",), ("segmented",),
            places=("megatron_muloco/optim/", "tools/bench/muon_step.py", "tests/support/")),
    Retired(r"\boptim[./]units\b|\b(unit|units)_of\b|\bMuonUnits?\b", "matrices, MuonMatrix",
            ("optim/units.py", "optim.units"), ("optim. Units", "CodingUnit", "coding units")),
    Retired(r"\blibrary_steps\b", "nothing: it was deleted", ("library_steps.py",),
            ("library steps",)),
    # Reports.
    Retired(r"\btall(y|ies)\b|\btallied\b", "diagnostics", ("the tally",), ("totally",)),
    Retired(r"\btruth~reports?\b|\btruths\b|\bthe truth about\b", "parameter report",
            ("TruthReport", "truth_report", "two truths"), ("truth value", "in truth")),
    # Parameters that several ranks hold.
    Retired(
        r"\bduplicates?\b(?! keys?\b)|duplicate~broadcast|broadcast_duplicates"
        r"|\bduplicated param",
        "replicated parameter, is_primary, ReplicatedBroadcast",
        ("DuplicateBroadcast", "a duplicate", "param.duplicate", "duplicated parameters"),
        ("duplicated work", "duplicate keys"),
    ),
    Retired(r"\b(speaks?|spoken|spoke|speaking)~for\b", "primary rank, is_primary",
            ("speaks for them", "spoken_for"), ("speaks", "formats spoken")),
    Retired(r"\bholders?\b", "primary rank (of a replicated parameter), owner", ("its holder",),
            ("placeholder",),
            places=("megatron_muloco/comm/", "megatron_muloco/outer/", "megatron_muloco/optim/",
                    "docs/concepts/")),
    # Memory.
    Retired(r"\blen(ds?|t)\b|\blending\b", "returns_views, aliases", ("lends", "lent"),
            ("calendar", "lens", "silent")),
    Retired(r"\bborrow(s|ed|ing)?\b", "returns_views, aliases, views",
            ("is borrowed",), ("tomorrow",)),
    Retired(r"\bdef settle\b|\.settle\(|\bsettled fragments?\b", "wait_and_clone",
            ("handle.settle()", "settled fragments only"), ("SETTLE_SECONDS", "to settle")),
    Retired(r"\bpool\.(take|give)\b|\bin_flight\.take\b", "acquire, release; pop",
            ("pool.take(3)",), ("pool.map", "take")),
    # Outer step and training.
    Retired(
        r"\bquarantin\w*", "excluded (weight 0), restarted_from_anchor (non-finite)",
        ("quarantined", "quarantine"), ("quarter",),
    ),
    Retired(r"\b(guard|verdict|replica)'s word\b|\bwhose word\b", "decision, weight",
            ("The guard's word on this", "Whose word counts"), ("the config's words",)),
    Retired(r"\bnorm_factor\b", "max_norm_ratio", ("norm_factor=10",), ("norm factor",)),
    Retired(r"\bwirings?\b|\brewir\w+|(?<![a-z])wiring_|_wiring\b", "build, build_optimizer",
            ("wiring", "outer_wiring"), ("wired", "wire_bytes", "on the wire")),
    Retired(r"\bbuild_trainer\b|\btraining[./]trainer\b|\bTrainer\(", "RunContext, build_run",
            ("build_trainer", "training/trainer.py"),
            ("SentencePieceTrainer", "the trainer of a tokenizer")),
    # Networks.
    Retired(r"\bthin~links?\b|(?<![a-z])thin_link", "low-bandwidth link",
            ("thin links", "thin-link", "thin_links.md", "thin link"), ("within links", "thin")),
    Retired(r"\b(the|a) road (of|that)\b", "path, steps", ("The road of a mean",),
            ("broad of", "on the road")),
    Retired(r"\banchor writes\b", "sample from the anchor", ("the anchor writes: 'x'",),
            ("the anchor is written",)),
)  # fmt: skip


@cache
def texts() -> dict[str, str]:
    """Return path -> the path and the content of every file that is searched."""
    files: list[Path] = []
    for place in PLACES:
        files += [ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*")
    found = {}
    for file in sorted(files):
        path = file.relative_to(ROOT).as_posix()
        if file.is_file() and file.suffix in SUFFIXES and not path.startswith(HISTORY):
            found[path] = f"{path}\n{file.read_text(encoding='utf-8')}"
    return found


def name(retired: Retired) -> str:
    return retired.found[0]


@pytest.mark.parametrize("retired", RETIRED, ids=name)
def test_a_retired_word_is_not_used(retired: Retired) -> None:
    uses = []
    for path, text in texts().items():
        if path.startswith(retired.places):
            for match in retired.finditer(text):
                line = text.count("\n", 0, match.start())  # the path is the line before the first
                where = f"{path}:{line}" if line else path
                uses.append(f"{where}: {' '.join(match[0].split())}")
    assert not uses, f"say {retired.use} instead:\n" + "\n".join(uses)


@pytest.mark.parametrize("retired", RETIRED, ids=name)
def test_a_pattern_finds_the_word_and_leaves_honest_ones(retired: Retired) -> None:
    for text in retired.found:
        assert any(retired.finditer(text)), text
    for text in retired.honest:
        assert not any(retired.finditer(text)), text


def test_all_kinds_of_files_are_searched() -> None:
    searched = texts()
    for path in (
        "README.md", "configs/15b_k16.yaml", "launch/slurm/pretrain.sbatch",
        "megatron_muloco/outer/synchronizer.py", "tests/support/spawn.py",
    ):  # fmt: skip
        assert path in searched
