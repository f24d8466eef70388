"""Ranges that the package is written for; `requirements/` holds the exact sets that are tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "megatron_muloco/__init__.py").read_text(), re.MULTILINE
)
assert VERSION, 'megatron_muloco/__init__.py must hold a line __version__ = "..."'

# apex is deliberately absent: the PyPI project of that name is unrelated to NVIDIA's, which is
# built from source and used through Megatron when it can be imported.
setup(
    name="megatron_muloco",
    version=VERSION.group(1),
    description="MuLoCo and DiLoCo pre-training on Megatron-core and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_muloco", "megatron_muloco.*"]),
    package_data={"megatron_muloco": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.19",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "pyyaml>=6",
        "pydantic>=2",
        "numpy>=1.26",
        "tqdm>=4.60",
        "typing_extensions>=4.6",
    ],
    extras_require={
        "wandb": ["wandb>=0.18"],
        # To load exports and to test them; writing them needs nothing more.
        "export": ["transformers>=5.23"],
        "analysis": ["scipy>=1.11", "matplotlib>=3.8", "pyarrow>=15"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
