"""Embeds with onnxruntime: a sentence-transformers model without torch, from its ONNX file.

Measured with all-MiniLM-L6-v2 on one core: a question takes 3 to 6 ms (with torch 6.5 to 9.5), documents of 160 characters
are done 110 a second (with torch 87, and 214 where the CPU has bfloat16); importing takes 0.3 s (torch with its library 10).
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, EmbeddingError, MissingDependency
from .sentence_transformers import (
    LEAST_COSINE,
    ROOM,
    SAMPLE,
    WHAT,
    SentenceTransformerEmbedder,
    batched,
    full_name,
    no_progress_bars,
)

Vectors = npt.NDArray[np.float32]

_FILES = ["*.json", "*/config.json", "model.onnx*", "onnx/model.onnx*"]
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""How older models say it, one flag a way."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = ("last_hidden_state", "token_embeddings")
_OPSET = 17


@dataclass(frozen=True, slots=True)
class _Model:
    """What a folder holds, loaded. `session` and `tokenizer` serve many threads at once."""

    session: Any
    tokenizer: Any
    inputs: list[str]
    output: str
    longest: int
    pooling: str
    prompts: dict[str, str]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of *texts*, which are padded to the longest."""
        encoded = self.tokenizer.encode_batch(list(texts))
        given = {
            "input_ids": np.array([e.ids for e in encoded], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
            "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
        }
        (tokens,) = self.session.run([self.output], {name: given[name] for name in self.inputs})
        mask = given["attention_mask"]
        if self.pooling == "cls":
            vectors = tokens[np.arange(len(texts)), mask.argmax(axis=1)]
        else:
            vectors = (tokens * mask[:, :, None].astype(np.float32)).sum(axis=1)  # only its direction counts
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
        return unit


class OnnxEmbedder:
    """Turns texts into unit vectors with a sentence-transformers model that is there as ONNX, on the CPU.

    Its vectors are those of `SentenceTransformerEmbedder`, and so is its model's name: both may work on one folder.
    Constructing it imports nothing; `load` does, or else the first call. Thread-safe, and many calls run at once.

    Attributes:
        model_id: The model's name on the Hugging Face hub, or the path it was given as.
    """

    def __init__(self, model: str | os.PathLike[str] = "all-MiniLM-L6-v2", *, model_id: str | None = None) -> None:
        """Name the model: of the sentence-transformers organization, "owner/name", or a folder's path.

        Its folder holds `onnx/model.onnx` or `model.onnx`, and `tokenizer.json`, as on the hub or as `export` writes it.
        *model_id* is the name that its vectors are known by, if a folder holds what has another name elsewhere.
        """
        self._name = full_name(os.fspath(model))
        self.model_id = self._name if model_id is None else model_id
        self._model: _Model | None = None
        self._loading = threading.Lock()

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model."""
        return len(self.embed_query(""))

    def load(self) -> _Model:
        """Load the model, once; one that is not on this machine is downloaded from the hub.

        Raises:
            MissingDependency: onnxruntime or tokenizers is not installed.
            EmbeddingError: The files can't be had, or ask for what is not supported.
        """
        with self._loading:
            if self._model is None:
                self._model = _opened(self._name, _folder(self._name) or _downloaded(self._name))
            return self._model

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Vectors of *texts*, of unit length: float32, shape (len(texts), dimensions)."""
        model = self.load()
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        prompt = model.prompts["document"]
        batches = batched(texts, room=ROOM["float32"], longest=model.longest, workers=_cores())
        # Batches side by side, each on one core, leave none waiting for another.
        with ThreadPoolExecutor(min(len(batches), _cores()), "neuralflow-embedder") as threads:
            done = threads.map(lambda batch: self._embedded(model, [prompt + texts[i] for i in batch]), batches)
            vectors = np.concatenate(list(done))
        return vectors[np.argsort([i for batch in batches for i in batch])]

    def embed_query(self, text: str) -> Vectors:
        """The vector of a question, of unit length: float32, shape (dimensions,)."""
        model = self.load()
        vector: Vectors = self._embedded(model, [model.prompts["query"] + text])[0]
        return vector

    def _embedded(self, model: _Model, texts: list[str]) -> Vectors:
        try:
            return model.embed(texts)
        except Exception as e:  # whatever onnxruntime raises
            raise EmbeddingError(f"{self.model_id} failed on {len(texts)} texts: {e}") from e


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_here(model: str) -> bool:
    """Whether *model* is on this machine as ONNX, so that it needs neither torch nor a network."""
    return _folder(full_name(model)) is not None


def _folder(model: str) -> Path | None:
    """The model's folder, or its place in the hub's cache; None without an ONNX file in it."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, allow_patterns=_FILES, local_files_only=True))
        except Exception:  # it is not there, or its name is none
            return None
    return folder if _weights(folder) is not None else None


def _weights(folder: Path) -> Path | None:
    return next((f for f in (folder / "onnx" / "model.onnx", folder / "model.onnx") if f.is_file()), None)


def _downloaded(model: str) -> Path:
    if Path(model).exists():
        raise EmbeddingError(
            f"{model} holds no onnx/model.onnx: neuralflow_memory.models.onnx.export writes a folder that does",
            path=model,
        )
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=_FILES, etag_timeout=10))
    except Exception as e:  # the hub's client raises errors of half a dozen libraries
        raise EmbeddingError(
            f"{model} is not on this machine as ONNX and can't be downloaded: run this once with a network, or give the path "
            f"of a folder that neuralflow_memory.models.onnx.export wrote ({type(e).__name__}: {e})"
        ) from e
    if _weights(folder) is None:
        raise _unsupported(model, "a repository without onnx/model.onnx")
    return folder


def _opened(model: str, folder: Path) -> _Model:
    try:
        import onnxruntime
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingDependency("onnxruntime", "onnx", WHAT) from e
    try:
        own, pooling, prompts = _described(model, folder)
        weights = _weights(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        inputs = [i.name for i in session.get_inputs()]
        outputs = [o.name for o in session.get_outputs()]
        if strange := [name for name in inputs if name not in _INPUTS]:
            raise _unsupported(model, f"a graph that asks for {strange[0]}")
        output = next((name for name in _OUTPUTS if name in outputs), None)
        if output is None:
            raise _unsupported(model, f"a graph that gives no {_OUTPUTS[0]}, but {', '.join(outputs)}")
        tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
        return _Model(session, tokenizer, inputs, output, _prepare(tokenizer, own), pooling, prompts)
    except EmbeddingError:
        raise
    except Exception as e:  # whatever is wrong with the files
        raise EmbeddingError(f"{model} can't be loaded from {folder}: {type(e).__name__}: {e}", path=str(folder)) from e


def _described(model: str, folder: Path) -> tuple[Path, str, dict[str, str]]:
    """The folder of the transformer's own files, the way of pooling, and the prompts, as the folder says."""
    modules = _read(folder / "modules.json") or [{"type": "Transformer", "path": ""}]
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds[0] != "Transformer" or kinds[1:] not in ([], ["Pooling"], ["Pooling", "Normalize"]):
        raise _unsupported(model, f"a model made of {', '.join(kinds)}")
    own = folder / modules[0]["path"]
    if not (own / "tokenizer.json").is_file():
        raise _unsupported(model, "a model without tokenizer.json")
    described = _read(folder / modules[1]["path"] / "config.json") if modules[1:] else {"pooling_mode": "mean"}
    named = described.get("pooling_mode") or [n for n, on in described.items() if n.startswith("pooling_mode_") and on]
    modes = [_POOLING.get(name, name) for name in ([named] if isinstance(named, str) else named)]
    if len(modes) != 1 or modes[0] not in _POOLING.values():
        raise _unsupported(model, f"pooling by {', '.join(modes) or 'nothing'}")
    given = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    prompts = {name: given.get(name) or "" for name in ("query", "document")}
    if any(prompts.values()) and not described.get("include_prompt", True):
        raise _unsupported(model, "pooling that leaves the prompt out")
    return own, modes[0], prompts


def _prepare(tokenizer: Any, folder: Path) -> int:
    """Set how the tokenizer cuts and pads, as transformers would; how many tokens of a text are read."""
    from tokenizers.normalizers import Lowercase, Sequence

    bert, own = _read(folder / "sentence_bert_config.json"), _read(folder / "tokenizer_config.json")
    limits = [own.get("model_max_length"), _read(folder / "config.json").get("max_position_embeddings")]
    longest = int(bert.get("max_seq_length") or min([n for n in limits if n and n > 0], default=512))
    tokenizer.enable_truncation(longest, direction=own.get("truncation_side", "right"))
    padding = tokenizer.padding or {}
    token = own.get("pad_token") or padding.get("pad_token") or "[PAD]"
    token = token if isinstance(token, str) else token["content"]
    tokenizer.enable_padding(
        direction=own.get("padding_side", "right"),
        pad_id=tokenizer.token_to_id(token) or 0,
        pad_type_id=padding.get("pad_type_id", 0),
        pad_token=token,
    )
    if bert.get("do_lower_case"):
        tokenizer.normalizer = Sequence([Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    return longest


def _read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _unsupported(model: str, what: str) -> EmbeddingError:
    return EmbeddingError(
        f"{model}: {what} is not supported without torch; pip install 'neuralflow-memory[local]', and set embedder.backend "
        "to 'torch'"
    )


def export(model: str, folder: str | os.PathLike[str]) -> Path:
    """Write a sentence-transformers model as ONNX into a new folder, for `OnnxEmbedder`; the folder.

    *model* is named as for `SentenceTransformerEmbedder`. Needs sentence-transformers, and the package onnx.

    Raises:
        ConfigError: The folder is not empty.
        MissingDependency: sentence-transformers is not installed.
        EmbeddingError: onnx is not installed, or the model is none that `OnnxEmbedder` can compute with the same vectors.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already; choose a new or empty folder")
    whole = SentenceTransformerEmbedder(model=model, device="cpu")._loaded()
    import torch

    first: Any = whole[0]
    transformer = first.auto_model.eval()

    class Named(torch.nn.Module):
        """The transformer with its inputs by name, which their order would have to be known for."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer

        def forward(self, *given: Any) -> Any:
            return self.inner(**dict(zip(names, given, strict=True))).last_hidden_state

    example = first.tokenizer(["a short text", "and one that is longer"], padding=True, return_tensors="pt")
    names = [name for name in _INPUTS if name in example]
    with no_progress_bars():
        whole.save(str(target), create_model_card=False)
    for weights in target.rglob("*.safetensors"):
        weights.unlink()  # which are in the ONNX file
    (target / "onnx").mkdir()
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of tracing, whose result is tried below
            torch.onnx.export(
                Named(),
                tuple(example[name] for name in names),
                str(target / "onnx" / "model.onnx"),
                input_names=names,
                output_names=[_OUTPUTS[0]],
                dynamic_axes={name: {0: "batch", 1: "tokens"} for name in (*names, _OUTPUTS[0])},
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as e:  # whatever tracing meets
        missing = "onnx is not installed: pip install onnx" if "not installed" in str(e) else f"{type(e).__name__}: {e}"
        raise EmbeddingError(f"{model} can't be written as ONNX: {missing}") from e
    expected = whole.encode_document(SAMPLE, show_progress_bar=False, normalize_embeddings=True)
    least = float(np.sum(expected * OnnxEmbedder(target).embed_documents(SAMPLE), axis=1).min())
    if least < LEAST_COSINE:
        raise EmbeddingError(f"{model} gives other vectors as ONNX: a cosine of {least:.5f} with its own")
    return target


__all__ = ["OnnxEmbedder", "export", "is_here"]
