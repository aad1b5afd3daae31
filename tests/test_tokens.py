"""Counting tokens: exact offline, an honest estimate otherwise, never a download."""

import inspect
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
import tiktoken.registry
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory.errors import ConfigError
from neuralflow_memory.models import tokens
from neuralflow_memory.models.tokens import ApproximateCounter, EstimatedTokens, token_counter
from neuralflow_memory.protocols import TokenCounter

BUNDLED = Path(find_spec("llama_index.core").origin).parent / "_static" / "tiktoken_cache"
CL100K_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"

SAMPLES = {
    "chat": [
        "Hey, could you move our dentist appointment to Thursday at 4pm?",
        "I also promised Maria that I'd bring the projector, so please don't let me forget.",
        "The flat in Lisbon costs 1,250 euros a month, which is a bit more than we planned.",
        "Honestly the second interview went better than the first one, they even showed me the lab.",
    ],
    "code": [
        "def merge(left: list[int], right: list[int]) -> list[int]:\n    return sorted(left + right)\n",
        "for (let i = 0; i < rows.length; i++) {\n  total += rows[i].price * rows[i].qty;\n}\n",
        'if not path.exists():\n    raise FileNotFoundError(f"no such file: {path}")\n',
        "SELECT name, COUNT(*) FROM orders WHERE created_at > '2024-01-01' GROUP BY name;\n",
    ],
    "json": [
        '{"sku": "KX-2201", "qty": 3, "price": 19.99}',
        '{"customer": {"name": "Ada", "email": "ada@example.org", "vip": true}, "note": null}',
        '[{"lat": 52.5201, "lon": 13.4049}, {"lat": 48.1371, "lon": 11.5754}]',
        '{"status": "error", "code": 503, "retry_after": 30, "message": "try again later"}',
    ],
    "german": [
        "Könnten Sie mir bitte bis Freitag die Rechnungsunterlagen schicken?",
        "Mein Vermieter hat den Mietvertrag noch nicht unterschrieben.",
        "Übrigens fährt der Zug nach München erst um 17:45 Uhr ab.",
        "Wir haben uns für das größere Büro in der Nähe des Bahnhofs entschieden.",
    ],
    "russian": [
        "Пожалуйста, напомни мне завтра позвонить врачу: приём перенесли на девять часов утра.",
        "Ещё я обещал Наталье купить билеты в Санкт-Петербург.",
        "Мы решили не менять поставщика до конца года.",
        "Квартира стоит шестьдесят тысяч рублей в месяц, и это слишком дорого.",
    ],
    "chinese": [
        "请帮我把星期四下午的会议改到下周一上午十点。",
        "另外提醒我给王老师发邮件，附上去年的销售报告。",
        "我们在上海的办公室还没有装好空调。",
        "孩子对花生过敏，请不要放坚果。",
    ],
    "emoji": [
        "great 👍🏽 party 🥳🥳 see you",
        "😀😂🎉 yes!!! 🎂🎂",
        "miss you ❤️ call me 📞 tonight 🌙",
        "🇩🇪 vs 🇧🇷 ⚽ 7:1",
    ],
}


@pytest.fixture(scope="module")
def exact():
    return token_counter("cl100k_base")


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)


def test_the_bundled_encodings_count_exactly_without_a_network(nothing_loaded):
    """With llama-index-core installed, both common encodings are exact offline; no variable is left behind."""
    before = dict(os.environ)
    for name in ("cl100k_base", "o200k_base"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            counter = token_counter(name)
        assert isinstance(counter, TokenCounter)
        assert (counter.name, counter.exact) == (name, True)
        assert counter.count("hello world") == 2
    assert dict(os.environ) == before


def test_a_file_in_the_cache_folder_is_found(nothing_loaded, monkeypatch, tmp_path):
    """What TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR holds is used, and the variables stay as they were."""
    shutil.copy(BUNDLED / CL100K_FILE, tmp_path)
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)  # as if llama-index-core were not installed
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert token_counter("cl100k_base").exact
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "elsewhere")


def test_without_a_file_there_is_an_estimate_and_one_warning(nothing_loaded, monkeypatch, tmp_path):
    """No download is tried: the warning says what to place where."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.warns(EstimatedTokens, match="nothing is downloaded.*p50k_base.tiktoken as [0-9a-f]{40}") as caught:
        counter = token_counter("p50k_base")
    assert len(caught) == 1
    assert (counter.name, counter.exact) == ("approx", False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_left_alone(nothing_loaded, monkeypatch, tmp_path):
    """tiktoken would delete it and download another; we estimate, and touch nothing."""
    damaged = tmp_path / CL100K_FILE
    damaged.write_bytes(b"IQ== 0\n")
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.warns(EstimatedTokens):
        assert not token_counter("cl100k_base").exact
    assert damaged.read_bytes() == b"IQ== 0\n"


def test_the_file_table_agrees_with_tiktoken():
    """Every encoding of the installed tiktoken is known here, with the addresses and checksums it names."""
    source = inspect.getsource(tiktoken_ext.openai_public)
    assert set(tokens._FILES) == set(tiktoken.list_encoding_names())
    for files in tokens._FILES.values():
        for url, sha256 in files:
            assert url in source
            assert sha256 in source


def test_an_unknown_encoding_is_a_config_error():
    """The error lists what there is."""
    with pytest.raises(ConfigError, match=r"cl100k_base, .*or approx"):
        token_counter("gpt-17")


def test_approx_is_silent_when_asked_for():
    """tokenizer='approx' is a choice, not a problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_counter("approx").name == "approx"


def test_looking_for_the_bundled_files_imports_no_llama_index():
    """Counting must not cost the seconds that importing llama_index.core takes."""
    code = (
        "import sys; from neuralflow_memory.models.tokens import token_counter; assert token_counter('cl100k_base').exact;"
        "assert 'llama_index.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_special_token_text_is_text(exact):
    """A user may write <|endoftext|>; it counts as what it looks like."""
    assert exact.count("<|endoftext|>") > 1
    assert exact.count("\ud800 lone surrogate") > 1


@pytest.mark.parametrize("run", [" ", "a", "=", "\n", "漢", "0"])
def test_a_run_of_a_million_characters_is_counted(run):
    """o200k_base overflows its stack on a million spaces; in pieces it doesn't."""
    assert token_counter("o200k_base").count(run * 1_000_000) > 7_000


@given(
    st.lists(st.sampled_from([*"abc =0é漢😀A{", "word ", "another one", "x = 1\n"]), min_size=1, max_size=80),
    st.integers(100_001, 250_000),
)
def test_counting_in_pieces_changes_little(parts, length):
    """A long text's count is what tiktoken says of the whole, but for 12 tokens per cut."""
    text, encoding = ("".join(parts) * length)[:length], token_counter("cl100k_base")._encode
    whole, cuts = len(encoding(text)), length // 50_000
    assert abs(token_counter("cl100k_base").count(text) - whole) <= 12 * cuts


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_estimate_is_near_the_count(kind, exact):
    """On plain text of each kind: at least nine tenths of the exact count, at most 1.8 times as much."""
    text = " ".join(SAMPLES[kind])
    assert 0.9 <= ApproximateCounter().count(text) / exact.count(text) <= 1.8


@given(st.lists(st.sampled_from([s for kind in SAMPLES.values() for s in kind]), min_size=2, max_size=30))
def test_the_estimate_holds_for_mixed_text(sentences):
    """Any mixture of scripts, code and emoji stays within 0.8 to 2 times the exact count."""
    text = "\n".join(sentences)
    assert 0.8 <= ApproximateCounter().count(text) / token_counter("cl100k_base").count(text) <= 2.0


@given(st.text(min_size=1), st.text())
def test_the_estimate_is_positive_and_grows(text, more):
    """Nothing is free, and more text never counts much less."""
    counter = ApproximateCounter()
    assert counter.count("") == 0
    assert counter.count(text) >= 1
    assert counter.count(text + more) >= counter.count(text) * 0.5


def test_every_character_belongs_to_a_run():
    """The estimate skips nothing: the runs of a text put together are the text."""
    text = "".join(map(chr, range(0x3000))) + "漢字かな한글😀\U0010ffff"
    assert "".join(m[0] for m in tokens._RUN.finditer(text)) == text
