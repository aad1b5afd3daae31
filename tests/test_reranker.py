"""The reranker: real cross-encoders and plain objects, what they change in search and context, and what becomes of failures."""

import asyncio
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from conftest import found, in_threads, wait_until
from langchain_core.cross_encoders import BaseCrossEncoder

from neuralflow_memory import ConfigError, Message, MissingDependency, ToolCall, aopen_memory
from neuralflow_memory.errors import EmbeddingError
from neuralflow_memory.models.cross_encoder import CrossEncoderReranker, as_reranker
from neuralflow_memory.pipeline.search import RERANKED
from neuralflow_memory.protocols import Reranker
from neuralflow_memory.rules import ranking
from neuralflow_memory.testing import HashingEmbedder

TURNS = [
    "The bus leaves at ten.",
    "The bus is late.",
    "A bus to Graz.",
    "The bus by the wall.",
    "A garden grows beans.",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "when", "does"]
VOCABULARY += sorted({word for turn in TURNS for word in turn.lower().strip(".").split()})


class Opinions:
    """A reranker that prefers texts by what *opinion* says of each, and keeps what it was asked."""

    def __init__(self, opinion):
        self.opinion = opinion
        self.asked = []

    def rerank(self, query, texts):
        self.asked.append((query, list(texts)))
        return [self.opinion(text) for text in texts]


class Answering:
    """Returns, or raises, what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def rerank(self, query, texts):
        return self.answer(texts)


def prefers(word):
    return Opinions(lambda text: word in text)


@pytest.fixture
def chat_with(opened):
    """Open the folder with a reranker; by words alone unless told otherwise. The chat has *turns*."""

    def open_(reranker, turns=TURNS, **options):
        chat = opened(**{"embedder": "none", "reranker": reranker, **options}).session("chat", user_id="ada")
        if not chat.messages():
            chat.add(turns)
        return chat

    return open_


# -- what it changes in a search


@pytest.mark.parametrize("word", ["ten", "late", "Graz", "wall"])
def test_of_hits_much_alike_the_preferred_one_comes_first(chat_with, word):
    """Whatever came first without it; and the others keep their order."""
    plain = chat_with(None)
    without = found(plain.search("bus"))
    assert len(without) == 5
    plain.memory.close()
    reranker = prefers(word)
    hits = chat_with(reranker).search("bus")
    assert found(hits) == sorted(without, key=lambda said: word not in said)
    assert [h.signals["rerank"] for h in hits] == sorted((h.signals["rerank"] for h in hits), reverse=True)
    assert reranker.asked == [("bus", without)], "one call, with the question and the candidates in their order"


def test_signals_still_add_up_to_scores_between_0_and_1(opened):
    """With vectors, too, and beyond the candidates, which stay behind them in their order."""
    turns = [f"The bus number {n} leaves at {n % 7}." for n in range(RERANKED + 30)]
    with opened() as memory:
        memory.session("chat", user_id="ada").add(turns)
        memory.flush()
        without = found(memory.session("chat", user_id="ada").search("When does the bus leave?", k=200))
    reranker = Opinions(lambda text: 1e6 * text.endswith("3.") - 5e5)
    hits = opened(reranker=reranker).session("chat", user_id="ada").search("When does the bus leave?", k=200)
    assert len(hits) == len(without) == RERANKED + 30
    scores = [h.score for h in hits]
    assert scores == sorted(scores, reverse=True)
    for hit in hits:
        assert 0 < hit.score <= 1
        assert sum(hit.signals.values()) == pytest.approx(hit.score, abs=0.001)
        assert "dense" in hit.signals
    (asked,) = reranker.asked
    assert asked[1] == without[:RERANKED]
    assert set(found(hits[:RERANKED])) == set(without[:RERANKED])
    assert found(hits[:RERANKED]) != without[:RERANKED]
    assert found(hits[RERANKED:]) == without[RERANKED:]
    assert {h.signals["rerank"] for h in hits[RERANKED:]} == {0.0}


def test_an_opinion_overrules_the_words_as_far_as_it_stands_out(chat_with):
    """Far above the rest, the last of thirty comes up to the front; among many of the same opinion it does not."""
    turns = [f"The bus, our bus number {n}, leaves at ten in the morning." for n in range(20)]
    turns += [f"The bus, it was number {n}, came by the wall." for n in range(10)]
    chat = chat_with(None, turns)
    without = found(chat.search("our bus number", k=100))
    chat.memory.close()
    places = {}
    for name, opinions in {"sure": [0.0, 0.1], "shared": [0.0, 1.0]}.items():
        told = {said: opinions[n % 2] for n, said in enumerate(without)} | {without[-1]: 1.0}
        chat = chat_with(Opinions(told.__getitem__), turns)
        places[name] = found(chat.search("our bus number", k=100)).index(without[-1])
        chat.memory.close()
    assert places["sure"] == 0
    assert places["shared"] == 14, "behind those of which it thinks the same"


def test_filters_choose_the_candidates_and_k_the_hits(chat_with):
    """What a filter excludes is not read; k has no say in how many are; nothing that is no hit becomes one."""
    turns = [Message("user", f"The bus number {n}.", metadata={"even": n % 2 == 0}) for n in range(150)]
    turns.append(Message("user", "Nothing of the kind."))
    reranker = prefers("Nothing")
    chat = chat_with(reranker, turns)
    hits = chat.search("bus", k=3, filter={"even": True})
    assert len(hits) == 3
    (_, candidates) = reranker.asked.pop()
    assert len(candidates) == RERANKED
    assert all(int(text.split()[-1].strip(".")) % 2 == 0 for text in candidates)
    reranker.opinion = lambda text: text == candidates[-1]
    assert found(chat.search("bus", k=1, filter={"even": True})) == candidates[-1:]
    assert len(chat.search("bus", k=1000, filter={"even": True})) == 75
    assert chat.search("bus", filter={"even": "no"}) == []
    assert chat.search("zeppelin") == []
    assert all(texts for _, texts in reranker.asked), "nothing is asked about nothing"


def test_one_call_a_search(chat_with):
    """However many hits are read."""
    reranker = prefers("ten")
    chat = chat_with(reranker, [f"The bus number {n}." for n in range(300)])
    for count, k in enumerate((1, 8, 100, 300), 1):
        assert len(chat.search("bus", k=k)) == k
        assert len(reranker.asked) == count


def test_who_said_it_stands_before_what_was_said(chat_with):
    """Where speakers have names, questions ask for them; the question is given as it was asked."""
    reranker = prefers("sail")
    chat = chat_with(reranker, [Message("user", "I sail.", name="Caroline"), Message("user", "Boats sail.")])
    chat.search("Does Caroline sail?")
    assert reranker.asked[0][0] == "Does Caroline sail?"
    assert sorted(reranker.asked[0][1]) == ["Boats sail.", "Caroline: I sail."]


def test_other_users_texts_are_never_given_to_it(chat_with):
    """It sees what search may find, and no more."""
    reranker = prefers("bus")
    chat = chat_with(reranker)
    chat.memory.session("chat", user_id="bob").add("The bus is Bob's secret.")
    chat.search("bus")
    assert "Bob" not in str(reranker.asked)


def test_without_weight_it_is_not_asked(chat_with):
    """`ranking.rerank=0` leaves everything as it is without one."""
    plain = chat_with(None)
    without = plain.search("bus")
    assert "rerank" not in without[0].signals
    plain.memory.close()
    reranker = prefers("Graz")
    hits = chat_with(reranker, ranking={"rerank": 0}).search("bus")
    assert [(h.entry.id, h.score, h.signals) for h in hits] == [(h.entry.id, h.score, h.signals) for h in without]
    assert reranker.asked == []


def test_its_weight_is_an_option(chat_with):
    """Alone it decides; the more it weighs, the more of the score is its."""
    shares = []
    for weight in (1, 5, 20):
        chat = chat_with(prefers("wall"), ranking={"rerank": weight})
        hit = next(h for h in chat.search("bus") if "wall" in h.entry.content)
        shares.append(hit.signals["rerank"] / hit.score)
        chat.memory.close()
    assert shares == sorted(shares)
    others = dict.fromkeys([name for name in type(chat.memory.settings.ranking).model_fields if name != "rerank"], 0)
    hits = chat_with(Opinions(len), ranking=others).search("bus")
    assert [len(said) for said in found(hits)] == sorted((len(said) for said in found(hits)), reverse=True)
    assert all(h.score == pytest.approx(h.signals["rerank"], abs=1e-3) for h in hits)


# -- context, values, async


def test_a_context_quotes_what_it_prefers(chat_with):
    """One call for the newest user turn, which is no candidate itself; the report shows its signal."""
    reranker = prefers("Graz")
    chat = chat_with(reranker)
    other = chat.memory.session("other", user_id="ada")
    other.add("Which bus?")
    context = other.context()
    (asked,) = reranker.asked
    assert asked[0] == "Which bus?"
    assert "Which bus?" not in asked[1]
    best = max((c for c in context.report if c.part == "hit"), key=lambda c: c.score)
    assert best.included
    assert best.signals["rerank"] > 0
    assert chat.entries.get(best.id).content == "A bus to Graz."


def test_in_a_tool_loop_it_is_asked_once(chat_with):
    """Prompts between a user turn and its answer use what was found; the next user turn is a new question."""
    reranker = prefers("Graz")
    thread = chat_with(reranker).memory.session("other", user_id="ada").thread("loop")
    said = [Message("user", "Which bus goes to Graz?", id="u1")]
    prompts = []
    for step in range(3):
        thread.update(said)
        prompts.append(thread.prompt(said))
        call = ToolCall(f"c{step}", "look_up", {})
        said.append(Message("assistant", "", id=f"a{step}", tool_calls=[call]))
        said.append(Message("tool", "The bus is full.", id=f"t{step}", tool_call_id=call.id))
    assert all(any("A bus to Graz." in m.text for m in prompt.messages) for prompt in prompts)
    assert len(reranker.asked) == 1
    said += [Message("assistant", "The one at ten.", id="done"), Message("user", "Is the bus late?", id="u2")]
    thread.update(said)
    thread.prompt(said)
    assert len(reranker.asked) == 2


async def test_async_twins_ask_it_off_the_loop(chat_with):
    """In a worker thread, under no lock: writing and searching go on while it thinks."""
    thinking, done = threading.Event(), threading.Event()
    threads = []

    def opinion(text):
        threads.append(threading.current_thread())
        thinking.set()
        assert done.wait(30)
        return "late" in text

    chat = chat_with(Opinions(opinion))
    task = asyncio.create_task(chat.asearch("bus"))
    assert await asyncio.to_thread(thinking.wait, 30)
    await asyncio.wait_for(chat.aadd("Said meanwhile."), 10)
    assert len(await asyncio.wait_for(chat.amessages(), 10)) == len(TURNS) + 1
    done.set()
    assert (await task)[0].entry.content == "The bus is late."
    assert threading.main_thread() not in threads
    assert (await chat.acontext("bus")).messages


# -- failures


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: 1 / 0, "division by zero"),
        (lambda texts: [1.0] * (len(texts) - 1), r"shape \(4,\) for 5 texts"),
        (lambda texts: [[1.0, 2.0]] * len(texts), r"shape \(5, 2\)"),
        (lambda texts: [float("nan")] * len(texts), "not finite"),
        (lambda texts: [float("inf"), *[0.0] * (len(texts) - 1)], "not finite"),
        (lambda _: None, r"shape \(\)"),
        (lambda texts: [None] * len(texts), "not finite"),
        (lambda texts: texts, "could not convert"),
    ],
)
def test_one_that_fails_leaves_the_order_without_it(chat_with, answer, reason):
    """A warning that says why, in search and context; counted in stats(); scores as without one."""
    plain = chat_with(None)
    without = plain.search("bus")
    plain.memory.close()
    chat = chat_with(Answering(answer))
    with pytest.warns(RuntimeWarning, match=f"without the reranker: .*{reason}"):
        hits = chat.search("bus")
    assert [(h.entry.id, h.score, h.signals) for h in hits] == [(h.entry.id, h.score, h.signals) for h in without]
    with pytest.warns(RuntimeWarning, match="without the reranker"):
        assert "hit" in {c.part for c in chat.context("bus").report}
    stats = chat.memory.stats()
    assert (stats["search_without_reranker"], stats["search_without_vectors"]) == (2, 0)
    assert stats["last_error"].startswith("search: ")


def test_one_that_recovers_is_asked_again(chat_with):
    """A failure is no reason to give it up."""
    reranker = Answering(lambda _: 1 / 0)
    chat = chat_with(reranker)
    with pytest.warns(RuntimeWarning, match="division"):
        chat.search("bus")
    reranker.answer = lambda texts: np.array(["late" in text for text in texts])
    assert chat.search("bus")[0].entry.content == "The bus is late."
    assert chat.memory.stats()["search_without_reranker"] == 1


@pytest.mark.parametrize(
    "thing", [3, "", " ", object(), Opinions, CrossEncoderReranker, lambda query, texts: [], ["m"]]
)
def test_what_is_no_reranker_is_refused(opened, thing):
    """When the memory is opened, with what would fit."""
    with pytest.raises(ConfigError, match=r"reranker= takes an object with rerank\(query, texts\)"):
        opened(reranker=thing)


def test_an_async_reranker_is_refused(opened):
    """Search could not call it."""

    class Later:
        async def rerank(self, query, texts):
            return []

    with pytest.raises(ConfigError, match="not async"):
        opened(reranker=Later())


def test_one_folder_has_one_reranker(opened):
    """A second handle may name the same one or none, not another."""
    one = prefers("bus")
    for same in (one, one, None):
        opened(embedder="none", reranker=same)
    with pytest.raises(ConfigError, match="reranker differ"):
        opened(embedder="none", reranker=prefers("bus"))


# -- cross-encoders


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A cross-encoder of two small layers with random weights, as saved by its library."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    torch.manual_seed(5)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(VOCABULARY), num_labels=1, max_position_embeddings=64, initializer_range=0.5, **size
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross_encoder(model_folder):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(model_folder), device="cpu", local_files_only=True)


def outputs(cross_encoder, query, texts):
    """The model's own, one pair at a time, before any sigmoid."""
    return [float(cross_encoder.predict([(query, t)], activation_fn=lambda x: x)[0]) for t in texts]


def test_constructing_imports_nothing():
    """Naming a model costs none of torch's seconds; `open_memory` does neither, before its background does."""
    code = (
        "import sys; from neuralflow_memory.models.cross_encoder import CrossEncoderReranker as R, as_reranker\n"
        "R('x'); as_reranker('x'); print('torch' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["False", "False"]


def test_a_model_by_its_folder_gives_its_outputs_in_the_order_of_the_texts(model_folder, cross_encoder, capfd):
    """Batched, with texts of all lengths, the longest of which are cut; nothing is printed."""
    reranker = CrossEncoderReranker(str(model_folder), device="cpu")
    assert isinstance(reranker, Reranker)
    texts = [*TURNS, *(" ".join(TURNS[: n % 5 + 1] * (n + 1)) for n in range(35)), ""]
    scores = reranker.rerank("When does the bus leave?", texts)
    assert (scores.dtype, scores.shape) == (np.float32, (41,))
    np.testing.assert_allclose(scores, outputs(cross_encoder, "When does the bus leave?", texts), atol=1e-4)
    assert len(set(scores[:5].tolist())) == 5
    assert abs(scores).max() > 1, "no sigmoid"
    assert capfd.readouterr() == ("", "")
    assert reranker.rerank("When?", []).shape == (0,)
    assert reranker.load() is reranker.load()


def test_threads_get_the_same_as_one_by_one(cross_encoder):
    """The tokenizer serves one thread at a time; the reranker any number."""
    reranker = CrossEncoderReranker(cross_encoder)
    questions = [f"When does the {word} leave?" for word in ("bus", "garden", "wall", "ten")]
    expected = {q: reranker.rerank(q, TURNS) for q in questions}
    given = {}
    in_threads(*(lambda q=q: given.update({q: reranker.rerank(q, TURNS * 8)[:5]}) for q in questions))
    for question in questions:
        np.testing.assert_allclose(given[question], expected[question], atol=1e-4)


@pytest.mark.parametrize("as_object", [False, True])
def test_search_uses_a_cross_encoder(chat_with, model_folder, cross_encoder, as_object):
    """By the path of its folder, or the library's own object as it is: what it finds best gets the largest signal."""
    chat = chat_with(cross_encoder if as_object else str(model_folder))
    hits = chat.search("When does the bus leave?", k=10)
    told = dict(zip(TURNS, outputs(cross_encoder, "When does the bus leave?", TURNS), strict=True))
    by_signal = sorted(hits, key=lambda h: -h.signals["rerank"])
    assert len(hits) == 5
    assert found(by_signal) == sorted(found(hits), key=lambda said: -told[said])
    assert chat.memory.stats()["search_without_reranker"] == 0


def test_langchains_cross_encoders_fit(chat_with):
    """Their one method scores pairs."""

    class Graz(BaseCrossEncoder):
        def score(self, text_pairs):
            assert all(query == "bus" for query, _ in text_pairs)
            return [float("Graz" in text) for _, text in text_pairs]

    assert chat_with(Graz()).search("bus")[0].entry.content == "A bus to Graz."


class Slow:
    """Has a model to load, and says when."""

    def __init__(self, trouble=None):
        self.loading, self.go, self.loaded_by, self.trouble = threading.Event(), threading.Event(), [], trouble

    def load(self):
        self.loading.set()
        assert self.go.wait(30)
        self.loaded_by.append(threading.current_thread().name)
        if self.trouble:
            raise self.trouble

    def rerank(self, query, texts):
        return [0.0] * len(texts)


@pytest.mark.parametrize("embedder", ["none", HashingEmbedder()])
def test_it_is_loaded_in_the_background_and_ready_waits(opened, embedder):
    """Opening and writing do not wait; indexing goes on meanwhile; ready() returns when it is there."""
    reranker = Slow()
    memory = opened(reranker=reranker, embedder=embedder)
    assert reranker.loading.wait(30)
    memory.session("chat", user_id="ada").add(TURNS)
    memory.flush()
    ready = threading.Thread(target=memory.ready)
    ready.start()
    ready.join(0.05)
    assert ready.is_alive()
    reranker.go.set()
    ready.join(30)
    assert not ready.is_alive()
    assert reranker.loaded_by == ["neuralflow-loader"]


async def test_aopen_memory_returns_with_it_loaded(folder):
    """So that no search on the loop pays for it."""
    reranker = Slow()
    opening = asyncio.create_task(aopen_memory(folder, embedder="none", reranker=reranker))
    assert await asyncio.to_thread(reranker.loading.wait, 30)
    assert not opening.done()
    reranker.go.set()
    async with await opening:
        assert reranker.loaded_by


def test_one_that_cannot_be_loaded_is_told_by_stats(chat_with, tmp_path):
    """Opening works; each search warns, and finds what it finds without it."""
    (tmp_path / "empty").mkdir()
    chat = chat_with(str(tmp_path / "empty"))
    chat.memory.ready()
    assert "can't be loaded" in chat.memory.stats()["last_error"]
    with pytest.warns(RuntimeWarning, match="without the reranker: .*can't be loaded"):
        assert len(chat.search("bus")) == 5


def test_closing_while_it_loads_waits_for_it(opened):
    """No thread outlives the memory."""
    reranker = Slow()
    memory = opened(reranker=reranker)
    assert reranker.loading.wait(30)
    closing = threading.Thread(target=memory.close)
    closing.start()
    reranker.go.set()
    closing.join(30)
    assert not closing.is_alive()
    wait_until(lambda: not any(t.name == "neuralflow-loader" for t in threading.enumerate()))


def test_weights_that_are_nowhere_are_explained(monkeypatch, tmp_path):
    """A short name is of the cross-encoder organization; the error says what to do, without minutes of retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbeddingError, match=r"cross-encoder/no-such-model is not on this machine.* run this once"):
        CrossEncoderReranker("no-such-model").load()


def test_a_missing_library_names_the_extra(monkeypatch, opened):
    """A model's name without sentence-transformers is an error when the memory is opened."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'neuralflow-memory\[local\]'"):
        CrossEncoderReranker("x").load()
    monkeypatch.setattr("neuralflow_memory.models.cross_encoder.find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"pip install 'neuralflow-memory\[local\]'"):
        opened(reranker="x")
    assert as_reranker(prefers("bus"))


# -- the arithmetic


def test_opinions_count_by_how_far_they_stand_out():
    """On any scale, in any order, without overflow; noise among equals is none."""
    rng = np.random.default_rng(3)
    opinions = rng.normal(0, 1, 50)
    share = ranking.outstanding(opinions)
    assert share.dtype == np.float32
    assert np.all((share > 0) & (share < 1))
    assert np.array_equal(np.argsort(share), np.argsort(opinions))
    for scaled in (opinions * 1e-3 + 7, opinions * 1e6, opinions * 1e306):
        np.testing.assert_allclose(ranking.outstanding(scaled), share, atol=1e-3)
    middle = np.argmin(abs(opinions - opinions.mean() - opinions.std()))
    assert share[middle] == pytest.approx(0.5, abs=0.1)
    for equal in ([3.0], [0.0, 0.0], [1.0, 1.0 + 1e-12, 1.0]):
        assert np.ptp(ranking.outstanding(np.array(equal))) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranking.outstanding(np.array([1e308, -1e308, 0.0])).argmax() == 0
        assert ranking.outstanding(np.eye(50)[7])[7] > 0.99
