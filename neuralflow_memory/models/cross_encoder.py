"""Reranks with a cross-encoder of sentence-transformers, which reads question and text together."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, MissingDependency, brief
from ..protocols import Reranker
from .sentence_transformers import loaded

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

_BATCH = 16
"""Pairs per call of the model, which are padded to the longest."""
_WHAT = "Reranking on this machine"


class CrossEncoderReranker:
    """A `Reranker` over a cross-encoder with one output, such as cross-encoder/ms-marco-MiniLM-L6-v2.

    Constructing it imports nothing; `load` does, or else the first call. Thread-safe: one question at a time.
    """

    def __init__(self, model: str | CrossEncoder, *, device: str | None = None) -> None:
        """Name the model: of the cross-encoder organization, "owner/name", or a folder's path; or pass it, loaded.

        *device* is "cpu", "cuda", …; None lets the library choose. A loaded model stays where it is.
        """
        self._device = device
        self._model: CrossEncoder | None = None
        self._name = ""
        if isinstance(model, str):
            self._name = model if "/" in model or Path(model).exists() else f"cross-encoder/{model}"
        else:
            self._model = model
        self._loading = threading.Lock()
        self._busy = threading.Lock()

    def load(self) -> CrossEncoder:
        """Import the library and load the model, once.

        Raises:
            MissingDependency: sentence-transformers is not installed.
            EmbeddingError: The weights can't be had.
        """
        with self._loading:
            if self._model is None:
                self._model = loaded("CrossEncoder", self._name, device=self._device, what=_WHAT)
            return self._model

    def rerank(self, query: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The model's output for *query* with each of *texts*: float32, shape (len(texts),). Longer ones are cut."""
        model = self.load()
        with self._busy:  # the tokenizer can't serve two threads at once
            scores = model.predict(
                [(query, text) for text in texts],
                batch_size=_BATCH,
                show_progress_bar=False,
                activation_fn=_as_is,
            )
        return np.asarray(scores, np.float32)


def _as_is(outputs: Any) -> Any:
    """In place of a sigmoid, in which all that fits well is 1."""
    return outputs


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What scores pairs of texts, such as LangChain's `BaseCrossEncoder`, as a reranker."""

    score: Callable[[list[tuple[str, str]]], Sequence[float]]

    def rerank(self, query: str, texts: Sequence[str]) -> Sequence[float]:
        return self.score([(query, text) for text in texts])


def as_reranker(thing: Any) -> Reranker:
    """Return *thing* if it is a reranker, else one made of it: of a cross-encoder, or of a model's name.

    Raises:
        ConfigError: It is none of these.
        MissingDependency: It is a name, and sentence-transformers is not installed.
    """
    if isinstance(thing, str) and thing.strip():
        if find_spec("sentence_transformers") is None:
            raise MissingDependency("sentence-transformers", "local", _WHAT)
        return CrossEncoderReranker(thing)
    if not isinstance(thing, type | str):
        if _has(thing, "rerank"):
            return cast("Reranker", thing)
        if _has(thing, "predict"):
            return CrossEncoderReranker(thing)
        if _has(thing, "score"):
            return _Pairs(thing.score)
    raise ConfigError(
        "reranker= takes an object with rerank(query, texts), not async, a sentence-transformers CrossEncoder or the name of "
        f"its model, or a LangChain cross encoder; not {brief(thing)}"
    )


def _has(thing: Any, name: str) -> bool:
    method = getattr(thing, name, None)
    return callable(method) and not inspect.iscoroutinefunction(method)


__all__ = ["CrossEncoderReranker", "as_reranker"]
