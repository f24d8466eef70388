"""Write ready configs for a size, K and token budget from published tables or a finished study.

    python tools/extrapolate.py published --all-15b configs
    python tools/extrapolate.py published --model 914m --method muloco --replicas 4
    python tools/extrapolate.py study RUNS.csv --model MODEL.yaml --method muloco --replicas 4

Every value has a label: measured, fitted with its interval, or taken from a paper. What is written
has passed the checks of ``--dry-run``. Guide: docs/guides/choosing.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.scaling.table import read_table
from tools.scaling.evidence import Evidence, Published
from tools.scaling.labelled import METHODS, Target
from tools.scaling.ready import CONFIGS, check_text, model_budget, ready_config, tokens_of
from tools.scaling.study import Study

# File name -> method and K.
RUNS_15B = {
    "15b_dp_adamw": ("dp_adamw", 1),
    "15b_dp_muon": ("dp_muon", 1),
    "15b_diloco_k1": ("diloco", 1),
    "15b_k1": ("muloco", 1),
    "15b_diloco_k16": ("diloco", 16),
    "15b_k16": ("muloco", 16),
}
COMMAND_15B = "python tools/extrapolate.py published --all-15b configs"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    published = commands.add_parser("published", help="from the tables of the papers")
    published.add_argument("--all-15b", type=Path, help="write the six 15B configs to a directory")
    study = commands.add_parser("study", help="from a table of runs")
    study.add_argument("table", type=Path, help="CSV file, one run a row")
    for command in (published, study):
        command.add_argument("--model", default="", help="size in configs/models, or a YAML file")
        command.add_argument("--method", choices=METHODS, default="muloco")
        command.add_argument("--replicas", type=int, default=1, help="K")
        command.add_argument(
            "--tokens", default="", help="such as 30e9 or 20x; by default the model's"
        )
        command.add_argument("--output", type=Path, help="file; standard output by default")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if getattr(options, "all_15b", None):
        for name, text in all_15b(options.all_15b).items():
            (options.all_15b / f"{name}.yaml").write_text(text, encoding="utf-8")
            print(f"wrote {options.all_15b / name}.yaml")
        return
    if not options.model:
        raise ConfigError("--model is not given: name a size of configs/models or a YAML file.")
    evidence: Evidence = Published()
    if options.command == "study":
        evidence = Study(read_table(options.table), evidence)
    model = model_file(options.model)
    budget = model_budget(model)
    params = budget.parameters.total
    tokens = tokens_of(options.tokens, params) if options.tokens else budget.train_tokens
    target = Target(model.stem, params, tokens, options.method, options.replicas)
    ready = ready_config(target, evidence, model, f"runs/{model.stem}_{target.series}")
    directory = options.output.parent if options.output else Path.cwd()
    text = check_text(ready, directory)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
        print(f"wrote {options.output}")
    else:
        print(text, end="")


def all_15b(directory: Path) -> dict[str, str]:
    """Return the texts of the six 15B configs by file name, for a directory."""
    model = CONFIGS / "models/15b.yaml"
    budget = model_budget(model)
    params, tokens = budget.parameters.total, budget.train_tokens
    texts = {}
    for name, (method, replicas) in RUNS_15B.items():
        target = Target("15B", params, tokens, method, replicas)
        ready = ready_config(target, Published(), model, f"runs/{name}", command=COMMAND_15B)
        texts[name] = check_text(ready, directory)
    return texts


def model_file(name: str) -> Path:
    """Return the file of a model: a size in ``configs/models``, or a path."""
    shipped = CONFIGS / f"models/{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name).resolve()
    sizes = ", ".join(sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml")))
    raise ConfigError(f"--model {name}: no such file, and no such size; the sizes are {sizes}.")


if __name__ == "__main__":
    sys.exit(main())
