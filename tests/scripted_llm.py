"""A model for LlamaIndex that says what it was given to say."""

import copy

from llama_index.core.llms import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM


class Script:
    """Plays the given answers, then `answer N`; keeps what the model was shown."""

    def __init__(self, *answers):
        self.answers, self.shown = list(answers), []

    def __call__(self, messages, **kwargs):
        self.shown.append(copy.deepcopy(list(messages)))
        said = self.answers.pop(0) if self.answers else f"answer {len(self.shown)}"
        return said if isinstance(said, ChatMessage) else ChatMessage(said, role="assistant")

    async def stream(self, messages, **kwargs):
        yield self(messages, **kwargs)


def scripted(*answers, stream=False):
    """A script, and the model that plays it."""
    script = Script(*answers)
    return script, MockFunctionCallingLLM(response_generator=script.stream if stream else script, is_chat_model=True)
