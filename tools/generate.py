"""Continue a text with a trained model: python -m tools.generate RUN --prompt TEXT.

RUN is a run's checkpoint directory, one checkpoint, or a final anchor.
"""

import argparse
import sys
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings


def continue_text(arguments: argparse.Namespace) -> None:
    """Print the prompt and what the model writes after it.

    Raises:
        ConfigError: There is no checkpoint, or an option is out of range.
    """
    problems = []
    if arguments.temperature < 0:
        problems.append(f"--temperature {arguments.temperature} is negative; 0 is greedy.")
    if not 0 < arguments.top_p <= 1:
        problems.append(f"--top-p {arguments.top_p} is not above 0 and at most 1.")
    if arguments.tokens < 1:
        problems.append(f"--tokens {arguments.tokens} is not positive.")
    if problems:
        raise ConfigError(problems)
    silence_known_warnings()
    from tools.exporting.live import live_model

    with live_model(
        arguments.run, precision=arguments.precision, tokenizer=arguments.tokenizer
    ) as live:
        prompt = live.tokenizer.tokenize(arguments.prompt)
        if not prompt:
            raise ConfigError("--prompt has no token. Give at least one character.")
        tokens = live.continuation(
            prompt,
            length=arguments.tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        if tokens[-1] == live.tokenizer.eod:
            tokens.pop()
        print(live.tokenizer.detokenize(prompt + tokens))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Continue a text with a trained model.")
    parser.add_argument("run", type=Path, help="checkpoint.dir of a run, or one checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this much probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if it has moved")
    arguments = parser.parse_args(argv)
    return run_tool(lambda: continue_text(arguments))


if __name__ == "__main__":
    sys.exit(main())
