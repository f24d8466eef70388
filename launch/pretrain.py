#!/usr/bin/env python
"""Starts `megatron_muloco.training.main`; everything is in the installed package."""

from megatron_muloco.training.stopping import Launchers, StopRequest, Terminal

if __name__ == "__main__":
    with StopRequest(Terminal(Launchers())) as stop:  # before the imports, which take seconds
        from megatron_muloco.training.main import main

        main(stop=stop)
