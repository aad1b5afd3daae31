"""Summaries by models that a program has already: LangChain's, LlamaIndex's, functions; and what they are told."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from google import genai
from google.genai.types import HttpOptions
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata, MockLLM

from neuralflow_memory.errors import ConfigError, SummarizerError
from neuralflow_memory.models.prompt import PROMPT, checked, instruction, transcript
from neuralflow_memory.models.prompted import PromptedSummarizer, as_summarizer
from neuralflow_memory.protocols import Summarizer
from neuralflow_memory.types import Message, Summary, ToolCall

sys.path.insert(0, str(Path(__file__).parent))
from gemini_server import Paced, answer, failure, gemini_server

CHAT = [
    Message("user", "Die Wohnung kostet 1.250 Euro.", name="Ada", created_at=datetime(2024, 3, 5, 9, 30, tzinfo=UTC)),
    Message("assistant", "Notiert."),
]
OWN = "Notes of {tokens} tokens, {words} words."


def summarize(model, *, previous="", max_tokens=300, **options):
    return PromptedSummarizer(model, **options).summarize(CHAT, previous=previous, max_tokens=max_tokens)


# -- what a model is told --


def test_the_instruction_says_how_long_and_in_which_language():
    """The limit stands in the instruction, in tokens and words, and the language is the conversation's."""
    told = instruction(PROMPT, max_tokens=750)
    assert "At most 750 tokens, about 500 words." in told
    assert "Write in the language that the conversation is mostly in" in told
    assert "{" not in told


@pytest.mark.parametrize(
    "template",
    [
        "",
        "Be brief.",
        "At most {tokens} tokens.",
        "{tokens} {words} {language}",
        "{tokens} {words} {}",
        "{tokens} {words} {0}",
        '{tokens} {words} as {"json": 1}',
        "{tokens} {words} }",
        "{tokens} {words.__class__}",
        "{tokens} {words!x}",
        "{tokens} {words:%Y}",
        "{tokens} {words:{more}}",
        7,
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(template):
    """A template without its placeholders, with others, or with loose braces fails when constructing."""
    with pytest.raises(ConfigError, match=r"\{tokens\} and \{words\} and no others"):
        PromptedSummarizer(len, prompt=template)


def test_a_prompt_of_ones_own_may_be_made_from_ours():
    """The default is public; adapted, it still fits."""
    own = checked(PROMPT.replace("Short plain lines", "Bullet points, {{as}} JSON"))
    assert "Bullet points, {as} JSON" in instruction(own, max_tokens=10)
    assert checked(None) == PROMPT


def test_notes_of_parts_are_given_as_such():
    """Summaries of parts stand among the messages, under a name of their own; other system messages don't."""
    messages = [
        Message("system", "Ada sucht\neine Wohnung.", metadata={"kind": "segment", "covered": 40}),
        Message("system", "Be kind.", metadata={"kind": "note"}),
        Message("user", "Hi", metadata={"kind": "segment"}),
        Message("assistant", "", tool_calls=[ToolCall("c", "find", {"q": "flat"})]),
        Message("tool", [{"type": "text", "text": "two"}, {"type": "image", "url": "x"}], tool_call_id="c"),
    ]
    lines = [json.loads(line) for line in transcript(messages, previous="Ada: neu").split("\n")]
    assert lines == [
        {"notes": "Ada: neu"},
        {"notes_of_part": "Ada sucht\neine Wohnung."},
        {"role": "system", "text": "Be kind."},
        {"role": "user", "text": "Hi"},
        {"role": "assistant", "text": "", "calls": [{"tool": "find", "args": {"q": "flat"}}]},
        {"role": "tool", "text": "two", "attached": ["image"]},
    ]
    for key in ("notes", "notes_of_part"):
        assert f'("{key}")' in PROMPT


# -- LangChain --


def test_a_langchain_chat_model_gets_system_and_human_message():
    """Instruction and transcript arrive as messages of their own; text, tokens and the reason come back."""
    given = []

    def asked(messages):
        given.extend(messages)
        return model

    said = AIMessage(
        " Ada: 1.250 Euro. ",
        usage_metadata={"input_tokens": 500, "output_tokens": 60, "total_tokens": 560},
        response_metadata={"finish_reason": "stop"},
    )
    model = GenericFakeChatModel(messages=iter([said]))
    summarizer = PromptedSummarizer(RunnableLambda(asked), name="notes", prompt=OWN)
    assert isinstance(summarizer, Summarizer)
    assert summarizer.name == "notes"
    summary = summarizer.summarize(CHAT, previous="Ada: sucht", max_tokens=300)
    assert summary == Summary("Ada: 1.250 Euro.", 500, 60)
    assert given == [
        ("system", "Notes of 300 tokens, 200 words."),
        ("human", transcript(CHAT, previous="Ada: sucht")),
    ]


@pytest.mark.parametrize(
    "model",
    [
        FakeListChatModel(responses=["Ada: 1.250 Euro."]),
        FakeListLLM(responses=["Ada: 1.250 Euro."]),
        FakeListChatModel(responses=["Ada: 1.250 Euro."]) | StrOutputParser(),
        FakeListChatModel(responses=["x"]).with_fallbacks([]) | RunnableLambda(lambda _: "Ada: 1.250 Euro."),
    ],
    ids=["chat model", "llm", "chain", "sequence"],
)
def test_any_langchain_model_or_chain_that_takes_messages(model):
    """Chat models, LLMs of plain text, and chains of them."""
    assert summarize(model) == Summary("Ada: 1.250 Euro.")


def test_an_llm_of_plain_text_reads_both_parts():
    """What a LangChain LLM is sent holds the instruction and the transcript."""
    seen = []

    class Recording(FakeListLLM):
        def _call(self, prompt, *args, **kwargs):
            seen.append(prompt)
            return super()._call(prompt, *args, **kwargs)

    summarize(Recording(responses=["ok"]), prompt=OWN)
    assert "Notes of 300 tokens" in seen[0]
    assert transcript(CHAT, previous="") in seen[0]


def test_content_blocks_are_read_without_thoughts():
    """Of an answer in blocks only the text counts, also where a message has no `text` of its own."""
    blocks = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "Ada: "},
        {"type": "text", "text": "1.250"},
    ]
    assert summarize(GenericFakeChatModel(messages=iter([AIMessage(blocks)]))).text == "Ada: 1.250"
    mixed = SimpleNamespace(content=["Ada: ", {"type": "reasoning", "text": "hm"}, {"type": "text", "text": "1.250"}])
    assert summarize(SimpleNamespace(invoke=lambda _: mixed)).text == "Ada: 1.250"


@pytest.mark.parametrize(
    "metadata",
    [
        {"finish_reason": "length"},
        {"finish_reason": "MAX_TOKENS"},
        {"finish_reason": "FinishReason.MAX_TOKENS"},
        {"stop_reason": "max_tokens"},
        {"done_reason": "length"},
        {"finish_reason": "content_filter"},
    ],
)
def test_a_cut_off_answer_is_a_failure_and_on_the_bill(metadata):
    """However a provider says that it stopped early; the tokens it took stand in the error."""
    usage = {"input_tokens": 500, "output_tokens": 60, "total_tokens": 560}
    said = AIMessage("Ada: 1.2", usage_metadata=usage, response_metadata=metadata)
    with pytest.raises(SummarizerError, match=r"GenericFakeChatModel returned a cut-off or refused summary") as failed:
        summarize(GenericFakeChatModel(messages=iter([said])))
    assert (failed.value.input_tokens, failed.value.output_tokens, failed.value.cost) == (500, 60, 0.0)


@pytest.mark.parametrize(
    "metadata", [{}, {"finish_reason": "stop"}, {"stop_reason": "end_turn"}, {"finish_reason": None}]
)
def test_a_finished_answer_is_none(metadata):
    """Reasons that mean the end, or none."""
    said = AIMessage("Ada: 1.250 Euro.", response_metadata=metadata)
    assert summarize(GenericFakeChatModel(messages=iter([said]))).text == "Ada: 1.250 Euro."


# -- LlamaIndex --


class Scripted(CustomLLM):
    """An LLM of LlamaIndex that returns what it was given, and keeps its last prompt."""

    response: CompletionResponse
    prompt: str = ""

    @property
    def metadata(self):
        return LLMMetadata()

    def complete(self, prompt, formatted=False, **kwargs):
        self.prompt = prompt
        return self.response

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


def test_a_llama_index_model_is_asked_in_messages():
    """Instruction and transcript arrive as a system and a user message; the mock echoes them."""
    assert summarize(MockLLM(max_tokens=3)) == Summary("text text text")
    echo = summarize(MockLLM(), prompt=OWN).text
    assert echo.startswith("system: Notes of 300 tokens, 200 words.\nuser: ")
    assert transcript(CHAT, previous="") in echo


def test_a_llama_index_completion_is_read():
    """A completion's text; tokens and the reason where the raw answer says them plainly, as mapping or object."""
    raw = {"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 500, "completion_tokens": 60}}
    model = Scripted(response=CompletionResponse(text="Ada: 1.250 Euro.", raw=raw))
    assert summarize(model) == Summary("Ada: 1.250 Euro.", 500, 60)
    assert transcript(CHAT, previous="") in model.prompt
    complete = SimpleNamespace(complete=lambda prompt: CompletionResponse(text=prompt[:5], raw=SimpleNamespace(**raw)))
    assert summarize(complete, prompt=OWN) == Summary("Notes", 500, 60)


@pytest.mark.parametrize(
    "raw",
    [
        {"choices": [{"finish_reason": "length"}], "usage": {"prompt_tokens": 500, "completion_tokens": 60}},
        {"stop_reason": "max_tokens", "usage": SimpleNamespace(input_tokens=500, output_tokens=60)},
        SimpleNamespace(
            choices=[SimpleNamespace(finish_reason="length")],
            usage=SimpleNamespace(prompt_tokens=500, completion_tokens=60),
        ),
    ],
)
def test_a_cut_off_completion_is_a_failure(raw):
    """The reasons of providers as LlamaIndex hands them on."""
    model = SimpleNamespace(complete=lambda prompt: CompletionResponse(text="Ada: 1.2", raw=raw))
    with pytest.raises(SummarizerError, match="cut-off") as failed:
        summarize(model)
    assert (failed.value.input_tokens, failed.value.output_tokens) == (500, 60)


def test_llama_index_need_not_be_there():
    """Neither library is imported, and a model that completes is asked in one text."""
    code = """
import sys
from types import SimpleNamespace
from neuralflow_memory.models.prompted import PromptedSummarizer
from neuralflow_memory.types import Message
model = SimpleNamespace(complete=lambda prompt: SimpleNamespace(text=prompt), chat=None)
summarizer = PromptedSummarizer(model, prompt="{tokens}, {words}")
print(summarizer.summarize([Message("user", "hi")], previous="", max_tokens=3).text)
assert not any(name.startswith(("langchain", "llama_index", "google.genai")) for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == '3, 2\n\n{"role": "user", "text": "hi"}\n'


# -- functions, and whatever else --


def test_a_function_gets_one_text():
    """Instruction, an empty line, the transcript."""
    seen = []

    def notes(text):
        seen.append(text)
        return "Ada: 1.250 Euro."

    assert summarize(notes, previous="Ada: sucht", prompt=OWN) == Summary("Ada: 1.250 Euro.")
    assert seen == ["Notes of 300 tokens, 200 words.\n\n" + transcript(CHAT, previous="Ada: sucht")]
    assert PromptedSummarizer(notes).name == "notes"


@pytest.mark.parametrize("returned", ["", " \n", None, 7, b"Ada", {"content": ""}, []])
def test_no_text_is_a_failure(returned):
    """What is empty or no text is never taken for a summary."""
    with pytest.raises(SummarizerError, match=r"<lambda> returned (an empty text|no text)"):
        summarize(lambda _: returned)


def test_a_long_answer_is_the_callers_to_judge():
    """The limit is asked for; whoever counts tokens decides."""
    assert summarize(lambda _: "word " * 5000, max_tokens=10).text == ("word " * 5000).strip()


class Down(FakeListChatModel):
    """A model that is out of service."""

    def _call(self, *args, **kwargs):
        raise ConnectionError("no route")


class Broken(MockLLM):
    """The same of LlamaIndex's."""

    def complete(self, *args, **kwargs):
        raise ConnectionError("no route")


def no_route(text):
    raise ConnectionError("no route")


@pytest.mark.parametrize(
    ("model", "name"), [(Down(responses=[]), "Down"), (Broken(), "Broken"), (no_route, "no_route")]
)
def test_a_model_that_fails(model, name):
    """Whatever it raises becomes a SummarizerError that names it, and has the cause."""
    with pytest.raises(SummarizerError, match=f"^{name} failed: ConnectionError: no route$") as failed:
        summarize(model, name="mine")
    assert isinstance(failed.value.__cause__, ConnectionError)
    assert failed.value.cost == 0.0


def test_a_function_that_streams():
    """A host's own function, here one that streams from the real SDK and counts tokens first."""
    malformed = b'data: {"candidates": [\r\n\r\n'
    parts = [answer("Ada: 1.250", reason=None), answer(" Euro.", usage=(500, 60))]
    with gemini_server(
        Paced(parts, pieces=7, pause=0.02), Paced(parts, pieces=2, pause=30), malformed, failure(503, "busy")
    ) as server:
        client = genai.Client(vertexai=False, api_key="k", http_options=HttpOptions(base_url=server.url, timeout=300))

        def streamed(text):
            assert client.models.count_tokens(model="gemini-3.5-flash-lite", contents=text).total_tokens > 10
            chunks = client.models.generate_content_stream(model="gemini-3.5-flash-lite", contents=text)
            return "".join(chunk.text or "" for chunk in chunks)

        assert summarize(streamed) == Summary("Ada: 1.250 Euro.")
        for trouble in ("ReadTimeout", "UnknownApiResponseError", "ServerError: 503"):
            with pytest.raises(SummarizerError, match=f"streamed failed: .*{trouble}"):
                summarize(streamed)
    assert server.requests[0]["path"].endswith(":streamGenerateContent?alt=sse")


# -- as_summarizer --


class Named:
    name = "mine"

    def summarize(self, messages, *, previous, max_tokens):
        return "ok"


class Unnamed:
    def summarize(self, messages, *, previous, max_tokens):
        return Summary(f"{len(messages)} {previous} {max_tokens}")


def test_a_summarizer_stays_as_it_is():
    """What has a name and summarizes is not wrapped; what lacks the name gets its class's."""
    named = Named()
    assert as_summarizer(named) is named
    summarizer = as_summarizer(Unnamed())
    assert isinstance(summarizer, Summarizer)
    assert summarizer.name == "Unnamed"
    assert summarizer.summarize(CHAT, previous="before", max_tokens=9) == Summary("2 before 9")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (FakeListChatModel(responses=["ok"]), "FakeListChatModel"),
        (FakeListLLM(responses=["ok"]), "FakeListLLM"),
        (MockLLM(max_tokens=1), "MockLLM"),
        (no_route, "no_route"),
    ],
)
def test_models_and_functions_become_summarizers(model, name):
    """Models of both libraries and functions, under their own names."""
    summarizer = as_summarizer(model)
    assert isinstance(summarizer, PromptedSummarizer)
    assert summarizer.name == name


async def asynchronous(text):
    return text


@pytest.mark.parametrize(
    "thing",
    [
        Named,
        Unnamed,
        FakeListChatModel,
        MockLLM,
        str,
        object(),
        "gemini",
        7,
        None,
        asynchronous,
        SimpleNamespace(chat=1),
    ],
)
def test_anything_else_is_refused(thing):
    """Classes in place of objects, coroutine functions, and what can't be asked."""
    for make in (as_summarizer, PromptedSummarizer):
        with pytest.raises(ConfigError, match=r"summarizer= takes .*an object with name and summarize"):
            make(thing)
