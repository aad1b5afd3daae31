"""Summaries by the models that a program has already: LangChain's, LlamaIndex's, or a function of its own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import ConfigError, ExtractionError, SummarizerError, brief
from ..protocols import Extractor, Summarizer
from ..types import Entry, Extraction, Message, Summary, Superseding
from . import extraction, superseding
from .prompt import checked, instruction, transcript

_UNFINISHED = {"length", "max_tokens", "max_output_tokens", "content_filter", "safety", "refusal"}
_REASONS = ("finish_reason", "stop_reason", "done_reason")
_INPUT = ("input_tokens", "prompt_tokens")
_OUTPUT = ("output_tokens", "completion_tokens")


class PromptedSummarizer:
    """Writes the running summary, and finds knowledge, with any model that takes text.

    That is: a LangChain chat model, LLM or other `Runnable` that takes messages; a LlamaIndex `LLM`; or a function from
    one text to another. Neither library is imported.
    """

    priced = False
    """What a call costs is not known."""

    def __init__(self, model: Any, *, prompt: str | None = None, name: str | None = None) -> None:
        """Say which model, and what it is told.

        Args:
            model: The model, or the function.
            prompt: The instruction, with the placeholders {tokens} and {words}; None takes `prompt.PROMPT`.
            name: What reports call it; by default the name of its class, or of the function.

        Raises:
            ConfigError: It is none of these, or a prompt that lacks a placeholder or has others.
        """
        self._ask = _asking(model)
        self._prompt = checked(prompt)
        self._called = _called(model)
        self.name = name or self._called

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> Summary:
        """Return new notes from *previous* and *messages*, with the tokens they took where the model says so.

        *max_tokens* is asked for, not enforced.

        Raises:
            SummarizerError: Whatever the model raised, or an answer that is no text, empty or cut off (what it took all
                the same is in the error's attributes).
        """
        return self._answer(
            instruction(self._prompt, max_tokens=max_tokens), transcript(messages, previous=previous), what="summary"
        )

    def extract(self, messages: Sequence[Message]) -> Extraction:
        """Return the knowledge that *messages* hold, with the tokens that it took.

        Raises:
            ExtractionError: Whatever the model raised, or an answer that is cut off or no array of facts.
        """
        try:
            answer = self._answer(extraction.PROMPT, extraction.material(messages), what="answer")
        except SummarizerError as e:
            raise ExtractionError(str(e), **usage(e)) from e
        return read_findings(self._called, answer, messages)

    def supersede(self, new: Sequence[Entry], known: Sequence[Entry]) -> Superseding:
        """Return which of the facts *known* don't hold any more because of *new* ones, with the tokens that it took.

        Raises:
            ExtractionError: Whatever the model raised, or an answer that is cut off, or names facts that it was not given.
        """
        try:
            answer = self._answer(superseding.PROMPT, superseding.material(new, known), what="answer")
        except SummarizerError as e:
            raise ExtractionError(str(e), **usage(e)) from e
        return read_pairs(self._called, answer, new, known)

    def _answer(self, system: str, user: str, *, what: str) -> Summary:
        try:
            answer = self._ask(system, user)
            if isinstance(answer, Summary):
                return answer
            text, reason, took = _read(answer)
        except Exception as e:  # a model may raise anything
            raise SummarizerError(f"{self._called} failed: {type(e).__name__}: {e}") from e
        if text is None:
            raise SummarizerError(f"{self._called} returned no text but {brief(answer)}", **took)
        if not text.strip() or reason.lower() in _UNFINISHED:
            what = f"a cut-off or refused {what}" if text.strip() else "an empty text"
            raise SummarizerError(f"{self._called} returned {what} (reason: {reason or 'none given'})", **took)
        return Summary(text.strip(), **took)


def as_summarizer(thing: Any) -> Summarizer:
    """Return *thing* if it is a summarizer, else one made of it: of a model, of a function, of what lacks but a name.

    Raises:
        ConfigError: It can't be made one, or is a class instead of an object.
    """
    if not isinstance(thing, type) and callable(getattr(thing, "summarize", None)) and not _is_async(thing.summarize):
        named = isinstance(getattr(thing, "name", None), str) and thing.name
        return cast("Summarizer", thing) if named else _Named(_called(thing), thing.summarize)
    return PromptedSummarizer(thing)


def as_extractor(thing: Any) -> Extractor:
    """Return *thing* if it is an extractor, else one made of it: of a model, or of a function.

    Raises:
        ConfigError: It can't be made one, or is a class instead of an object.
    """
    if not isinstance(thing, type) and callable(getattr(thing, "extract", None)) and not _is_async(thing.extract):
        named = isinstance(getattr(thing, "name", None), str) and thing.name
        return (
            cast("Extractor", thing)
            if named
            else _NamedExtractor(_called(thing), thing.extract, getattr(thing, "supersede", None))
        )
    try:
        return PromptedSummarizer(thing)
    except ConfigError:
        raise ConfigError(
            'extractor= takes "gemini", an object with name and extract, a LangChain or LlamaIndex model, or a function from '
            f"text to text, none of them async; not {brief(thing)}"
        ) from None


def read_findings(name: str, answer: Summary, messages: Sequence[Message]) -> Extraction:
    """What the model *name* says it has found; `ExtractionError` where that can't be read."""
    try:
        facts = extraction.findings(answer.text, messages)
    except ValueError as e:
        raise ExtractionError(f"{name} returned no facts that can be read: {e}", **usage(answer)) from e
    return Extraction(facts, **usage(answer))


def read_pairs(name: str, answer: Summary, new: Sequence[Entry], known: Sequence[Entry]) -> Superseding:
    """What the model *name* says of facts; `ExtractionError` where that can't be read, or is about others."""
    try:
        found = superseding.pairs(answer.text, new=len(new), known=len(known))
    except ValueError as e:
        raise ExtractionError(
            f"{name} returned nothing that can be read of what is replaced: {e}", **usage(answer)
        ) from e
    return Superseding(found, **usage(answer))


def usage(taken: Summary | SummarizerError) -> dict[str, Any]:
    """What a call took, as fields of an `Extraction` and attributes of an `ExtractionError`."""
    return {name: getattr(taken, name) for name in ("input_tokens", "output_tokens", "cost")}


@dataclass(slots=True)
class _NamedExtractor:
    name: str
    extract: Callable[..., Extraction]
    supersede: Callable[..., Superseding] | None


@dataclass(slots=True)
class _Named:
    name: str
    summarize: Callable[..., str | Summary]


def _called(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def _asking(model: Any) -> Callable[[str, str], Any]:
    """How *model* is called with an instruction and a transcript."""
    if not isinstance(model, type | str) and not _is_async(model):
        if callable(getattr(model, "invoke", None)):  # LangChain; models that take a string are given these as one
            return lambda system, user: model.invoke([("system", system), ("human", user)])
        if callable(getattr(model, "complete", None)):
            return lambda system, user: _asked_llama_index(model, system, user)
        if callable(model):
            return lambda system, user: model(f"{system}\n\n{user}")
    raise ConfigError(
        'summarizer= takes "gemini", "extractive", an object with name and summarize, a LangChain or LlamaIndex model, or '
        f"a function from text to text, none of them async; not {brief(model)}"
    )


def _is_async(called: Any) -> bool:
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004


def _asked_llama_index(model: Any, system: str, user: str) -> Any:
    # Whoever has made an LLM of LlamaIndex has loaded the module of its messages.
    message = getattr(sys.modules.get("llama_index.core.base.llms.types"), "ChatMessage", None)
    if message is None or not callable(getattr(model, "chat", None)):
        return model.complete(f"{system}\n\n{user}")
    return model.chat([message(role="system", content=system), message(role="user", content=user)])


def _read(answer: Any) -> tuple[str | None, str, dict[str, int]]:
    """The text of a model's answer, why it ended, and the tokens it took; "" and 0 where that is not said."""
    raw = _get(answer, "response_metadata") or _get(answer, "raw")
    usage = _get(answer, "usage_metadata") or _get(raw, "usage")
    return (
        _text(_get(answer, "message") or answer),
        _reason(raw),
        {"input_tokens": _tokens(usage, _INPUT), "output_tokens": _tokens(usage, _OUTPUT)},
    )


def _text(answer: Any) -> str | None:
    if isinstance(answer, str):
        return answer
    text, content = getattr(answer, "text", None), getattr(answer, "content", None)
    if isinstance(text, str) or isinstance(content, str):
        return text if isinstance(text, str) else content
    if isinstance(content, Sequence):
        texts = (
            block if isinstance(block, str) else _get(block, "type") == "text" and _get(block, "text")
            for block in content
        )
        return "".join(text for text in texts if text)
    return None


def _reason(raw: Any) -> str:
    first = next(iter(_get(raw, "choices") or ()), None)
    found = (_get(holder, name) for holder in (raw, first) for name in _REASONS)
    reason = next((r for r in found if r), "")
    return str(getattr(reason, "value", reason)).rpartition(".")[2]


def _tokens(usage: Any, names: Sequence[str]) -> int:
    return next((n for name in names if isinstance(n := _get(usage, name), int)), 0)


def _get(holder: Any, name: str) -> Any:
    """A field of a mapping or of an object, None where there is none."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


__all__ = ["PromptedSummarizer", "as_extractor", "as_summarizer", "read_findings", "read_pairs", "usage"]
