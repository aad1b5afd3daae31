"""`open_memory`: settings to objects. The only place that chooses parts."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from .config import Embedding, Gemini, Settings
from .core import Core
from .errors import ConfigError, FolderError, ForkedError, MissingDependency, ModelMismatch, StorageError, brief
from .memory import Memory
from .models.cross_encoder import as_reranker
from .models.extractive import ExtractiveSummarizer
from .models.prompted import as_extractor, as_summarizer
from .models.tokens import token_counter
from .pipeline.backup import SCRATCH
from .pipeline.cached import Hot
from .pipeline.parts import EmbeddingModel, Parts
from .pipeline.resident import Residents
from .protocols import (
    AccessPolicy,
    Cache,
    Clock,
    Embedder,
    EntryStore,
    Extractor,
    Ledger,
    Summarizer,
    TokenCounter,
)
from .rules.analysis import recorded
from .rules.lexical import VERSION as LEXICAL_VERSION
from .rules.states import StateRules, as_rules
from .rules.traits import VERSION as TRAITS_VERSION
from .security.access import AllowOwn
from .sources import IN_MEMORY, laid_over, read_settings
from .storage.archive import FileArchive
from .storage.cache import LRU
from .storage.ledger.sqlite import SqliteLedger
from .storage.lock import FolderLocks

if TYPE_CHECKING:
    from .models.gemini import GeminiSummarizer

_MB = 1024 * 1024
_DAY = 86_400_000_000  # microseconds
LEDGER_FILE = "ledger.sqlite3"
CHROMA_FOLDER = "chroma"
ARCHIVE_FOLDER = "archive"
_OURS = frozenset(
    {LEDGER_FILE, LEDGER_FILE + "-wal", LEDGER_FILE + "-shm", CHROMA_FOLDER, ARCHIVE_FOLDER, "lock", "open"}
)
_PARTS = ("embedder", "reranker", "summarizer", "extractor", "token_counter", "policy", "clock", "state_rules", "cache")


@dataclass(slots=True)
class _Opened:
    """A folder that this process has open, by how many handles, and with what it was opened."""

    core: Core
    settings: Settings
    parts: Mapping[str, Any]
    handles: int


_opened: dict[Path, _Opened] = {}
_opening = threading.Lock()
_chroma_pids: set[int] = set()
"""The processes, of this one and those that it was forked from, that have opened an embedded index."""


def open_memory(
    path_or_settings: str | os.PathLike[str] | Settings | None = None,
    *,
    user_id: str | None = None,
    embedder: Embedder | Embedding | Mapping[str, Any] | str | None = None,
    reranker: Any = None,
    summarizer: Any = None,
    extractor: Any = None,
    token_counter: TokenCounter | None = None,
    policy: AccessPolicy | None = None,
    clock: Clock | None = None,
    state_rules: StateRules | Any = None,
    cache: Cache | None = None,
    **options: Any,
) -> Memory:
    """Open a memory, making its folder if it is new.

    Args:
        path_or_settings: The folder; a `.toml` or `.yaml` file of options; `Settings`; ":memory:" for a folder that goes
            away on close; None for what `NEURALFLOW_PATH` says, else `./memory`.
        user_id: The user of sessions that name none.
        embedder: An `Embedder` (any LangChain `Embeddings` fits), a sentence-transformers model's name, "none", or options.
        reranker: Reads the best candidates of a search again, together with the question: a `Reranker`, a
            sentence-transformers `CrossEncoder` or the name of its model, or a LangChain `BaseCrossEncoder`. By default none.
        summarizer: Writes the running summaries: a `Summarizer`, a LangChain or LlamaIndex model, or a function from prompt
            to text; "gemini", also for the project that `aiplatform.init` was given; "extractive" for picked sentences. By
            default Gemini where it is configured, else sentences are picked.
        extractor: Finds knowledge in the turns that were folded, in the background: an `Extractor`, a LangChain or LlamaIndex
            model, a function from prompt to text, or "gemini". By default none.
        token_counter: Counts tokens; by default tiktoken with the encoding that `tokenizer` names.
        policy: Says who may do what; by default everyone their own.
        clock: Returns the current time, aware.
        state_rules: What the states of sessions may be: `StateRules`, a pydantic model or a JSON schema. By default any JSON.
        cache: Where the processes of this folder keep together what was found; by default Redis, if `redis.url` is set.
        **options: Sections and fields of `Settings`, e.g. `budget={"total": 4000}`. They win over the environment, and
            that over a file.

    Returns:
        A handle. The same folder opened twice in one process is one memory, closed with its last handle.

    Raises:
        ConfigError: An option is wrong, or differs from those that the folder is open with.
        FolderError: The folder is not a memory, or from a newer version.
        FolderInUse: A process of another version of this package has it open, or one with another model that is to be changed.
        ForkedError: This process was forked from one that had it open, or another one with an index in its folder.
        ModelMismatch: It was indexed with another embedding model.
    """
    parts: dict[str, Any] = {
        "reranker": reranker,
        "summarizer": summarizer,
        "extractor": extractor,
        "token_counter": token_counter,
        "policy": policy,
        "clock": clock,
        "state_rules": state_rules,
        "cache": cache,
    }
    if isinstance(embedder, str):
        options["embedder"] = {"model": embedder}
    elif isinstance(embedder, Mapping | Embedding):
        options["embedder"] = embedder
    else:
        parts["embedder"] = embedder
    _check_parts(parts)
    if user_id is not None:
        options["user_id"] = user_id
    settings = read_settings(path_or_settings, **options)
    if str(settings.path) == IN_MEMORY:
        # Not a TemporaryDirectory: a forked child that ends would take its parent's folder with it.
        scratch = Path(tempfile.mkdtemp(prefix="neuralflow-"))
        settings = settings.model_copy(update={"path": scratch})
        release: Callable[[], None] = lambda: shutil.rmtree(scratch, ignore_errors=True)  # noqa: E731
    else:
        release = lambda: None  # noqa: E731
    settings = settings.model_copy(update={"path": settings.path.expanduser().resolve()})  # os.chdir() must not move it
    key = settings.path
    with _opening:
        opened = _opened.get(key)
        if opened is not None and opened.core.pid != os.getpid():
            opened = None  # a parent's, from before a fork
        if opened is None:

            def closed() -> None:
                _opened.pop(key, None)
                release()

            core = _open(settings, parts, release=closed)
            opened = _opened[key] = _Opened(core, settings, parts, 0)
            core.parts.chosen = partial(_take_up, opened)
        else:
            _same(opened, settings, parts)
        opened.handles += 1
        return Memory(opened.core, on_close=_close_handle)


def _check_parts(parts: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a part that lacks what is called on it, now rather than in the background."""
    kinds = {
        "embedder": Embedder,
        "token_counter": TokenCounter,
        "policy": AccessPolicy,
        "cache": Cache,
    }
    for name, kind in kinds.items():
        part = parts.get(name)
        if part is not None and (isinstance(part, type) or not isinstance(part, kind)):
            members = ", ".join(sorted(m for m in (*vars(kind), *kind.__annotations__) if not m.startswith("_")))
            raise ConfigError(f"{name}= takes an object with {members}, not {brief(part)}")
    if parts.get("reranker") is not None:
        as_reranker(parts["reranker"])
    summarizer = parts.get("summarizer")
    if summarizer is not None and summarizer not in ("gemini", "extractive"):
        as_summarizer(summarizer)
    as_rules(parts.get("state_rules"))
    if parts.get("extractor") not in (None, "gemini"):
        as_extractor(parts["extractor"])
    clock = parts.get("clock")
    if clock is not None:
        now = clock() if callable(clock) else None
        if not isinstance(now, datetime) or now.tzinfo is None:
            raise ConfigError(
                "clock= takes a function that returns the current time, aware, e.g. lambda: datetime.now(UTC)"
            )


async def aopen_memory(
    path_or_settings: str | os.PathLike[str] | Settings | None = None, **parts_and_options: Any
) -> Memory:
    """Async twin of `open_memory`: returns with the models of search loaded, so that no later call stalls the loop."""
    import asyncio

    memory = await asyncio.to_thread(open_memory, path_or_settings, **parts_and_options)
    await memory.aready()
    return memory


def _same(opened: _Opened, settings: Settings, parts: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, naming the difference, where what is asked for is not what the folder is open with."""
    asked, then = settings.model_dump(exclude_unset=True, exclude={"path"}), opened.settings.model_dump()
    different = [
        n for n, value in asked.items() if (laid_over(value, then[n]) if isinstance(value, dict) else value) != then[n]
    ]
    different += [n for n in _PARTS if parts.get(n) is not None and not _is_same(parts[n], opened.parts.get(n))]
    if different:
        raise ConfigError(
            f"{settings.path} is open in this process with other options ({', '.join(different)} differ); "
            "use the same ones, or close it first"
        )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two parts are one; names and methods are made anew each time they are read."""
    return one is other or (isinstance(one, str | MethodType) and type(one) is type(other) and bool(one == other))


def _close_handle(core: Core) -> None:
    with _opening:
        opened = _opened.get(core.parts.settings.path)
        if opened is None or opened.core is not core:
            return
        opened.handles -= 1
        if opened.handles == 0:
            core.close()


def _open(settings: Settings, given: Mapping[str, Any], *, release: Callable[[], Any]) -> Core:
    folder = settings.path
    _prepare(folder)
    locks = FolderLocks(folder)
    if locks.alone:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # of a restore that was cut short
    ledger: Ledger | None = None
    store: EntryStore | None = None
    try:
        counter = given["token_counter"] or token_counter(settings.tokenizer)
        archive = FileArchive(folder / ARCHIVE_FOLDER, compression=_compression(settings))
        ledger = SqliteLedger(
            folder / LEDGER_FILE,
            counter=counter.name,
            durability=settings.durability,
            alone=locks.alone,
            max_states=settings.state.max_states,
            keep_states=settings.state.persistence,
            archive=archive,
        )
        embedder = given.get("embedder") or _embedder(settings)
        model_id = None if embedder is None else _model_id(embedder)
        if model_id is not None:
            _check_model(ledger, model_id, on_change=settings.embedder.on_change)
        ledger.retokenize(_lexical_version(), recorded)
        ledger.settled()
        locks.settled()
        opener: Callable[[], EntryStore] | None = None
        made = settings.chroma.url is not None or (folder / CHROMA_FOLDER).exists()
        if settings.chroma.url is None and _forked_from_chroma():
            if model_id is not None:
                raise ForkedError(
                    "this process was forked from one that had a memory open, and Chroma, without the threads that it had there, "
                    "would hang here; open memories after the fork only (in gunicorn's post_fork, Celery's "
                    "worker_process_init), start processes with 'spawn', or use a Chroma server (chroma.url)"
                )
            made = False
        if made or model_id is not None:  # without a model, to delete from it
            from .storage.chroma import ChromaStore

            def open_store() -> EntryStore:
                if settings.chroma.url is None:
                    _chroma_pids.add(os.getpid())
                return ChromaStore(folder / CHROMA_FOLDER, options=settings.chroma, ledger=ledger)

            opener = open_store
            # Embedded, it is of one process at a time; the others get it when that ends.
            if locks.index.take() or settings.chroma.url is not None:
                store = open_store()
        else:
            locks.index.release()
        floor = ExtractiveSummarizer(counter)
        clock = given["clock"] or _utc_now
        summarizer = _summarizer(given["summarizer"], settings)
        extractor = _extractor(given.get("extractor"), settings)
        silent = extractor is not None and not callable(getattr(extractor, "supersede", None))
        if silent and settings.knowledge.supersede != "nothing":
            raise ConfigError(
                'knowledge.supersede needs an extractor that says what facts replace: "gemini", a LangChain or LlamaIndex model, a '
                "function from text to text, or an object that has supersede(new, known) as well"
            )
        for model in (summarizer, extractor):
            if settings.gemini.spend_cap is not None and not getattr(model, "priced", True):
                raise ConfigError(
                    f"gemini.spend_cap can't be kept, because what {model and model.name} costs is not known: for Gemini "
                    "set gemini.input_price and gemini.output_price, in US dollars per million tokens; for another model pass "
                    "one whose answers are a Summary, or an Extraction, with their cost, or leave the cap out"
                )
        residents = Residents(ledger, max_bytes=settings.ram_mb * _MB, clock=clock, model_id=model_id)
        reranker = None if given["reranker"] is None else as_reranker(given["reranker"])
        hot = _hot(settings, ledger, given, seen=residents.seen)
        residents.moved = hot.moved
        parts = Parts(
            settings=settings,
            ledger=ledger,
            store=store,
            model=None if embedder is None else EmbeddingModel(embedder, _model_id(embedder)),
            counter=counter,
            summarizer=summarizer or floor,
            floor=floor,
            policy=given["policy"] or AllowOwn(),
            clock=clock,
            residents=residents,
            archive=archive,
            hot=hot,
            extractor=extractor,
            reranker=reranker,
            state_rules=as_rules(given.get("state_rules")),
        )
    except BaseException:
        for part in (store, ledger):
            if part is not None:
                with suppress(Exception):
                    part.close()
        locks.release()
        release()
        raise
    parts.choose = partial(_choose, settings)
    parts.exclusive = partial(locks.hold, given_up=lambda: parts.closing)
    parts.sole = locks.sole

    def done() -> None:
        if hot.shared is not None and given.get("cache") is None:
            hot.shared.close()
        locks.release()
        release()

    return Core(parts, index_lock=locks.index, wanted=locks.wanted, open_store=opener, release=done)


def _forked_from_chroma() -> bool:
    """Whether a parent of this process had an embedded index open before the fork."""
    return bool(_chroma_pids - {os.getpid()})


def _prepare(folder: Path) -> None:
    """Make the folder; `FolderError` for one that holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {p.name for p in folder.iterdir()}
    except OSError as error:
        if folder.exists() and not folder.is_dir():
            raise FolderError(f"{folder} is a file; a memory is a folder", path=str(folder)) from error
        raise StorageError(f"{folder} can't be used: {error.strerror}", path=str(folder)) from error
    if found and LEDGER_FILE not in found and not found <= _OURS:
        raise FolderError(
            f"{folder} holds other files ({', '.join(sorted(found)[:3])}) and no memory; choose an empty or new folder",
            path=str(folder),
        )


def _compression(settings: Settings) -> Literal["zlib", "zstd"] | None:
    return settings.tiers.compression if settings.tiers.enable_compression else None


def _embedder(settings: Settings) -> Embedder | None:
    options = settings.embedder
    if options.model == "none":
        return None
    torch = find_spec("sentence_transformers") is not None
    if options.backend == "onnx" or (options.backend == "auto" and not torch):
        from .models.onnx import OnnxEmbedder, is_here

        if options.backend == "onnx" or is_here(options.model):
            return OnnxEmbedder(options.model)
    if not torch:
        if "model" in options.model_fields_set or options.backend == "torch":
            raise MissingDependency("sentence-transformers", "local", f"The embedding model {options.model!r}")
        warnings.warn(
            "no embedder: search works by words alone. For search by meaning: pip install 'neuralflow-memory[local]', "
            "or pass embedder=...; embedder='none' silences this",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    from .models.sentence_transformers import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder(model=options.model, device=options.device)


def _choose(settings: Settings, given: Any) -> EmbeddingModel:
    """The embedding model that is to be taken up: by name, otherwise as it is configured, or an embedder."""
    if isinstance(given, str):
        settings = _with_model(settings, given)
        embedder = _embedder(settings)
        if embedder is None:
            raise ConfigError(f"there is no embedding model {given!r} to reindex with; name one, or pass an embedder")
    else:
        _check_parts({"embedder": given})
        embedder = given
    return EmbeddingModel(embedder, _model_id(embedder))


def _take_up(opened: _Opened, given: Any) -> None:
    """From now on the folder is open with another embedding model."""
    if isinstance(given, str):
        opened.settings = _with_model(opened.settings, given)
        opened.core.parts.settings = opened.settings
    opened.parts = {**opened.parts, "embedder": None if isinstance(given, str) else given}


def _with_model(settings: Settings, name: str) -> Settings:
    return settings.model_copy(update={"embedder": settings.embedder.model_copy(update={"model": name})})


def _model_id(embedder: Any) -> str:
    for name in ("model_id", "model_name", "model"):
        value = getattr(embedder, name, None)
        if isinstance(value, str) and value:
            return value
    return f"{type(embedder).__module__}.{type(embedder).__qualname__}"


def _check_model(ledger: Ledger, model_id: str, *, on_change: str) -> None:
    stored = [name for name, _ in ledger.models()]
    if not stored or model_id in stored:
        return
    if on_change == "reindex":
        ledger.forget_models(keep=model_id)
        return
    raise ModelMismatch(
        f"this folder was indexed with {stored[0]!r} and is opened with {model_id!r}; open it with the same model (and change "
        "it by reindex(embedder=...), while search goes on), or with embedder={'on_change': 'reindex', ...} to embed everything "
        "again with the new one",
        stored=stored[0],
        given=model_id,
    )


def _summarizer(given: Any, settings: Settings) -> Summarizer | None:
    """The model that writes summaries, None for the floor."""
    options = settings.gemini
    if given == "extractive" or (given is None and options.project is None and options.api_key is None):
        return None
    if given is not None and given != "gemini":
        return as_summarizer(given)
    return _gemini(options)


def _extractor(given: Any, settings: Settings) -> Extractor | None:
    if given is None:
        return None
    return _gemini(settings.gemini) if given == "gemini" else as_extractor(given)


def _gemini(options: Gemini) -> GeminiSummarizer:
    from .models.gemini import GeminiSummarizer

    key = options.api_key.get_secret_value() if options.api_key is not None and options.project is None else None
    return GeminiSummarizer(
        model=options.model,
        project=options.project,
        location=options.location if "location" in options.model_fields_set else None,
        api_key=key,
        input_price=options.input_price,
        output_price=options.output_price,
    )


def _hot(settings: Settings, ledger: Ledger, given: Mapping[str, Any], *, seen: int) -> Hot:
    """The caches: RAM, and what several processes share."""
    from importlib.metadata import version

    tiers, redis = settings.tiers, settings.redis
    cache, reranker = given.get("cache"), given["reranker"]
    if cache is None and redis.url is not None:
        from .storage.redis import RedisCache

        cache = RedisCache(redis, prefix=f"neuralflow:{ledger.id}:")
    age = tiers.hot_tier_max_age_days
    decides = {
        "version": version("neuralflow-memory"),
        "lexical": _lexical_version(),
        "ranking": settings.ranking.model_dump(),
        # One that has no name may be another one in each process.
        "reranker": reranker if reranker is None or isinstance(reranker, str) else secrets.token_hex(16),
    }
    return Hot(
        ledger,
        entries=LRU(
            max_entries=tiers.lru_entries,
            max_bytes=tiers.lru_mb * _MB,
            max_age=None if age is None else age * _DAY,
            min_uses=tiers.min_access_count_hot,
        ),
        results=LRU(max_entries=settings.context.cache_size, max_bytes=tiers.lru_mb * _MB),
        shared=cache,
        fingerprint=json.dumps(decides, sort_keys=True),
        ttl=redis.default_ttl,
        seen=seen,
    )


def _lexical_version() -> str:
    """Names the rules that made the term ids and traits: ours, and the stemmer's release."""
    from importlib.metadata import version

    return f"{LEXICAL_VERSION} {TRAITS_VERSION} {version('PyStemmer')}"


def _utc_now() -> datetime:
    return datetime.now(UTC)


__all__ = ["aopen_memory", "open_memory", "read_settings"]
