"""LlamaIndex's agents and workflows on our memory, with a scripted model: what they are shown, and what they leave behind."""

import asyncio
import copy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, CodeActAgent, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.memory import Memory
from scripted_llm import scripted

from neuralflow_memory import open_memory
from neuralflow_memory.llama_index import NeuralFlowChatStore, NeuralFlowMemory, NeuralFlowMemoryBlock


@pytest.fixture
def memory(tmp_path, monkeypatch):
    # By the environment, as a host that reopens the folder by itself reads it too.
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    with open_memory(tmp_path / "memory") as opened:
        yield opened


@pytest.fixture
def buffer(memory):
    return NeuralFlowMemory(memory.session("chat", user_id="ada"))


def said(messages):
    return [(m.role.value, m.content or "") for m in messages]


def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


def call(name, **kwargs):
    block = ToolCallBlock(tool_call_id=f"c-{name}", tool_name=name, tool_kwargs=kwargs)
    return ChatMessage(role="assistant", blocks=[block])


THOUGHT = 'Thought: I must look.\nAction: weather\nAction Input: {"city": "Graz"}'
ANSWER = "Thought: I can answer without using any more tools.\nAnswer: Rain in Graz."


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_reasoning_agent_remembers(buffer, streaming):
    """`ReActAgent` leaves its question and its whole reasoning, and is shown both in the next run."""
    script, llm = scripted(THOUGHT, ANSWER, ANSWER, stream=streaming)
    agent = ReActAgent(tools=[weather], llm=llm, streaming=streaming)
    await agent.run("Weather in Graz?", memory=buffer)
    stored = said(buffer.get_all())
    assert [role for role, _ in stored] == ["user", "assistant"]
    assert stored[0][1] == "Weather in Graz?"
    assert "rain in Graz" in stored[1][1]
    await agent.run("And now?", memory=buffer)
    assert said(script.shown[-1])[-3:] == [*stored, ("user", "And now?")]


@pytest.mark.parametrize("make", [ReActAgent, FunctionAgent])
async def test_an_agent_with_instructions_is_shown_tasks_and_summary(memory, buffer, make):
    """What the memory puts first in its messages reaches the model, beside the agent's own instructions."""
    script, llm = scripted(ANSWER)
    agent = make(tools=[weather], llm=llm, system_prompt="Be terse.", streaming=False)
    with memory.session("chat", user_id="ada").task("book flight") as task:
        task.note("prefers an aisle seat")
        await agent.run("And now?", memory=buffer)
    told = " ".join(m.content for m in script.shown[0] if m.role.value == "system")
    assert "Be terse." in told
    assert "aisle seat" in told


async def test_an_agent_that_writes_code_remembers(buffer):
    """`CodeActAgent` stores its code and what that printed."""
    script, llm = scripted("<execute>print(6 * 7)</execute>", "It is 42.", stream=True)
    agent = CodeActAgent(code_execute_fn=lambda code: "42", llm=llm)
    await agent.run("What is 6 times 7?", memory=buffer)
    assert next(role for role, _ in said(buffer.get_all())) == "user"
    assert buffer.get_all()[-1].content == "It is 42."
    await agent.run("Sure?", memory=buffer)
    shown = said(script.shown[-1])
    assert ("assistant", "It is 42.") in shown
    assert any("print(6 * 7)" in text for _, text in shown)


async def test_agents_of_a_workflow_share_the_memory(buffer):
    """What one agent heard, the agent that it hands over to is shown, and the next run too."""
    script, llm = scripted(
        call("handoff", to_agent="forecaster", reason="it knows"), call("weather", city="Graz"), "Rain in Graz."
    )
    clerk = FunctionAgent(
        name="clerk", description="asks", tools=[], llm=llm, can_handoff_to=["forecaster"], streaming=False
    )
    forecaster = FunctionAgent(name="forecaster", description="knows", tools=[weather], llm=llm, streaming=False)
    workflow = AgentWorkflow(agents=[clerk, forecaster], root_agent="clerk", initial_state={"mood": "good"})
    await workflow.run("I am Ada. Weather in Graz?", memory=buffer)
    assert "I am Ada. Weather in Graz?" in " ".join(text for _, text in said(script.shown[1]))
    stored = said(buffer.get_all())
    assert stored[0] == ("user", "I am Ada. Weather in Graz?")
    assert stored[-1] == ("assistant", "Rain in Graz.")
    assert ("tool", "rain in Graz") in stored
    assert "mood" in " ".join(text for _, text in said(script.shown[0]))
    assert "mood" not in " ".join(text for _, text in stored)

    await workflow.run("Who am I?", memory=buffer)
    assert ("user", "I am Ada. Weather in Graz?") in said(script.shown[-1])


async def test_state_prompts_of_many_runs_do_not_pile_up(buffer):
    """Each run writes its state into what it was shown; no run finds another's."""
    script, llm = scripted()
    for n in range(3):
        agent = FunctionAgent(tools=[weather], llm=llm, initial_state={"mood": f"mood {n}"}, streaming=False)
        await agent.run(f"question {n}", memory=buffer)
    for n, shown in enumerate(script.shown):
        assert "".join(text for _, text in said(shown)).count("mood ") == 1
        assert f"mood {n}" in shown[-1].content
    assert [text for role, text in said(buffer.get_all()) if role == "user"] == [f"question {n}" for n in range(3)]


async def test_a_given_history_and_a_message_with_an_image(buffer):
    """`run(chat_history=..., user_msg=ChatMessage)` goes on from the history; the message is stored whole."""
    script, llm = scripted("A boat.")
    past = [ChatMessage("I am Ada."), ChatMessage("Hello Ada.", role="assistant")]
    asked = ChatMessage(blocks=[TextBlock(text="What is this?"), ImageBlock(url="https://example.org/a.png")])
    agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
    await agent.run(user_msg=copy.deepcopy(asked), chat_history=past, memory=buffer)
    assert script.shown[0] == buffer.get_all()[:3] == [*past, asked]


async def test_an_agent_far_into_a_chat_is_shown_whole_calls(memory):
    """However little room there is: a call with its results or neither, and first a user turn after the system's."""
    buffer = NeuralFlowMemory(memory.session("chat"), token_limit=400)
    script, llm = scripted()
    for n in range(12):
        script.answers = [call("weather", city=f"Graz {n} " + "so far away " * (n % 5) * 6), f"Rain {n}."]
        agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
        await agent.run(f"Weather in Graz {n}?", memory=buffer)
    for shown in script.shown:
        first = next(m for m in shown if m.role.value != "system")
        assert first.role.value == "user"
        called = [b.tool_call_id for m in shown for b in m.blocks if isinstance(b, ToolCallBlock)]
        answered = [m.additional_kwargs["tool_call_id"] for m in shown if m.role.value == "tool"]
        assert called == answered
        assert any("Weather in Graz" in m.content for m in shown if m.role.value == "user")


def test_successive_loops_and_threads_share_one_memory(memory):
    """An agent run in each of several `asyncio.run`, in a row and in threads: every chat is whole and its own."""
    _, llm = scripted()

    def run(n):
        agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
        buffer = NeuralFlowMemory(memory.session(f"chat {n % 4}"))

        async def go():
            await agent.run(f"question {n}", memory=buffer)

        asyncio.run(go())

    for n in range(4):
        run(n)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4, 12)))
    for chat in range(4):
        stored = memory.session(f"chat {chat}").messages()
        asked = {m.text for m in stored if m.role == "user"}
        assert asked == {f"question {n}" for n in range(chat, 12, 4)}
        assert len(stored) == 6


async def test_one_agent_serves_many_people_at_once(memory):
    """A shared agent, each run with its own person's memory: nobody is shown another's words."""
    script, llm = scripted()
    agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
    people = [f"person {n}" for n in range(5)]

    async def talk(person):
        for n in range(4):
            await agent.run(f"{person} says {n}", memory=NeuralFlowMemory(memory.session("chat", user_id=person)))

    await asyncio.gather(*map(talk, people))
    assert len(script.shown) == 20
    for shown in script.shown:
        heard = {person for person in people for m in shown if m.role.value == "user" and person in m.content}
        assert len(heard) == 1


async def test_an_agent_runs_on_the_hosts_memory_with_our_store_and_block(memory):
    """`Memory` over our chat store and block, through an agent with tools: all of it is remembered in the next session."""
    parts = {
        "chat_store": NeuralFlowChatStore(memory=memory, user_id="ada"),
        "memory_blocks": [NeuralFlowMemoryBlock(memory=memory, user_id="ada")],
    }
    script, llm = scripted(call("weather", city="Graz"), "Rain in Graz.")
    agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
    await agent.run("Weather in Graz?", memory=Memory.from_defaults("monday", **parts))
    roles = [m.role for m in memory.session("monday", user_id="ada").messages()]
    assert roles == ["user", "assistant", "tool", "assistant"]
    await agent.run("What was the weather in Graz?", memory=Memory.from_defaults("tuesday", **parts))
    assert "rain in Graz" in script.shown[-1][0].content


RESUMED = textwrap.dedent(
    """
    import asyncio, json, pickle, sys
    from pathlib import Path

    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
    from llama_index.core.llms.mock import MockFunctionCallingLLM
    from llama_index.core.workflow import Context, HumanResponseEvent, InputRequiredEvent, JsonSerializer
    from neuralflow_memory import open_memory
    from neuralflow_memory.llama_index import NeuralFlowMemory

    def reply(messages, **_):
        last = messages[-1]
        if last.role.value == "tool":
            return ChatMessage(f"So it is: {last.content}.", role="assistant")
        if "Book" in last.content:
            block = ToolCallBlock(tool_call_id="c", tool_name="book", tool_kwargs={"flight": "OS 1"})
            return ChatMessage(role="assistant", blocks=[block])
        return ChatMessage(" / ".join(m.content for m in messages if m.role.value == "user"), role="assistant")

    async def book(ctx: Context, flight: str) -> str:
        "Book a flight."
        ask = InputRequiredEvent(prefix="Sure?")
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=ask)
        return f"{flight} booked, as the user said {answer.response}"

    def agent():
        llm = MockFunctionCallingLLM(response_generator=reply, is_chat_model=True)
        return FunctionAgent(tools=[book], llm=llm, initial_state={"mood": "good"}, streaming=False)

    async def begin(folder, saved):
        memory = open_memory(folder / "memory")
        buffer = NeuralFlowMemory(memory.session("chat", user_id="ada"), token_limit=1234)
        await agent().run("I am Ada.", memory=buffer)
        handler = agent().run("Book a flight.", memory=buffer)
        async for event in handler.stream_events():
            if isinstance(event, InputRequiredEvent):
                break
        saved.write_text(json.dumps(handler.ctx.to_dict(serializer=JsonSerializer())))
        (folder / "pickled").write_bytes(pickle.dumps(buffer))
        await handler.cancel_run()
        memory.close()

    async def resume(folder, saved):
        one = agent()
        context = Context.from_dict(one, json.loads(saved.read_text()), serializer=JsonSerializer())
        handler = one.run(ctx=context)
        handler.ctx.send_event(HumanResponseEvent(response="yes"))
        print(await handler)
        context = handler.ctx
        print(json.dumps(str(await agent().run("Who am I?", ctx=context))))
        for found in (await context.store.get("memory"), pickle.loads((folder / "pickled").read_bytes())):
            print(type(found).__name__, found.token_limit, [m.role.value for m in found.get_all()])
        found.session.memory.close()

    folder = Path(sys.argv[2])
    asyncio.run(globals()[sys.argv[1]](folder, folder / "context.json"))
    """
)


def test_a_run_is_taken_up_by_another_process(tmp_path, monkeypatch):
    """An agent that waits for its user in the middle of a tool call, saved as JSON: the next process ends the run.

    It knows what was said before, and what it says is remembered; so does what was pickled.
    """
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    script = tmp_path / "agent.py"
    script.write_text(RESUMED)
    run = lambda step: subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script, step, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
    )
    begun = run("begin")
    assert begun.returncode == 0, begun.stderr
    assert "I am Ada." not in (tmp_path / "context.json").read_text()
    resumed = run("resume")
    assert resumed.returncode == 0, resumed.stderr
    answer, remembered, *found = resumed.stdout.splitlines()
    assert answer == "So it is: OS 1 booked, as the user said yes."
    assert "I am Ada. / Book a flight. / " in remembered
    assert "Who am I?" in remembered
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert found == [f"NeuralFlowMemory 1234 {roles}"] * 2
