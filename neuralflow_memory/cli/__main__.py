"""Lets `python -m neuralflow_memory.cli` do what `neuralflow-memory` does."""

from . import main

main()
