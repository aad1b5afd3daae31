"""Every option, its default and its meaning. Each changes something a test can see."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from .types import MemoryType


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Budget(_Section):
    """Token caps of a prompt's parts, not reservations; a smaller `max_tokens` scales them."""

    total: int = Field(default=8000, gt=0, description="`context`'s default max_tokens")
    conversation: int = Field(default=4000, gt=0, description="verbatim turns")
    task: int = Field(default=2000, ge=0, description="tasks and their notes")
    temporary: int = Field(default=1000, ge=0, description="temporary notes of tasks")
    summary: int = Field(default=1000, ge=0, description="the running summary with its pins and wrapper")
    hits_share: float = Field(
        default=0.10, ge=0, le=0.9, description="least share kept for search hits; they also get what the parts leave"
    )


class Pruning(_Section):
    """When old turns are folded into the summary. An item is a user turn with everything up to the next one."""

    max_context_items: int = Field(default=15, ge=1, description="items left verbatim after a fold, at most")
    summarization_threshold: int = Field(default=25, ge=2, description="items that start a fold")
    max_context_tokens: int = Field(
        default=4000, gt=0, description="tokens that start a fold; a fold leaves at most half"
    )
    summary_max_tokens: int = Field(
        default=1000, gt=0, description="the summarizer's output, within 75 % of budget.summary; the rest is for pins"
    )


class Prompt(_Section):
    """What the summarizer reads at a time, when a window is given up, and how a prompt is laid out."""

    max_context_length: int = Field(default=4096, ge=256, description="source tokens per summarizer call")
    context_overlap: int = Field(
        default=128,
        ge=0,
        description="tokens, in whole messages, shared by adjacent segments and kept after an idle expiry",
    )
    expiry_time: float = Field(
        default=3600.0, gt=0, description="seconds without a write after which the next add folds the window"
    )
    cache_size: int = Field(
        default=1000,
        ge=0,
        description="search results and contexts kept in RAM, at most `tiers.lru_mb` of them; dropped when anything of their user changes",
    )
    hits_placement: Literal["end", "start"] = Field(
        default="end",
        description="where search hits and temporary notes stand: before the newest user turn, or with the summary",
    )


class Tasks(_Section):
    """The working memory of tasks."""

    completed_max_age: float = Field(
        default=86400.0, ge=0, description="seconds for which a task that is over stays in working memory"
    )
    open_max_age: float = Field(
        default=604800.0,
        gt=0,
        description="seconds without a write after which an open task, with its parts, has failed",
    )


class State(_Section):
    """The states of sessions."""

    persistence: bool = Field(
        default=True, description="keep states in the folder; else in RAM only, and they go on close"
    )
    max_states: int = Field(default=100, ge=1, description="versions kept of a session's state, the newest")
    cleanup_interval: float = Field(
        default=300.0, gt=0, description="seconds between looks for sessions that became idle or expired"
    )


class Tiers(_Section):
    """When an entry that nobody uses leaves RAM, or becomes cold, and who looks. docs/caching.md, docs/tiers.md"""

    hot_tier_max_age_days: float | None = Field(
        default=7.0, gt=0, description="days since its last use after which an entry leaves the hot tier; None: never"
    )
    min_access_count_hot: float = Field(
        default=5.0,
        ge=0,
        description="unless it was used so often; with each so many days that go by, earlier uses count half",
    )
    lru_entries: int = Field(default=10_000, ge=0, description="entries in the hot tier, which is in RAM")
    lru_mb: int = Field(default=64, ge=1, description="megabytes of RAM for them, at most; those used last stay")
    warm_tier_max_age_days: float | None = Field(
        default=30.0,
        gt=0,
        description="days since its last use, or since it was written, after which an entry becomes cold; None: never",
    )
    min_access_count_warm: float = Field(
        default=2.0,
        ge=0,
        description="unless it was used so often; with each so many days that go by, earlier uses count half",
    )
    enable_compression: bool = Field(default=True, description="compress the blocks that cold entries stand in")
    compression: Literal["zlib", "zstd"] = Field(
        default="zlib",
        description="by what; `zstd`, which needs the extra of this name, takes less room and is read faster",
    )
    tier_migration_interval: float = Field(default=3600.0, gt=0, description="seconds between sweeps in the background")
    background: bool = Field(default=False, description="sweep in the background; else when `sweep` is called")


class Cold(_Section):
    """What else becomes cold, and how long it stays in the archive where retention deletes."""

    after_days: float | None = Field(
        default=30.0,
        gt=0,
        description="days, counted as those of tiers, after which an entry of little importance becomes cold however often it was used; None: never",
    )
    below_importance: float = Field(default=0.7, ge=0, le=1, description="what is little importance: less than this")
    max_age_days: float | None = Field(
        default=180.0,
        gt=0,
        description="days in the archive after which an entry is deleted, if `retention.delete`; None: never",
    )


class Keep(_Section):
    """What `retention` says otherwise of a type or a tag; what is not given is as for the others."""

    retention_days: float | None = Field(default=None, gt=0)
    max_entries: int | None = Field(default=None, ge=0)
    keep_importance: float | None = Field(default=None, ge=0, le=1)
    delete: bool | None = None


class Retention(_Section):
    """How much is kept of a user, and for how long. What is over is archived; or deleted, if asked for. docs/retention.md"""

    max_entries: int | None = Field(
        default=10_000,
        ge=0,
        description="entries of knowledge and episodes kept of a user, the least important going first; None: all",
    )
    retention_days: float | None = Field(
        default=90.0,
        gt=0,
        description="days since its last use, or since it was written, that one is kept; None: for good",
    )
    keep_importance: float = Field(
        default=0.8, ge=0, le=1, description="what is of this importance, or of more, is kept whatever its age"
    )
    delete: bool = Field(
        default=False, description="delete what retention, or its age in the archive, selects, instead of archiving it"
    )
    undo_days: float = Field(
        default=7.0, ge=0, description="days for which what retention deleted can be brought back; 0: gone at once"
    )
    max_delete_share: float = Field(
        default=0.2, ge=0, le=1, description="a sweep that would delete a greater share of all entries deletes nothing"
    )
    types: dict[MemoryType, Keep] = Field(
        default={}, description="other rules for a type, e.g. `{'short_term': {'retention_days': 365}}`"
    )
    tags: dict[str, Keep] = Field(
        default={}, description="other rules for a tag, which win over those of types; of several, what keeps longest"
    )


class Redis(_Section):
    """A Redis or Valkey server where the processes of a folder keep together what was found. docs/caching.md"""

    url: SecretStr | None = Field(
        default=None,
        description="`redis://user:password@host:6379/0`, `rediss://...` with TLS, or `unix:///...`; None: no server",
    )
    max_memory_mb: int | None = Field(
        default=512,
        ge=1,
        description="the server's memory, set where CONFIG is allowed, else checked; None: as it is",
    )
    max_memory_policy: (
        Literal[
            "allkeys-lru",
            "allkeys-lfu",
            "allkeys-random",
            "volatile-lru",
            "volatile-lfu",
            "volatile-random",
            "volatile-ttl",
        ]
        | None
    ) = Field(default="allkeys-lru", description="what the server gives up when it is full; the same")
    default_ttl: int = Field(default=86_400, ge=1, description="seconds after which what was kept there goes")

    @field_validator("url")
    @classmethod
    def _address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                parts = urlsplit(url.get_secret_value())
                where = {"redis": parts.hostname, "rediss": parts.hostname, "unix": parts.path}.get(parts.scheme)
                whole = bool(where) and parts.port != 0
            except ValueError:
                whole = False
            if not whole:
                raise ValueError("must be an address such as redis://127.0.0.1:6379/0, rediss://... or unix:///path")
        return url


class Ranking(_Section):
    """What each signal of search counts. A score is the weighted mean of those that apply.

    The defaults were set on five year-long chats between two people (786 questions), those of `user` and `wish` by
    measurements on chats with an assistant. docs/search.md has what each of them is worth.
    """

    dense: float = Field(
        default=3.0, ge=0, description="meaning: how far the cosine with the question is above the average"
    )
    near: float = Field(default=4.2, ge=0, description="meaning of the turn with the two on each side")
    lexical: float = Field(default=1.8, ge=0, description="words: BM25 of the turn and the end of the one before")
    around: float = Field(default=2.0, ge=0, description="words of the turn with the four on each side")
    speaker: float = Field(default=3.0, ge=0, description="the question names one speaker, who said it")
    user: float = Field(default=1.7, ge=0, description="in a chat with an assistant, the user said it")
    date: float = Field(default=4.5, ge=0, description="it was said at a time that the question names")
    time: float = Field(default=1.6, ge=0, description="the question asks when or how long, and it says so")
    wish: float = Field(
        default=1.7, ge=0, description="in a chat with an assistant, it says how to behave or what is preferred"
    )
    length: float = Field(default=3.0, ge=0, description="it has words enough, and not too many")
    statement: float = Field(default=1.8, ge=0, description="it is no short question")
    importance: float = Field(default=0.5, ge=0, description="its importance: by its text, or as it was set")
    recency: float = Field(default=0.0, ge=0, description="it was said lately; half of it after 30 days")
    rerank: float = Field(
        default=5.0, ge=0, description="with a reranker: what it finds far better than its average candidate"
    )


class Gemini(_Section):
    """Summaries by Gemini; used when a project or an API key is set."""

    model: str = "gemini-3.5-flash-lite"
    project: str | None = Field(default=None, description="Vertex AI project; without one, `api_key` is used")
    location: str = "global"
    api_key: SecretStr | None = None
    input_price: float | None = Field(
        default=None, ge=0, description="US dollars per million input tokens; None: what is known of the model"
    )
    output_price: float | None = Field(default=None, ge=0, description="the same, of output tokens")
    spend_cap: float | None = Field(
        default=None, ge=0, description="US dollars a day (UTC) for summaries; beyond, they are written without a model"
    )


class Knowledge(_Section):
    """What becomes of knowledge when an extractor finds more."""

    supersede: Literal["nothing", "found", "any"] = Field(
        default="nothing",
        description="what the extractor's model may let a new fact supersede: nothing; 'found', facts that it found; 'any', also what was told",
    )


class Chroma(_Section):
    """Where the vector index is: in the folder, on a Chroma server, or in Chroma Cloud."""

    url: str | None = Field(
        default=None,
        description="a server, e.g. `http://127.0.0.1:8000`; Chroma Cloud is `https://api.trychroma.com`; None: in the folder",
    )
    token: SecretStr | None = Field(default=None, description="what the server, or a proxy before it, asks for")
    tenant: str = Field(default="default_tenant", min_length=1, description="a tenant that the server has")
    database: str = Field(default="default_database", min_length=1, description="a database that the tenant has")
    collection: str = Field(
        default="entries",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]$",
        description="the collection; each memory on a server has its own",
    )

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "must be an address such as http://127.0.0.1:8000, without a user, password or query; what the server asks "
                "for goes into chroma.token"
            )
        return url.rstrip("/")

    @field_validator("token")
    @classmethod
    def _header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("must be ASCII letters, digits and punctuation, as it is sent in a header")
        return token


class Embedding(_Section):
    """Which embedding model, where."""

    model: str = Field(
        default="all-MiniLM-L6-v2", description="a sentence-transformers model; 'none' for search by words alone"
    )
    device: str | None = Field(default=None, description="e.g. cpu, cuda; None lets the library choose")
    backend: Literal["auto", "torch", "onnx"] = Field(
        default="auto",
        description="what computes; auto: torch where sentence-transformers is installed, else onnx if the model is here as ONNX",
    )
    preload: bool = Field(
        default=True, description="load the model in the background when the memory is opened; else at its first use"
    )
    on_change: Literal["raise", "reindex"] = Field(
        default="raise", description="what to do with a folder indexed by another model"
    )


class Settings(_Section):
    """All options. From arguments, `NEURALFLOW_*` variables (`NEURALFLOW_BUDGET__TOTAL`), or a TOML or YAML file."""

    path: Path = Field(default=Path("memory"), description="the folder; ':memory:' for one that goes away on close")
    durability: Literal["process", "power"] = Field(
        default="process", description="what an acknowledged write survives: a killed process, or also a power cut"
    )
    tokenizer: str = Field(default="cl100k_base", description="a tiktoken encoding, or 'approx'")
    user_id: str | None = Field(default=None, description="the user of sessions that name none")
    ram_mb: int = Field(
        default=200, ge=1, description="megabytes of RAM for what is kept of users: windows, and what search reads"
    )
    budget: Budget = Budget()
    pruning: Pruning = Pruning()
    context: Prompt = Prompt()
    state: State = State()
    tasks: Tasks = Tasks()
    tiers: Tiers = Tiers()
    archive: Cold = Cold()
    retention: Retention = Retention()
    redis: Redis = Redis()
    ranking: Ranking = Ranking()
    embedder: Embedding = Embedding()
    knowledge: Knowledge = Knowledge()
    gemini: Gemini = Gemini()
    chroma: Chroma = Chroma()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pruning.summarization_threshold <= self.pruning.max_context_items:
            raise ValueError("pruning.summarization_threshold must be greater than pruning.max_context_items")
        if self.pruning.max_context_tokens > self.budget.conversation:
            raise ValueError("pruning.max_context_tokens must not exceed budget.conversation")
        if self.context.context_overlap >= self.context.max_context_length:
            raise ValueError("context.context_overlap must be less than context.max_context_length")
        return self


def explained(error: ValidationError) -> str:
    """Every problem of *error*, each with the option's name, and with the nearest one where there is none of that name."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'settings'}: "
        + (_unknown(e["loc"]) if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, "))
        for e in error.errors()
    )


def _unknown(loc: tuple[int | str, ...]) -> str:
    section = Settings.model_fields[str(loc[0])].annotation if len(loc) > 1 else Settings
    known = list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
    near = get_close_matches(str(loc[-1]), known, n=1)
    return f"there is no such option{f'; did you mean {near[0]!r}?' if near else ', but ' + ', '.join(known)}"


__all__ = [
    "Budget",
    "Chroma",
    "Cold",
    "Embedding",
    "Gemini",
    "Keep",
    "Knowledge",
    "Prompt",
    "Pruning",
    "Ranking",
    "Redis",
    "Retention",
    "Settings",
    "State",
    "Tasks",
    "Tiers",
    "explained",
]
