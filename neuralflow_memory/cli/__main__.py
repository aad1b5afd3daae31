"""Lets `python -m neuralflow_memory.cli` do what `neuralflow-memory` does."""

from . import main

if __name__ == "__main__":
    main()
