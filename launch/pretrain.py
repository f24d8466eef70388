#!/usr/bin/env python
"""Starts `megatron_muloco.training.main`; everything is in the installed package."""

from megatron_muloco.training.main import main

if __name__ == "__main__":
    main()
