"""Who writes a summary: the summarizer, where it may and can; the floor, which needs no model, where not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import ExtractionError, SummarizerError
from ..rules.breaker import Breaker
from ..types import Entry, Extraction, Message, Summary, Superseding
from .parts import Parts

PATIENCE = 120.0  # seconds for one answer of the summarizer; then the floor writes the summary
_DAY = 86_400
T = TypeVar("T")
_LONG = 2  # times the limit, up to which too long an answer is cut to size instead of being refused


@dataclass(frozen=True, slots=True)
class Written:
    """A summary; who wrote it; and whether that was the floor in a model's place."""

    text: str
    by: str
    plain: bool


def plain(entry: Entry | None) -> bool:
    """Whether the floor wrote a summary, or a part of it, that a model was meant to write."""
    return entry is not None and bool(entry.metadata.get("plain"))


def summarizer_ready(parts: Parts) -> bool:
    """Whether there is a model to write summaries, and it may be asked now."""
    return parts.summarizer is not parts.floor and parts.breaker.allows(parts.clock().timestamp())


def written(parts: Parts, messages: Sequence[Message], *, previous: str, limit: int, session: int) -> Written:
    """*previous* with *messages* worked in, at most *limit* tokens; by the floor where the summarizer can't or may not.

    A message that is longer than the summarizer reads at a time is worked in piece by piece. What the summarizer takes is
    counted for *session*. This may wait `PATIENCE` seconds a call; hold no lock but that of the fold.
    """
    parts.tally["summarizer_calls"] += 1
    if parts.summarizer is parts.floor:
        return Written(
            parts.floor.summarize(messages, previous=previous, max_tokens=limit), parts.floor.name, plain=False
        )
    if limit > 0 and may_ask(parts, parts.summarizer.name, parts.breaker):
        try:
            text = previous
            for piece in _readable(parts, messages):
                text = _answer(parts, piece, text, limit, session)
            parts.breaker.succeeded()
            return Written(text, parts.summarizer.name, plain=False)
        except Exception as error:  # whatever a model or its client raises: the turns get a plainer summary
            name = parts.summarizer.name
            told = str(error) if isinstance(error, SummarizerError) else f"{type(error).__name__}: {error}"
            parts.trouble = f"{name}: {told.removeprefix(name).lstrip()}"
            parts.breaker.failed(parts.clock().timestamp())
    parts.tally["summarizer_fallbacks"] += 1
    return Written(
        parts.floor.summarize(messages, previous=previous, max_tokens=limit), parts.floor.name, plain=limit > 0
    )


def may_ask(parts: Parts, name: str, breaker: Breaker) -> bool:
    """Whether the *breaker* of the model *name* lets a call through, and today's money is not spent."""
    now = parts.clock().timestamp()
    cap, today = parts.settings.gemini.spend_cap, int(now // _DAY)
    if cap is not None and parts.ledger.spent(day=today)["cost"] >= cap:
        parts.trouble = f"{name}: today's gemini.spend_cap of {cap} US dollars is spent"
        breaker.block(now, until=(today + 1) * _DAY)
        return False
    return breaker.enter(now)


def _readable(parts: Parts, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """*messages* as they are; a single one that is too long in pieces of its text."""
    most = parts.settings.context.max_context_length
    if len(messages) > 1 or parts.count(messages[0]) <= most:
        yield messages
        return
    text, calls = messages[0].text, messages[0].tool_calls
    while text or calls:
        size = max(1, len(text) * most // max(1, parts.counter.count(text)))
        piece = replace(messages[0], content=text[:size], tool_calls=calls, payload={})
        while size > 1 and parts.count(piece) > most:
            size = size * 9 // 10
            piece = replace(piece, content=text[:size])
        yield [piece]
        text, calls = text[size:], ()


def _answer(parts: Parts, messages: Sequence[Message], previous: str, limit: int, session: int) -> str:
    """What the summarizer writes."""
    found = answered(
        parts,
        lambda: parts.summarizer.summarize(messages, previous=previous, max_tokens=limit),
        name=parts.summarizer.name,
        session=session,
    )
    text = found.text if isinstance(found, Summary) else found
    if not isinstance(text, str) or not text.strip():
        raise SummarizerError(f"{parts.summarizer.name} gave an empty summary")
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # half a pair can't be stored
    tokens = parts.counter.count(text)
    if tokens > limit * _LONG:
        raise SummarizerError(f"{parts.summarizer.name} gave a summary of {tokens} tokens, and {limit} were asked for")
    return text if tokens <= limit else parts.floor.summarize([], previous=text, max_tokens=limit)


def answered(parts: Parts, ask: Callable[[], T], *, name: str, session: int) -> T:
    """What the model *name* answers; an error when it takes longer than `PATIENCE`, and it is left to itself.

    What it takes is counted for *session*.
    """
    answer: Future[T] = Future()
    today = int(parts.clock().timestamp() // _DAY)

    def asking() -> None:
        took = Summary("")
        try:
            given = ask()
            took = _taken(given) if isinstance(given, Summary | Extraction | Superseding) else took
            failure = None
        except BaseException as error:  # a cancellation or exit in a model is the model's, not ours
            if isinstance(error, SummarizerError | ExtractionError):
                took = _taken(error)
            failure = error if isinstance(error, Exception) else SummarizerError(f"{name}: {error!r}")
        with suppress(Exception):  # the memory may have been closed meanwhile
            parts.ledger.spend(session, day=today, summary=took)  # before the next call is weighed
        if failure is None:
            answer.set_result(given)
        else:
            answer.set_exception(failure)

    threading.Thread(target=asking, name="neuralflow-model", daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except TimeoutError:
        if answer.done():
            raise  # the model's own
        raise SummarizerError(f"{name} gave no answer within {PATIENCE:g} seconds") from None


def _taken(by: Summary | Extraction | Superseding | SummarizerError | ExtractionError) -> Summary:
    return Summary("", by.input_tokens, by.output_tokens, by.cost)


__all__ = ["PATIENCE", "Written", "answered", "may_ask", "plain", "summarizer_ready", "written"]
