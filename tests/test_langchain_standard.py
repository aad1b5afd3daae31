"""LangChain's own standard tests for retrievers."""

import pytest
from langchain_tests.integration_tests import RetrieversIntegrationTests

from neuralflow_memory.langchain import NeuralFlowRetriever


class TestNeuralFlowRetriever(RetrieversIntegrationTests):
    """The suite that every LangChain retriever is to pass."""

    @pytest.fixture(autouse=True)
    def _chat(self, memory):
        self.session = memory.session("chat", user_id="ada")
        self.session.add([f"Harbour {n} has {n * 7} boats." for n in range(10)])

    @property
    def retriever_constructor(self):
        return NeuralFlowRetriever

    @property
    def retriever_constructor_params(self):
        return {"session": self.session}

    @property
    def retriever_query_example(self):
        return "How many boats are in the harbour?"
