"""One transcript, two hosts: what goes in through one comes out equal there, and with the same meaning in the other."""

import copy
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from llama_index.core.base.llms import types as li

from neuralflow_memory import Message, ToolCall, open_memory
from neuralflow_memory.langchain import NeuralFlowChatMessageHistory, from_langchain, to_langchain
from neuralflow_memory.llama_index import NeuralFlowMemory, from_llama_index, to_llama_index

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 24

text = st.text(max_size=12)
name = st.none() | st.text(min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
json_objects = st.dictionaries(text, json_values, max_size=3)

# --- LangChain's messages -------------------------------------------------------------------------------------------

lc_blocks = st.one_of(
    text,
    st.fixed_dictionaries({"type": st.just("text"), "text": text}),
    st.fixed_dictionaries({"type": st.just("image"), "url": st.just("https://example.org/a.png")}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.just({"url": "https://example.org/a.png"})}),
    st.fixed_dictionaries({"type": st.just("audio"), "base64": st.just("AAAA"), "mime_type": st.just("audio/wav")}),
    st.fixed_dictionaries({"type": st.just("reasoning"), "reasoning": text}),
    st.fixed_dictionaries({"type": st.sampled_from(["tool_use", "thinking", "odd"]), "id": text, "value": json_values}),
    json_objects,
)
lc_common = {
    "content": text | st.lists(lc_blocks, max_size=3),
    "additional_kwargs": json_objects,
    "response_metadata": json_objects,
    "name": name,
    "id": name,
}
lc_calls = st.lists(st.fixed_dictionaries({"name": text, "args": json_objects, "id": name}), max_size=3)
lc_bad_calls = st.lists(
    st.fixed_dictionaries({"name": name, "args": st.none() | text, "id": name, "error": name}), max_size=2
)
tokens = st.integers(0, 1000)
lc_usage = st.none() | st.fixed_dictionaries({"input_tokens": tokens, "output_tokens": tokens, "total_tokens": tokens})
lc_messages = st.one_of(
    st.builds(HumanMessage, **lc_common),
    st.builds(SystemMessage, **lc_common),
    st.builds(AIMessage, **lc_common, tool_calls=lc_calls, invalid_tool_calls=lc_bad_calls, usage_metadata=lc_usage),
    st.builds(
        ToolMessage,
        **lc_common,
        tool_call_id=text,
        artifact=json_values,
        status=st.sampled_from(["success", "error"]),
    ),
    st.builds(ChatMessage, **lc_common, role=text),
    st.builds(FunctionMessage, **(lc_common | {"name": text})),
    st.builds(AIMessageChunk, content=text, id=name, usage_metadata=lc_usage),
)

# --- LlamaIndex's messages ------------------------------------------------------------------------------------------

opt_text = st.none() | text
host_values = st.recursive(
    json_values | st.binary(max_size=6), lambda v: st.lists(v, max_size=2) | st.dictionaries(text, v, max_size=2)
)
urls = st.sampled_from(["https://example.org/a.png", "https://example.org/ü?q=1", "data:text/plain;base64,aGk="])
mimes = st.sampled_from([None, "image/png", "video/mp4", "application/pdf"])
media = st.one_of(
    st.builds(li.ImageBlock, url=urls, image_mimetype=mimes, detail=opt_text),
    st.builds(li.ImageBlock, image=st.just(PNG) | st.binary(max_size=9), detail=opt_text),
    st.builds(li.AudioBlock, audio=st.binary(max_size=9), format=st.sampled_from([None, "mp3", "wav"])),
    st.builds(li.AudioBlock, url=urls),
    st.builds(li.VideoBlock, video=st.binary(max_size=9), video_mimetype=mimes, fps=st.none() | st.integers(1, 60)),
    st.builds(li.DocumentBlock, data=st.binary(max_size=9), title=opt_text, document_mimetype=mimes),
    st.builds(li.DocumentBlock, url=urls, title=opt_text),
    st.builds(li.DocumentBlock, path=st.just("notes.pdf")),
)
nested = st.builds(li.TextBlock, text=text) | st.builds(li.ImageBlock, url=urls)
li_blocks = st.one_of(
    st.builds(li.TextBlock, text=text),
    media,
    st.builds(li.CachePoint, cache_control=st.builds(li.CacheControl, type=st.just("ephemeral"))),
    st.builds(li.CitableBlock, title=text, source=text, content=st.lists(nested, max_size=2)),
    st.builds(
        li.CitationBlock,
        cited_content=nested,
        source=text,
        title=text,
        additional_location_info=st.dictionaries(text, st.integers(), max_size=2),
    ),
    st.builds(
        li.ThinkingBlock,
        content=opt_text,
        num_tokens=st.none() | st.integers(0, 99),
        additional_information=st.dictionaries(text, host_values, max_size=2),
    ),
    st.builds(li.ToolCallBlock, tool_call_id=opt_text, tool_name=text, tool_kwargs=json_objects | text),
)
openai_calls = st.lists(
    st.fixed_dictionaries(
        {"id": name, "type": st.just("function"), "function": st.fixed_dictionaries({"name": text, "arguments": text})}
    ),
    max_size=2,
)
li_kwargs = st.dictionaries(text, host_values, max_size=2) | st.fixed_dictionaries(
    {}, optional={"tool_calls": openai_calls | json_values, "tool_call_id": text, "name": json_values}
)
li_messages = st.builds(
    li.ChatMessage,
    role=st.sampled_from(li.MessageRole),
    blocks=st.lists(li_blocks, max_size=3),
    additional_kwargs=li_kwargs,
)

any_message = st.one_of(lc_messages.map(from_langchain), li_messages.map(from_llama_index))


def written_and_read(message):
    """What a store that keeps JSON gives back."""
    again = lambda value: json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    return replace(
        message,
        content=message.content if isinstance(message.content, str) else again(list(message.content)),
        tool_calls=[ToolCall(c.id, c.name, again(c.args)) for c in message.tool_calls],
        metadata=again(message.metadata),
        payload=again(message.payload),
    )


@given(lc_messages)
def test_every_langchain_message_comes_back_equal(message):
    """Content, ids, calls, metadata: nothing changes on the way through a store, and the original stays as it was."""
    before = copy.deepcopy(message)
    back = to_langchain(written_and_read(from_langchain(message)))
    assert back == message
    assert type(back) is type(message)
    assert message == before


@given(li_messages)
def test_every_llama_index_message_comes_back_equal(message):
    """Every kind of block, and bytes in what providers add, survive a store; the original stays as it was."""
    before = copy.deepcopy(message)
    back = to_llama_index(written_and_read(from_llama_index(message)))
    assert back == message
    assert message == before


@given(any_message)
def test_any_message_reaches_the_other_host(message):
    """Whatever one host accepts, the other can be given: same role, same words, same calls and results."""
    for convert, back in ((to_langchain, from_langchain), (to_llama_index, from_llama_index)):
        there = back(convert(replace(written_and_read(message), payload={})))
        assert there.role == message.role
        assert there.tool_calls == message.tool_calls
        assert there.tool_call_id == message.tool_call_id
        assert message.text.strip() in there.text


def test_what_was_edited_does_not_come_back_from_the_payload():
    """A redacted or cut text wins over the host's JSON of the message as it was."""
    secret = "my card is 4111 1111 1111 1111"
    for there, back in ((from_langchain, to_langchain), (from_llama_index, to_llama_index)):
        original = HumanMessage(secret) if there is from_langchain else li.ChatMessage(secret)
        redacted = replace(there(original), content="my card is [CARD]")
        assert back(redacted).content == "my card is [CARD]"
        assert "4111" not in repr(back(redacted))


def test_conversions_share_nothing_with_the_original():
    """Changing a message after it was converted, or one that came out, changes nothing else."""
    for there, back, original, fields in (
        (from_langchain, to_langchain, HumanMessage([{"type": "text", "text": "a"}]), "content"),
        (from_llama_index, to_llama_index, li.ChatMessage([li.TextBlock(text="a"), li.TextBlock(text="b")]), "blocks"),
    ):
        original.additional_kwargs["deep"] = {"list": [1]}
        message = there(original)
        original.additional_kwargs["deep"]["list"].append(2)
        out = back(message)
        out.additional_kwargs["deep"]["list"].append(3)
        getattr(out, fields).clear()
        again = back(message)
        assert again.additional_kwargs == {"deep": {"list": [1]}}
        assert len(getattr(again, fields)) == len(getattr(original, fields))


class ProviderObject:
    """Something a provider puts into a message, and JSON can't hold."""

    def __str__(self):
        return "a provider's object"


def test_what_is_not_json_becomes_text_and_is_flagged():
    """Neither an exception nor silence: the text stays, and the metadata names what was lost."""
    cycle = {}
    cycle["self"] = cycle
    for thing in (ProviderObject(), cycle):
        for message in (
            from_langchain(HumanMessage("hi", additional_kwargs={"x": thing})),
            from_llama_index(li.ChatMessage("hi", additional_kwargs={"x": thing})),
        ):
            assert message.text == "hi"
            assert message.metadata["unmapped"]
            json.dumps(message.payload)
    kept = to_langchain(from_langchain(HumanMessage("hi", additional_kwargs={"x": ProviderObject()})))
    assert kept.additional_kwargs == {"x": "a provider's object"}


@pytest.mark.parametrize("convert", [from_langchain, from_llama_index])
def test_halves_of_surrogate_pairs_are_mended(convert):
    """Models produce them; stored they would be an error, and the turn lost. Pairs are joined, lone halves replaced."""
    host = HumanMessage if convert is from_langchain else li.ChatMessage
    message = convert(host("a\ud83d\ude00b\ud83dc", additional_kwargs={"k\udc00": ["\udc00"], "n": float("-inf")}))
    assert message.text == "a😀b\ufffdc"
    assert message.metadata["unmapped"]
    json.dumps(message.payload, ensure_ascii=False, allow_nan=False).encode()


def test_an_open_stream_is_kept_as_its_bytes():
    """LlamaIndex lets media be streams: the bytes are stored, the stream stays where it was, a closed one is flagged."""
    stream = io.BytesIO(PNG)
    stream.seek(3)
    message = from_llama_index(li.ChatMessage([li.ImageBlock(image=stream)]))
    assert stream.tell() == 3
    assert to_llama_index(message).blocks[0].resolve_image().read() == PNG
    assert from_langchain(to_langchain(message)).content[0]["base64"] == message.content[0]["base64"]
    block = li.ImageBlock(image=stream, image_mimetype="image/png")
    stream.close()
    assert from_llama_index(li.ChatMessage([block])).metadata["unmapped"] == ["BytesIO"]


def test_calls_and_results_without_ids_still_belong_together():
    """Old function messages, and calls whose provider gave no id, get the same stable id on both sides."""
    call = AIMessage("", additional_kwargs={"function_call": {"name": "rain", "arguments": '{"city": "Graz"}'}})
    assert from_langchain(call).tool_calls[0].id == from_langchain(FunctionMessage("yes", name="rain")).tool_call_id
    block = li.ChatMessage(
        role="assistant", blocks=[li.ToolCallBlock(tool_name="rain", tool_kwargs='{"city": "Graz"}')]
    )
    result = from_llama_index(li.ChatMessage("yes", role="function", additional_kwargs={"name": "rain"}))
    assert from_llama_index(block).tool_calls == from_langchain(call).tool_calls
    assert from_llama_index(block).tool_calls[0].id == result.tool_call_id
    assert result.metadata["unmapped"] == ["tool_call_id"]


@pytest.mark.parametrize(
    ("role", "neutral"),
    [("bob", "user"), ("assistant", "assistant"), ("AI", "assistant"), ("developer", "developer"), ("tool", "tool")],
)
def test_custom_roles_map_onto_the_neutral_ones(role, neutral):
    """A speaker LangChain allows and nobody else knows speaks as a user elsewhere, and as itself at home."""
    message = from_langchain(ChatMessage("hi", role=role))
    assert message.role == neutral
    assert to_langchain(message).role == role


def test_a_developer_message_keeps_its_role_in_every_host():
    """LangChain notes it beside a system message; the role is not lost on the way."""
    message = Message("developer", "be brief")
    assert from_langchain(to_langchain(message)).role == "developer"
    assert from_llama_index(to_llama_index(message)).role == "developer"


@pytest.mark.parametrize("there", ["langchain", "llama_index"])
def test_the_mark_of_injected_context_survives_the_host(there):
    """What the memory put into a prompt is known again when the host hands it back."""
    block = Message("system", "Summary: …", metadata={"neuralflow": "context"})
    echo = from_langchain(to_langchain(block)) if there == "langchain" else from_llama_index(to_llama_index(block))
    assert echo.metadata["neuralflow"] == "context"


MEDIA = [
    {"type": "text", "text": "look"},
    {"type": "image", "url": "https://example.org/a.png", "mime_type": "image/png"},
    {"type": "image", "base64": "iVBORw0KGgo=", "mime_type": "image/png"},
    {"type": "audio", "base64": "SUQzBAA=", "mime_type": "audio/mpeg"},
    {"type": "video", "url": "https://example.org/a.mp4", "mime_type": "video/mp4"},
    {"type": "file", "base64": "JVBERi0xLjQK", "mime_type": "application/pdf"},
]


def test_media_keep_kind_source_and_type_across_hosts():
    """Image, audio, video and file become the other host's own blocks, not text."""
    there = to_llama_index(from_langchain(HumanMessage(MEDIA)))
    assert [b.block_type for b in there.blocks] == ["text", "image", "image", "audio", "video", "document"]
    assert there.blocks[1].url is not None
    assert there.blocks[2].resolve_image().read() == b"\x89PNG\r\n\x1a\n"
    assert there.blocks[5].resolve_document().read() == b"%PDF-1.4\n"
    back = to_langchain(from_llama_index(there))
    core = [{key: block[key] for key in MEDIA[i]} for i, block in enumerate(back.content)]
    assert core == MEDIA


# --- through the store ----------------------------------------------------------------------------------------------

CALLS = [
    {"id": "c1", "name": "weather", "args": {"city": "東京", "days": 2}},
    {"id": "c2", "name": "weather", "args": {"city": "Graz"}},
]
GOLDEN: list[BaseMessage] = [
    SystemMessage("You are terse."),
    HumanMessage("東京とグラーツの天気は？", name="ada"),
    AIMessage("", tool_calls=CALLS),
    ToolMessage("晴れ、21℃", tool_call_id="c1", name="weather"),
    ToolMessage("rain, 9 °C", tool_call_id="c2", name="weather"),
    AIMessage("Tokyo: sunny. Graz: rain.", id="answer-1"),
    HumanMessage(
        [{"type": "text", "text": "And here?"}, {"type": "image", "url": "https://example.org/sky.png"}], name="ada"
    ),
]


def meaning(message):
    """Role, name, words, media, calls and the call answered."""
    media = [] if isinstance(message.content, str) else [b["url"] for b in message.content if b["type"] != "text"]
    return message.role, message.name, message.text, media, list(message.tool_calls), message.tool_call_id


@pytest.fixture
def memory(tmp_path):
    with open_memory(tmp_path / "memory", embedder={"model": "none"}) as opened:
        yield opened


def test_the_golden_transcript_reads_the_same_in_both_hosts(memory):
    """In through LangChain, out of LlamaIndex, into a second session there, and back out of LangChain."""
    there, back = memory.session("there", user_id="ada"), memory.session("back", user_id="ada")
    NeuralFlowChatMessageHistory(there).add_messages(GOLDEN)
    in_llama_index = NeuralFlowMemory(there).get_all()
    said = [meaning(from_langchain(m)) for m in GOLDEN]
    assert [meaning(from_llama_index(m)) for m in in_llama_index] == said
    assert [b.tool_kwargs["city"] for b in in_llama_index[2].blocks] == ["東京", "Graz"]
    assert in_llama_index[3].additional_kwargs["tool_call_id"] == "c1"

    NeuralFlowMemory(back).put_messages(in_llama_index)
    in_langchain = NeuralFlowChatMessageHistory(back, view="all").messages
    assert [meaning(from_langchain(m)) for m in in_langchain] == said
    assert [type(m) for m in in_langchain] == [type(m) for m in GOLDEN]
    assert [{k: c[k] for k in ("id", "name", "args")} for c in in_langchain[2].tool_calls] == CALLS
    assert NeuralFlowChatMessageHistory(there, view="all").messages == GOLDEN


async def test_a_chat_begun_in_one_host_continues_in_the_other(memory):
    """Both adapters write into one conversation, and each sees all of it, in order."""
    session = memory.session("shared", user_id="ada")
    history, buffer = NeuralFlowChatMessageHistory(session, view="all"), NeuralFlowMemory(session)
    history.add_messages([HumanMessage("I moved to Graz."), AIMessage("Noted.")])
    assert [m.content for m in buffer.get()][-2:] == ["I moved to Graz.", "Noted."]
    await buffer.aput(li.ChatMessage("Where do I live?"))
    await buffer.aput(li.ChatMessage("In Graz.", role="assistant"))
    history = NeuralFlowChatMessageHistory(session, view="all")
    assert [m.content for m in await history.aget_messages()] == [
        "I moved to Graz.",
        "Noted.",
        "Where do I live?",
        "In Graz.",
    ]
    assert await buffer.aget_all() == buffer.get_all()
