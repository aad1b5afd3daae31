"""Counts tokens: exactly with tiktoken where its files are on this machine, by estimate where not. Never downloads."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, brief
from ..protocols import TokenCounter

if TYPE_CHECKING:
    import tiktoken

_HOST = "https://openaipublic.blob.core.windows.net"
_P50K = (
    f"{_HOST}/encodings/p50k_base.tiktoken",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
)
_O200K = (
    f"{_HOST}/encodings/o200k_base.tiktoken",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
)
# What each encoding of tiktoken is made of: where it is published, and its sha256. tiktoken knows the same, but says it
# only while it is already downloading.
_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "cl100k_base": (
        (
            f"{_HOST}/encodings/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    ),
    "gpt2": (
        (
            f"{_HOST}/gpt-2/encodings/main/vocab.bpe",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
        (
            f"{_HOST}/gpt-2/encodings/main/encoder.json",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
    ),
    "o200k_base": (_O200K,),
    "o200k_harmony": (_O200K,),
    "p50k_base": (_P50K,),
    "p50k_edit": (_P50K,),
    "r50k_base": (
        (
            f"{_HOST}/encodings/r50k_base.tiktoken",
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
    ),
}

_PIECE = 100_000
_PER_CUT = 2
_MARGIN = 1.25
_loading = threading.Lock()


class EstimatedTokens(UserWarning):
    """Token counts are estimates, because the tokenizer's file is not on this machine."""


class TiktokenCounter:
    """Counts with a tiktoken encoding.

    Text of more than 100,000 characters is counted in pieces, cut at white space where there is some: on one run of
    1,000,000 characters tiktoken takes 0.4 s instead of 0.1, or overflows its stack. A cut elsewhere can hide a token
    or two, so two are added for each; the same text always counts the same.
    """

    exact = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name = encoding.name
        self._encode = encoding.encode_ordinary

    def count(self, text: str) -> int:
        """Tokens in *text*; text that looks like a special token counts as text."""
        if len(text) <= _PIECE:
            return len(self._encode(text))
        return sum(len(self._encode(piece)) + _PER_CUT for piece in _pieces(text)) - _PER_CUT


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        # A token takes the white space before it along, so a cut belongs before white space.
        cut = max(text.rfind(space, start + _PIECE // 2, start + _PIECE) for space in " \n")
        end = cut if cut > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


# Runs as byte-pair tokenizers see them, each with (tokens per run, tokens per character). Fitted to cl100k_base, the
# coarser of the two common encodings outside English; spaces between words cost nothing.
_RUNS: dict[str, tuple[str, float, float]] = {
    "word": (r"[A-Z]?[a-z]+|[A-Z]+", 0.5, 0.13),
    "digits": (r"[0-9]{1,3}", 1.0, 0.0),
    "latin": (r"[\u00aa-\u024f\u1e00-\u1eff]+", 1.25, 0.1),
    "greek": (r"[\u0370-\u03ff]+", 0.2, 0.85),
    "cyrillic": (r"[\u0400-\u052f]+", 0.35, 0.5),
    "han_kana_hangul": (r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+", 0.0, 1.15),
    "line": (r"[^\S ]+[ ]*|[ ]{2,}", 1.0, 0.0),
    "space": (r"[ ]", 0.0, 0.0),
    "mark": (r"[!-/:-@\[-`{-~]+", 0.6, 0.35),
    "astral": (r"[\U00010000-\U0010ffff]", 2.4, 0.0),
    "other": (r"[^\x00-\x7f]", 1.1, 0.0),
}
_RUN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, (pattern, _, _) in _RUNS.items()) + r"|(?s:(?P<rest>.))")
_COSTS = {name: (per_run, per_char) for name, (_, per_run, per_char) in _RUNS.items()} | {"rest": (1.0, 0.0)}


class ApproximateCounter:
    """Estimates tokens from runs of letters, digits and marks, with a quarter on top so that budgets still hold.

    Measured against cl100k_base: see `tests/test_tokens.py` for the band that is kept. Not for models whose
    tokenizer is finer than that one.
    """

    name = "approx"
    exact = False

    def count(self, text: str) -> int:
        """Estimated tokens in *text*; at least 1 unless it is empty."""
        total = 0.0
        for run in _RUN.finditer(text):
            per_run, per_char = _COSTS[run.lastgroup or "rest"]
            total += per_run + per_char * (run.end() - run.start())
        return max(1, round(total * _MARGIN)) if text else 0


def token_counter(encoding: str) -> TokenCounter:
    """Return the best counter for *encoding* that needs no network.

    Args:
        encoding: A tiktoken encoding, e.g. "cl100k_base", or "approx".

    Returns:
        An exact counter where the encoding's files lie in one of tiktoken's cache folders or in llama-index-core;
        otherwise an estimating one, with one `EstimatedTokens` warning.

    Raises:
        ConfigError: No such encoding.
    """
    if encoding == ApproximateCounter.name:
        return ApproximateCounter()
    if encoding not in _FILES:
        raise ConfigError(f"unknown tokenizer {brief(encoding)}; use one of {', '.join(sorted(_FILES))}, or approx")
    import tiktoken
    import tiktoken.registry

    if encoding in tiktoken.registry.ENCODINGS:
        return TiktokenCounter(tiktoken.registry.ENCODINGS[encoding])
    for folder in _folders():
        if all(_holds(folder, url=url, sha256=sha256) for url, sha256 in _FILES[encoding]):
            with _cache_folder(folder):
                return TiktokenCounter(tiktoken.get_encoding(encoding))
    wanted = " and ".join(f"{url} as {_file_name(url)}" for url, _ in _FILES[encoding])
    warnings.warn(
        f"token counts are estimates: the files of {encoding} are not on this machine, and nothing is downloaded. "
        f"For exact counts save {wanted} in a folder, and name the folder in TIKTOKEN_CACHE_DIR"
        f"{'; or pip install llama-index-core' if encoding in ('cl100k_base', 'o200k_base') else ''}. "
        f"tokenizer='approx' asks for estimates without this warning.",
        EstimatedTokens,
        stacklevel=2,
    )
    return ApproximateCounter()


def _folders() -> Iterator[Path]:
    """Where tiktoken's files may lie: its own cache folders, then the copies that llama-index-core brings along."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if folder := os.environ.get(variable):
            yield Path(folder)
    yield Path(tempfile.gettempdir(), "data-gym-cache")
    try:
        found = find_spec("llama_index.core")  # finds without importing, which would take seconds
    except ModuleNotFoundError:
        return
    if found is not None and found.origin:
        yield Path(found.origin).parent / "_static" / "tiktoken_cache"


def _file_name(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()


def _holds(folder: Path, *, url: str, sha256: str) -> bool:
    # Checked here because tiktoken deletes a file that doesn't match and downloads another.
    try:
        content = (folder / _file_name(url)).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == sha256


@contextmanager
def _cache_folder(folder: Path) -> Iterator[None]:
    """Point tiktoken at *folder*; it can be told in no other way."""
    name = "TIKTOKEN_CACHE_DIR"
    with _loading:
        before = os.environ.get(name)
        os.environ[name] = str(folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


__all__ = ["ApproximateCounter", "EstimatedTokens", "TiktokenCounter", "token_counter"]
