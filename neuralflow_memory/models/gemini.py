"""Summaries by Gemini, through google-genai: Vertex AI with a project, the Gemini API with a key."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ExtractionError, MissingDependency, SummarizerError
from ..types import Entry, Extraction, Message, Summary, Superseding
from . import extraction, superseding
from .prompt import checked, instruction, transcript
from .prompted import read_findings, read_pairs, usage

try:
    import google.auth.credentials
    import google.auth.exceptions
    import httpx
    import tenacity
    from google import genai
    from google.genai import errors, types
except ImportError as e:
    raise MissingDependency("google-genai", "gemini", "Summarizing with Gemini") from e

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_ATTEMPTS = 3
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_ROOM = 2048
"""Output tokens beyond the summary's own: thoughts count as output, and tokenizers differ."""

# US dollars per million tokens, input and output (thoughts included), as on ai.google.dev/gemini-api/docs/pricing in
# October 2026. The 3.6 and 3.8 models cost half of it until the end of 2026: a spend cap errs on the safe side.
_PRICES = {
    "gemini-3.8-flash": (1.50, 7.50),
    "gemini-3.6-flash": (1.50, 7.50),
    "gemini-3.5-flash": (1.50, 9.00),
    "gemini-3.5-flash-lite": (0.30, 2.50),
    "gemini-3.1-flash-lite": (0.25, 1.50),
}
_FAMILY = re.compile(r"gemini-[\d.]+-(?:flash-lite|flash|pro)(?=$|-\d|-preview)")


class GeminiSummarizer:
    """Writes the running summary, and finds knowledge, with a Gemini model.

    Constructing it opens no connection; the client is made at the first call and kept.
    """

    def __init__(
        self,
        *,
        model: str = "gemini-3.5-flash-lite",
        project: str | None = None,
        location: str | None = None,
        api_key: str | None = None,
        credentials: Credentials | None = None,
        base_url: str | None = None,
        timeout: float = 35.0,
        client: genai.Client | None = None,
        prompt: str | None = None,
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        """Say which model, and how to reach it.

        With neither a project, nor a key, nor a client, it takes the project, location and credentials that
        `google.cloud.aiplatform.init` was given, if the program has called it; what is given here wins.

        Args:
            model: A model id. Google retires models after about a year; ids that end in "latest" change under you.
            project: The Google Cloud project, for Vertex AI. Wins over *api_key*.
            location: The Vertex AI location, "global" by default.
            api_key: A key of the Gemini API, used without a project.
            credentials: For Vertex AI; None takes the application default credentials.
            base_url: Another endpoint, e.g. a proxy.
            timeout: Seconds of silence after which an attempt is given up; there are up to three.
            client: A ready client, instead of everything above but *model*; its own timeout applies.
            prompt: The instruction, with the placeholders {tokens} and {words}; None takes `prompt.PROMPT`.
            input_price: US dollars per million input tokens; None: what is known of the model, else 0.
            output_price: The same, of output tokens.

        Raises:
            ConfigError: Neither a project, nor a key, nor a client, and no project from `aiplatform.init`; or a prompt
                that lacks a placeholder or has others.
        """
        if client is None and not project and not api_key:
            given = initialized()
            if given is None:
                raise ConfigError(
                    "Gemini needs a project (for Vertex AI) or an API key: set gemini.project or gemini.api_key, or call "
                    "google.cloud.aiplatform.init(project=...) first"
                )
            project, location, credentials = given[0], location or given[1], credentials or given[2]
        family = _FAMILY.match(model.rpartition("/")[2])
        known = _PRICES.get(family[0], (0.0, 0.0)) if family else (0.0, 0.0)
        self._input_price = known[0] if input_price is None else input_price
        self._output_price = known[1] if output_price is None else output_price
        self.priced = bool(self._input_price or self._output_price)
        """Whether it is known what a call costs."""
        self._prompt = checked(prompt)
        self.name = f"gemini:{model}"
        self._model = model
        self._client = client
        self._lock = threading.Lock()
        self._options: dict[str, Any] = {"http_options": _http(base_url=base_url, timeout=timeout)}
        if project:
            # google-genai leaves given credentials as they are; a service account's get no token without a scope.
            scoped = google.auth.credentials.with_scopes_if_required(credentials, [_SCOPE])  # type: ignore[no-untyped-call]
            self._options |= {"vertexai": True, "project": project, "location": location or "global"}
            self._options |= {"credentials": scoped}
        else:
            self._options |= {"vertexai": False, "api_key": api_key}

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> Summary:
        """Return new notes from *previous* and *messages*, with what they cost.

        *max_tokens* is asked for, not enforced: Gemini counts otherwise than other tokenizers do.

        Raises:
            SummarizerError: No answer after three attempts, an answer that is empty or was cut off or blocked (what it
                cost all the same is in the error's attributes), no credentials, or a model that doesn't exist (any more).
        """
        return self._answer(
            instruction(self._prompt, max_tokens=max_tokens),
            transcript(messages, previous=previous),
            max_output_tokens=max_tokens * 2 + _ROOM,
        )

    def extract(self, messages: Sequence[Message]) -> Extraction:
        """Return the knowledge that *messages* hold, with what it cost.

        Raises:
            ExtractionError: As `summarize` raises; or an answer that is no array of facts.
        """
        try:
            answer = self._answer(
                extraction.PROMPT,
                extraction.material(messages),
                max_output_tokens=extraction.MOST_TOKENS + _ROOM,
                response_mime_type="application/json",
            )
        except SummarizerError as e:
            raise ExtractionError(str(e), **usage(e)) from e
        return read_findings(self.name, answer, messages)

    def supersede(self, new: Sequence[Entry], known: Sequence[Entry]) -> Superseding:
        """Return which of the facts *known* don't hold any more because of *new* ones, with what it cost.

        Raises:
            ExtractionError: As `summarize` raises; or an answer that can't be read, or names facts that it was not given.
        """
        try:
            answer = self._answer(
                superseding.PROMPT,
                superseding.material(new, known),
                max_output_tokens=superseding.MOST_TOKENS + _ROOM,
                response_mime_type="application/json",
                response_json_schema=superseding.SCHEMA,
            )
        except SummarizerError as e:
            raise ExtractionError(str(e), **usage(e)) from e
        return read_pairs(self.name, answer, new, known)

    def _answer(self, system: str, contents: str, **options: Any) -> Summary:
        config = types.GenerateContentConfig(
            system_instruction=system, thinking_config=_thinking(self._model), **options
        )
        return self._checked(self._asked(contents, config))

    def reply(self, messages: Sequence[Message]) -> str:
        """Answer a prompt, as the command `chat` does; system messages are the model's instruction.

        Raises:
            SummarizerError: As `summarize`.
        """
        system = "\n\n".join(m.text for m in messages if m.role in ("system", "developer"))
        contents = [
            types.Content(role="model" if m.role == "assistant" else "user", parts=[types.Part(text=m.text)])
            for m in messages
            if m.role not in ("system", "developer") and m.text
        ]
        config = types.GenerateContentConfig(system_instruction=system or None, thinking_config=_thinking(self._model))
        return self._checked(self._asked(contents, config)).text

    def _asked(self, contents: Any, config: types.GenerateContentConfig) -> types.GenerateContentResponse:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=4),
            retry=tenacity.retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            client = self._connected()
            return retrying(client.models.generate_content, model=self._model, contents=contents, config=config)
        except (
            errors.APIError,
            httpx.HTTPError,
            google.auth.exceptions.GoogleAuthError,
            OSError,  # connections, and the builtin TimeoutError
            ValueError,  # what can't be read: malformed JSON, an unknown shape, a client that lacks an option
            RuntimeError,  # a client that was closed
        ) as e:
            raise SummarizerError(self._explained(e)) from e

    def _connected(self) -> genai.Client:
        with self._lock:
            if self._client is None:
                self._client = genai.Client(**self._options)
            return self._client

    def _explained(self, error: Exception) -> str:
        if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
            return (
                f"{self.name} found no Google Cloud credentials: run `gcloud auth application-default login`, or name "
                "a service account's file in GOOGLE_APPLICATION_CREDENTIALS, or set gemini.api_key without a project"
            )
        if isinstance(error, errors.APIError) and error.code == 404:
            return (
                f"{self.name} was not found: the model may be retired, or not offered at this location; set another "
                f"in gemini.model (NEURALFLOW_GEMINI__MODEL). The service said: {error.message}"
            )
        return f"{self.name} failed: {type(error).__name__}: {error}"

    def _checked(self, answer: types.GenerateContentResponse) -> Summary:
        candidate = answer.candidates[0] if answer.candidates else None
        parts = (candidate.content.parts if candidate and candidate.content else None) or []
        text = "".join(part.text for part in parts if part.text and not part.thought).strip()
        reason = candidate.finish_reason if candidate else None
        bill = self._bill(answer.usage_metadata)
        if text and reason in (types.FinishReason.STOP, None):
            return Summary(text, **bill)
        blocked = answer.prompt_feedback.block_reason if answer.prompt_feedback else None
        why = blocked or reason
        what = "a cut-off or refused answer" if text else "no text"
        raise SummarizerError(f"{self.name} returned {what} (reason: {why.value if why else 'none given'})", **bill)

    def _bill(self, usage: types.GenerateContentResponseUsageMetadata | None) -> dict[str, Any]:
        """What a call took, as fields of a `Summary` and attributes of a `SummarizerError`."""
        asked = (usage.prompt_token_count if usage else None) or 0
        written = ((usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)) if usage else 0
        cost = (asked * self._input_price + written * self._output_price) / 1e6
        return {"input_tokens": asked, "output_tokens": written, "cost": cost}


def initialized() -> tuple[str, str | None, Credentials | None] | None:
    """Project, location and credentials as the program gave them to `google.cloud.aiplatform.init`.

    None when it gave no project. Imports nothing, and asks nobody.
    """
    config = getattr(sys.modules.get("google.cloud.aiplatform.initializer"), "global_config", None)
    # Its public properties would look for what is missing in the environment and through google.auth, over the network.
    project, location, credentials = (
        getattr(config, f"_{name}", None) for name in ("project", "location", "credentials")
    )
    return (project, location, credentials) if project else None


def _http(*, base_url: str | None, timeout: float) -> types.HttpOptions:
    return types.HttpOptions(base_url=base_url, timeout=round(timeout * 1000))


def _thinking(model: str) -> types.ThinkingConfig | None:
    """As little thinking as the model allows, so that thoughts leave the output its room.

    Gemini 2.5 takes a budget in tokens (the pro model at least 128), later ones a level; "minimal" is refused by the
    larger ones. Other models (tuned ones, Gemma) get no setting.
    """
    family = model.rpartition("/")[2]
    if family.startswith("gemini-2.5"):
        return types.ThinkingConfig(thinking_budget=128 if "pro" in family else 0)
    if family.startswith("gemini-"):
        lite = "lite" in family
        return types.ThinkingConfig(thinking_level=types.ThinkingLevel.MINIMAL if lite else types.ThinkingLevel.LOW)
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, errors.APIError):
        return error.code in _TRANSIENT
    return isinstance(error, httpx.TransportError | TimeoutError | google.auth.exceptions.TransportError)


__all__ = ["GeminiSummarizer", "initialized"]
