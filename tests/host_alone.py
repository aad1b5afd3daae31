"""Use the adapters of one host where the other hosts are not: `python tests/host_alone.py HOST [--installed]`.

Without `--installed` their imports are blocked; with it, they must not be there (`make matrix`).
"""

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec

FAMILIES = {
    "langchain": ("langchain_core", "langchain_classic"),
    "langgraph": ("langchain_core", "langchain", "langgraph"),
    "llama-index": ("llama_index",),
}
"""Packages that each extra installs."""
ALL = {name for family in FAMILIES.values() for name in family}


class Blocker:
    """Finds the packages of other hosts first, and says that they are not there."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)


def langchain(chat):
    from langchain_core.messages import HumanMessage

    from neuralflow_memory.langchain import NeuralFlowChatMessageHistory, NeuralFlowMemory, NeuralFlowRetriever

    NeuralFlowChatMessageHistory(chat).add_messages([HumanMessage("I sail to Oslo.")])
    NeuralFlowMemory(chat).save_context({"input": "In May."}, {"output": "Noted."})
    assert "May" in NeuralFlowMemory(chat).load_memory_variables({})["history"]
    assert NeuralFlowRetriever(session=chat).invoke("Oslo")[0].page_content == "I sail to Oslo."


def langgraph(chat):
    from langchain.agents import create_agent
    from langchain_core.language_models import FakeListChatModel

    from neuralflow_memory.langchain import NeuralFlowMiddleware, NeuralFlowRetriever, NeuralFlowStore

    agent = create_agent(
        FakeListChatModel(responses=["Fine."]), middleware=[NeuralFlowMiddleware(session=chat, tools=())]
    )
    agent.invoke({"messages": [("user", "I sail to Oslo.")]})
    assert [m.text for m in chat.messages()] == ["I sail to Oslo.", "Fine."]
    assert NeuralFlowRetriever(session=chat).invoke("Oslo")[0].page_content == "I sail to Oslo."
    store = NeuralFlowStore(chat.memory, user_id="ada")
    store.put(("plans",), "may", {"text": "Bergen by boat"})
    assert store.search((), query="boat")[0].key == "may"


def llama_index(chat):
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.memory import Memory

    from neuralflow_memory.llama_index import NeuralFlowChatStore, NeuralFlowMemory, NeuralFlowMemoryBlock

    memory = NeuralFlowMemory(chat)
    memory.put(ChatMessage(role="user", content="I sail to Oslo."))
    assert [m.content for m in memory.get()] == ["I sail to Oslo."]
    parts = {"memory": chat.memory, "user_id": "ada"}
    theirs = Memory.from_defaults(
        "theirs", chat_store=NeuralFlowChatStore(**parts), memory_blocks=[NeuralFlowMemoryBlock(**parts)]
    )
    theirs.put(ChatMessage(role="user", content="Where do I sail?"))
    assert "Oslo" in theirs.get()[0].content


def main(host, *options):
    others = ALL - set(FAMILIES[host])
    if options:
        found = [name for name in sorted(others) if find_spec(name)]
        # langgraph needs langchain, and langchain-classic comes with neither.
        assert not found, f"{found} are installed beside {host}"
    else:
        sys.meta_path.insert(0, Blocker(others))
    from neuralflow_memory import MissingDependency, open_memory

    for name in ("langchain", "llama_index"):
        if not any(member.startswith(name) for member in FAMILIES[host]):
            try:
                import_module(f"neuralflow_memory.{name}")
            except MissingDependency as error:
                assert "pip install" in str(error)  # noqa: PT017
            else:
                raise AssertionError(f"neuralflow_memory.{name} was imported without its host")
    with tempfile.TemporaryDirectory() as folder, open_memory(folder, embedder="none") as memory:
        globals()[host.replace("-", "_")](memory.session("chat", user_id="ada"))
    print(f"{host}: works alone")


if __name__ == "__main__":
    main(*sys.argv[1:])
