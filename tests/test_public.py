"""What users import: complete, light, typed, layered as it says; and the parts shipped for their tests."""

import importlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import neuralflow_memory
from neuralflow_memory import NeuralFlowError, errors, open_memory, testing
from neuralflow_memory.protocols import Embedder
from neuralflow_memory.testing import HashingEmbedder, ManualClock

HEAVY = [
    "chromadb",
    "torch",
    "transformers",
    "sentence_transformers",
    "langchain",
    "langchain_core",
    "langchain_classic",
    "langgraph",
    "llama_index.core",  # llama_index itself is a namespace that finding a file in it makes
    "google.genai",
    "google.cloud",
    "tiktoken",
    "numpy",
]
ROOT = Path(neuralflow_memory.__file__).parent.parent


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


def test_public_names_are_sorted_complete_and_real():
    """`__all__` is what is there; every error of the tree is in it."""
    names = neuralflow_memory.__all__
    assert names == sorted(set(names))
    for name in names:
        assert getattr(neuralflow_memory, name) is not None
    tree = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, NeuralFlowError)}
    assert tree <= set(names)
    namespace = {}
    exec("from neuralflow_memory import *", namespace)
    assert set(names) <= set(namespace)


def test_every_error_is_drawn_in_the_tree_and_catchable_as_its_builtin():
    """The drawing at the top of errors.py names every class with its base and builtin."""
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, NeuralFlowError) and error is not NeuralFlowError:
            assert name in errors.__doc__
            assert error.__doc__
            assert issubclass(error, (ValueError, LookupError, OSError, ImportError, RuntimeError))


def test_an_unknown_name_is_an_attribute_error():
    """And the version is the installed one's."""
    with pytest.raises(AttributeError, match="nothing_like_it"):
        neuralflow_memory.nothing_like_it  # noqa: B018
    assert neuralflow_memory.__version__.count(".") == 2


def test_importing_the_package_loads_nothing_heavy():
    """No vector store, no model, no host, no cloud, no numpy: that comes with first use."""
    bare = set(modules_after(""))
    loaded = [m for m in modules_after("import neuralflow_memory") if m not in bare]
    assert [m for m in loaded if any(m == h or m.startswith(h + ".") for h in HEAVY)] == []


def test_opening_a_memory_loads_no_host_and_no_cloud(tmp_path):
    """Neither LangChain nor LlamaIndex nor Google's libraries; without an embedder, no Chroma and no torch."""
    code = (
        "from neuralflow_memory import open_memory\n"
        f"with open_memory({str(tmp_path / 'm')!r}, embedder='none') as m: m.session('c').add('Hello')"
    )
    bare = set(modules_after(""))
    loaded = [m for m in modules_after(code) if m not in bare]
    never = [h for h in HEAVY if h not in ("tiktoken", "numpy")]
    assert [m for m in loaded if any(m == h or m.startswith(h + ".") for h in never)] == []


def test_layers_hold():
    """Upper layers import lower ones, never the other way; the contracts are in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_package_is_typed():
    """py.typed is shipped."""
    assert files("neuralflow_memory").joinpath("py.typed").is_file()


def test_every_module_says_why_it_exists():
    """The first line of each file is a docstring."""
    for file in (ROOT / "neuralflow_memory").rglob("*.py"):
        text = file.read_text()
        assert not text.strip() or text.startswith(('"""', 'r"""')), file


def test_hashing_embedder_fits_the_protocol():
    """It is an Embedder, deterministic across processes, and names itself."""
    embedder = HashingEmbedder()
    assert isinstance(embedder, Embedder)
    assert embedder.model_id == "hashing-64"
    assert HashingEmbedder(dimensions=8).model_id != embedder.model_id
    code = (
        "from neuralflow_memory.testing import HashingEmbedder as H; print(H().embed_query('Sailing boats').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == embedder.embed_query("Sailing boats").tolist()
    with pytest.raises(ValueError, match="at least 1"):
        HashingEmbedder(dimensions=0)


@given(st.lists(st.text(), max_size=5))
def test_hashing_embedder_returns_a_unit_vector_per_text(texts):
    """Of length 1, or 0 for a text without words; a query is embedded as a document is."""
    embedder = HashingEmbedder()
    vectors = embedder.embed_documents(texts)
    assert vectors.shape == (len(texts), 64)
    lengths = np.linalg.norm(vectors, axis=1)
    assert all(abs(n - 1) < 1e-5 or n == 0 for n in lengths)
    for text, vector in zip(texts, vectors, strict=True):
        assert (embedder.embed_query(text) == vector).all()


def test_hashing_embedder_puts_texts_with_common_words_together():
    """The order of words and their case do not matter; other words are far."""
    embedder = HashingEmbedder()
    one, same, near, far = embedder.embed_documents(
        ["Ada likes sailing", "sailing LIKES ada", "Ada likes trains", "Tomatoes ripen slowly"]
    )
    assert (one == same).all()
    assert one @ near > one @ far


def test_manual_clock_stands_still_until_it_is_moved(tmp_path):
    """It dates what a memory stores."""
    clock = ManualClock(datetime(2030, 5, 1, 12))
    assert clock() == clock() == datetime(2030, 5, 1, 12, tzinfo=UTC)
    assert clock.advance(days=1, hours=2) == datetime(2030, 5, 2, 14, tzinfo=UTC)
    with open_memory(tmp_path / "m", embedder="none", clock=clock) as memory:
        chat = memory.session("chat")
        chat.add("One")
        clock.advance(minutes=5)
        chat.add("Two")
        first, second = chat.messages()
    assert second.created_at - first.created_at == timedelta(minutes=5)


def test_what_is_shipped_for_tests_is_what_is_named():
    """`testing.__all__` is sorted and real."""
    assert testing.__all__ == sorted(testing.__all__)
    assert importlib.import_module("neuralflow_memory.testing").HashingEmbedder is HashingEmbedder
