"""The command line: what each command promises, run in-process as a user would type it."""

import io
import json
import re
import signal
import sqlite3
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import FailingEmbedder, wait_until
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from neuralflow_memory import open_memory
from neuralflow_memory.cli import app, doctor, render
from neuralflow_memory.cli.formats import _EXPECTED, _Line, _Question, read_jsonl, read_locomo
from neuralflow_memory.cli.importing import wait
from neuralflow_memory.errors import InputError
from neuralflow_memory.testing import HashingEmbedder
from neuralflow_memory.types import Candidate, Context, Message, SessionInfo

ROOT = Path(__file__).parent.parent
COMMANDS = ["add", "backup", "bench", "chat", "context", "demo", "doctor", "eval", "export", "fit", "import"]
COMMANDS += ["reindex", "restore", "search", "sessions", "stats", "sweep"]

LINES = [
    {"session_id": "garden", "user_id": "ada", "role": "user", "content": "The beans go by the south wall."},
    {"session_id": "garden", "user_id": "ada", "role": "assistant", "content": "South wall it is."},
    {"session_id": "garden", "user_id": "ada", "role": "user", "content": "Yes."},
    {"session_id": "garden", "user_id": "ada", "role": "user", "content": "Yes."},
    {
        "session_id": "kitchen",
        "user_id": "ada",
        "role": "user",
        "content": "The oven door sticks.",
        "created_at": "2026-03-01T10:00:00Z",
        "metadata": {"room": "kitchen"},
    },
]

LOCOMO = [
    {
        "sample_id": "pair-1",
        "conversation": {
            "speaker_a": "Vera",
            "speaker_b": "Otto",
            "session_1_date_time": "9:05 am on 3 March, 2026",
            "session_1": [
                {"speaker": "Vera", "dia_id": "D1:1", "text": "I planted a quince tree by the gate."},
                {"speaker": "Otto", "dia_id": "D1:2", "text": "Mine died.", "blip_caption": "a bare tree"},
            ],
            "session_2_date_time": "7:30 pm on 12 April, 2026",
            "session_2": [{"speaker": "Otto", "dia_id": "D2:1", "text": "I bought a new one."}],
        },
        "qa": [],
    }
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command line on a memory of this test's own, without an embedding model."""
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "memory"))
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, code=0):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES))
    return file


def said(call):
    return json.loads(call.stdout)


# -- the commands


def test_an_added_message_is_found_by_search(run):
    """What `add` took, `search` brings back, with its session and the reasons."""
    run("add", "My piano was tuned by Mr. Alvarez.", "--session", "one", "--user", "ada")
    run("add", "I will remember that.", "--session", "one", "--user", "ada", "--role", "assistant")
    (hit, *_) = said(run("search", "who tuned the piano", "--user", "ada", "--json"))
    assert (hit["content"], hit["session_id"], hit["role"]) == ("My piano was tuned by Mr. Alvarez.", "one", "user")
    assert 0 <= hit["score"] <= 1
    assert hit["signals"]
    assert "Alvarez" in run("search", "who tuned the piano", "--user", "ada").stdout


def test_search_options_narrow_what_is_found(run, jsonl):
    """Session, k, type, dates and a filter each leave out what they say."""
    run("import", jsonl)
    everything = said(run("search", "oven door beans wall", "--user", "ada", "--json"))
    assert {hit["session_id"] for hit in everything} == {"garden", "kitchen"}

    def sessions(*options):
        return {
            h["session_id"] for h in said(run("search", "oven door beans wall", "--user", "ada", "--json", *options))
        }

    assert sessions("--session", "kitchen") == {"kitchen"}
    assert sessions("--until", "2026-03-02") == {"kitchen"}
    assert sessions("--since", "2026-03-02") == {"garden"}
    assert sessions("--filter", '{"room": "kitchen"}') == {"kitchen"}
    assert sessions("--type", "long_term") == set()
    assert len(said(run("search", "oven door beans wall", "--user", "ada", "-k", "1", "--json"))) == 1


def test_another_user_finds_nothing(run, jsonl):
    """The command line keeps users apart like every other door."""
    run("import", jsonl)
    assert said(run("search", "oven door", "--user", "bob", "--json")) == []
    assert "Nothing found" in run("search", "oven door", "--user", "bob").stdout


def test_context_shows_the_messages_within_the_budget(run, jsonl):
    """`context` prints what a model would see and what it costs."""
    run("import", jsonl)
    result = said(run("context", "--session", "garden", "--user", "ada", "--max-tokens", "300", "--json"))
    assert result["budget"] == 300
    assert 0 < result["tokens"] <= 300
    assert result["messages"][-1]["content"] == "Yes."
    assert {c["part"] for c in result["report"]} >= {"turn"}
    shown = run("context", "where do the beans go", "--session", "garden", "--user", "ada").stdout
    assert "south wall" in shown
    assert "tokens" in shown
    found = said(run("context", "where do the beans go", "--session", "garden", "--user", "ada", "--json"))
    assert found["margin"] == 1.0
    assert found["cacheable"] >= 0
    assert all(c["score"] > 0 and c["signals"] for c in found["report"] if c["part"] == "hit")
    assert any(c["part"] == "hit" for c in found["report"])


def test_context_can_cut_a_turn_that_is_too_long(run):
    """`--overflow truncate`, as the error says; and nothing to show is said."""
    run("add", "The beans go by the south wall. " * 20, "--session", "garden", "--user", "ada")
    tight = ("context", "--session", "garden", "--user", "ada", "--max-tokens", "40")
    assert "truncate" in run(*tight, code=1).stderr
    assert "[…]" in run(*tight, "--overflow", "truncate").stdout
    assert run("context", "--user", "bob").stdout.startswith("Nothing to show")


def test_sessions_are_listed_by_user(run, jsonl):
    """`sessions` shows each conversation with how many messages it has."""
    run("import", jsonl)
    listed = {s["session_id"]: s["messages"] for s in said(run("sessions", "--user", "ada", "--json"))}
    assert listed == {"garden": 4, "kitchen": 1}
    assert said(run("sessions", "--user", "bob", "--json")) == []
    assert "garden" in run("sessions", "--user", "ada").stdout


def test_an_empty_list_of_conversations_says_so(run, jsonl):
    """Instead of an empty table: whose conversations there are none of, and what to pass."""
    run("import", jsonl)
    assert run("sessions").stdout == "no conversations without a user; pass --user NAME\n"
    assert run("sessions", "--user", "bob").stdout == "no conversations of bob\n"


def test_context_of_an_unknown_conversation_says_so(run, jsonl):
    """A mistyped name is told, and is no error; a question is answered from the user's other conversations."""
    run("import", jsonl)
    told = "there is no conversation gardn of ada yet\n"
    assert run("context", "--session", "gardn", "--user", "ada").stdout == told
    assert run("context", "--session", "gardn").stdout == "there is no conversation gardn without a user yet\n"
    answered = run("context", "where do the beans go", "--session", "gardn", "--user", "ada").stdout
    assert answered.startswith(told)
    assert "south wall" in answered
    result = run("context", "--session", "gardn", "--user", "ada", "--json")
    assert json.loads(result.stdout)["messages"] == []
    assert result.stderr == told


@pytest.mark.parametrize("command", [["add", "The door sticks.", "--session", "s"], ["sessions"]])
def test_commands_that_need_no_model_load_none(run, tmp_path, monkeypatch, command):
    """`add` and `sessions` are quick also where a model is set; what was added waits for it."""
    run("add", "Hello.", "--session", "s")
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "all-MiniLM-L6-v2")
    code = (
        f"import sys; from neuralflow_memory.cli import app; app({command!r}, standalone_mode=False)\n"
        "print([n for n in ('torch', 'sentence_transformers', 'chromadb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_add_took_is_embedded_when_the_memory_is_next_opened(run, tmp_path):
    """Nothing is lost by adding without the model: the next opening with one embeds it."""
    run("add", "The door sticks.", "--session", "s")
    assert said(run("stats", "--json"))["dirty"] == 1
    with open_memory(tmp_path / "memory", embedder=HashingEmbedder()) as memory:
        memory.flush()
        facts = memory.stats()
    assert (facts["dirty"], facts["chroma"]) == (0, 1)


def test_stats_speak_no_python(run, jsonl):
    """Nothing is "none" and true is "yes" on screen."""
    run("import", jsonl)
    shown_ = run("stats").stdout
    assert re.search(r"parked +none *\n", shown_)
    assert re.search(r"last error +none *\n", shown_)
    assert re.search(r"parked count +0 *\n", shown_)
    assert not {"None", "[]", "True", "False"} & set(shown_.split())


def test_stats_count_what_is_there(run, jsonl):
    """`stats` counts entries and conversations."""
    run("import", jsonl)
    facts = said(run("stats", "--json"))
    assert facts["entries"] == 5
    assert facts["sessions"] == 2
    assert "entries" in run("stats").stdout


# -- import


def test_importing_twice_adds_nothing(run, jsonl):
    """An import is idempotent, ids given or not, and equal turns stay two."""
    assert said(run("import", jsonl, "--json")) == {"messages": 5, "added": 5, "sessions": 2}
    assert said(run("import", jsonl, "--json")) == {"messages": 5, "added": 0, "sessions": 2}
    assert "5 were there already" in run("import", jsonl).stdout


def test_a_grown_file_adds_only_the_new_lines(run, jsonl):
    """Lines that were imported before are recognised wherever new ones were put."""
    run("import", jsonl)
    new = {"session_id": "garden", "user_id": "ada", "role": "user", "content": "And peas."}
    jsonl.write_text("\n".join(json.dumps(line) for line in [new, *LINES]))
    assert said(run("import", jsonl, "--json"))["added"] == 1


def test_summaries_are_not_counted_as_added(run, tmp_path):
    """However often the memory folds meanwhile, no more is added than the file has."""
    file = tmp_path / "long.jsonl"
    line = {"session_id": "s", "role": "user"}
    file.write_text("\n".join(json.dumps({**line, "content": f"Bed {n} holds {n * 7} beans."}) for n in range(200)))
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({**line, "content": f"Pot {n} has {n} peas."}) for n in range(200)))
    assert said(run("import", file, "--json"))["added"] == 200
    with open_memory(tmp_path / "memory", embedder="none") as memory:
        memory.session("s").compact()  # what the import left to be folded
        assert memory.stats()["entries"] > 200, "nothing was folded, so the test shows nothing"
    assert said(run("import", more, "--json"))["added"] == 200


_SLOW = """
import signal, sys, time
from neuralflow_memory import settings
from neuralflow_memory.testing import HashingEmbedder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down an ignored one
class Slow(HashingEmbedder):
    def embed_documents(self, texts):
        time.sleep(1)
        return super().embed_documents(texts)
if sys.argv[1] == "slow":
    settings._embedder = lambda _: Slow()
from neuralflow_memory.cli import main
sys.argv[1:2] = ["import"]
main()
"""


@pytest.mark.parametrize(("mode", "messages", "reached"), [("none", 200_000, 1024), ("slow", 2000, 2000)])
def test_ctrl_c_ends_an_import_and_says_how_to_go_on(run, tmp_path, mode, messages, reached):
    """While adding as well as while indexing: exit code 130, what is stored, no traceback, and the memory is sound."""
    file = tmp_path / "long.jsonl"
    line = {"session_id": "s", "role": "user"}
    file.write_text("\n".join(json.dumps({**line, "content": f"Bean {n}."}) for n in range(messages)))
    command = [sys.executable, "-c", _SLOW, mode, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_until(lambda: child.poll() is not None or _stored(tmp_path / "memory") >= reached, seconds=120)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert stdout == ""
    told = re.fullmatch(r"stopped; ([\d,]+) messages are stored, .*; run it again to go on\n", stderr)
    assert told, stderr
    facts = said(run("stats", "--json"))
    assert 0 < int(told[1].replace(",", "")) <= facts["entries"]
    assert facts["dirty"] > 0, "all was done before it was stopped, so the test shows nothing"


def _stored(folder):
    try:
        with sqlite3.connect(f"file:{folder / 'ledger.sqlite3'}?mode=ro", uri=True) as db:
            return db.execute("SELECT count(*) FROM entries WHERE role = 'user'").fetchone()[0]
    except sqlite3.Error:
        return 0  # not made yet


def test_waiting_for_an_index_that_stands_still_ends_with_its_error(opened):
    """An embedder that always fails does not hold the import for ever, and its error is told."""
    memory = opened(embedder=FailingEmbedder(lambda _: True))
    memory.session("s").add("Hello.")
    assert "can't be embedded" in wait(memory, progress=Progress(disable=True), patience=0.5)


def test_parked_entries_are_not_waited_for(opened):
    """One text that can't be embedded is parked, and the import ends."""
    memory = opened(embedder=FailingEmbedder(lambda text: text == "bad"))
    memory.session("s").add(["good", "bad"])
    assert wait(memory, progress=Progress(disable=True)) is None
    facts = memory.stats()
    assert facts["dirty"] == facts["parked_count"] == 1


def test_a_wrong_line_stops_the_import_before_anything_is_written(run, jsonl):
    """The error names the line; the good lines before it are not imported either."""
    jsonl.write_text(jsonl.read_text() + '\n\n{"session_id": "garden", "role": "gardener", "content": "Hm."}\n')
    result = run("import", jsonl, code=1)
    assert "chat.jsonl, line 7: role" in result.stderr
    assert "Traceback" not in result.output
    run("stats", code=1)  # there still is no memory


def test_a_locomo_file_becomes_one_user_with_a_session_each(run, tmp_path):
    """Speakers, dates and captions arrive where search and filters find them."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(LOCOMO))
    assert said(run("import", file, "--format", "locomo", "--json"))["added"] == 3
    assert said(run("import", file, "--format", "locomo", "--json"))["added"] == 0
    (hit,) = said(run("search", "bare tree", "--user", "pair-1", "--filter", '{"dia_id": "D1:2"}', "--json"))
    assert hit["content"] == "Mine died. [shares a photo: a bare tree]"
    assert (hit["role"], hit["name"]) == ("assistant", "Otto")
    assert hit["session_id"] == "pair-1-session_1"
    assert hit["created_at"] == "2026-03-03T09:05:20+00:00"


def test_locomo_speakers_keep_their_roles_in_every_session(tmp_path):
    """The first speaker of the conversation is the user, also where the other one begins a session."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(LOCOMO[0]))
    assert [t.message.role for t in read_locomo(file)] == ["user", "assistant", "assistant"]
    assert {t.user_id for t in read_locomo(file, user_id="vera")} == {"vera"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "object"),
        ('{"role": "user", "content": "x"}', "session_id"),
        ('{"session_id": "s", "role": "user"}', "empty"),
        ('{"session_id": "s", "role": "user", "content": "x", "contnet": "y"}', "contnet"),
        ('{"session_id": "s", "role": "user", "content": "x", "created_at": "soon"}', "created_at"),
        ('{"session_id": "", "role": "user", "content": "x"}', "session_id"),
        ('{"session_id": "s", "role": "tool", "content": "x"}', "tool_call_id"),
        ('{"session_id": "s", "role": "assistant", "tool_calls": [{"name": "f"}]}', "tool call"),
    ],
)
def test_each_kind_of_wrong_line_is_named(tmp_path, line, problem):
    """The reader says which line, and what about it."""
    file = tmp_path / "chat.jsonl"
    file.write_text('{"session_id": "s", "role": "user", "content": "fine"}\n' + line)
    with pytest.raises(InputError, match="line 2") as caught:
        list(read_jsonl(file))
    assert problem in str(caught.value)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"content": 5}, "content must be text or a list of blocks"),
        (
            {"content": None, "role": "king"},
            "role must be one of system, developer, user, assistant, tool; content must",
        ),
        ({"metadata": [1], "id": 7}, "id must be text; metadata must be a JSON object"),
        ({"tool_calls": [3, 4]}, "tool_calls must be a list of JSON objects"),
        ({"contnet": "y"}, "'contnet' is not a field of a message"),
    ],
)
def test_a_wrong_field_is_told_in_plain_words(tmp_path, line, problem):
    """Each field once, what it must be, and nothing of the library that checks."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"session_id": "s", "role": "user", "content": "x", **line}))
    with pytest.raises(InputError) as caught:
        list(read_jsonl(file))
    assert str(caught.value).startswith(f"chat.jsonl, line 1: {problem}")
    assert "Input should" not in str(caught.value)


def test_every_field_of_a_line_has_its_words():
    """A field that is added to the format must say what it must be."""
    assert set(_EXPECTED) == set(_Line.model_fields) | set(_Question.model_fields)


@pytest.mark.parametrize("text", ["nonsense", "[3]", '{"sample_id": "a"}', '[{"sample_id": "a", "conversation": 5}]'])
def test_a_file_that_is_not_locomo_is_an_input_error(tmp_path, text):
    """Whatever stands in the file, the error is ours and names the file."""
    file = tmp_path / "pairs.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"pairs\.json"):
        list(read_locomo(file))


def test_bytes_that_are_no_text_are_an_input_error(tmp_path):
    """A file in another encoding is refused, not guessed at."""
    file = tmp_path / "chat.jsonl"
    file.write_bytes(b'{"session_id": "s", "role": "user", "content": "caf\xe9"}\n')
    with pytest.raises(InputError, match="UTF-8"):
        list(read_jsonl(file))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["yes", "no"])), max_size=12), st.data())
def test_ids_made_from_content_do_not_depend_on_other_lines(tmp_path_factory, lines, data):
    """Ids are unique, and a line put anywhere changes no other line's set of ids."""
    file = tmp_path_factory.mktemp("import") / "chat.jsonl"

    def ids(rows):
        text = "\n".join(json.dumps({"session_id": s, "role": "user", "content": c}) for s, c in rows)
        file.write_text(text)
        return [t.message.id for t in read_jsonl(file)]

    before = ids(lines)
    at = data.draw(st.integers(0, len(lines)))
    after = ids([*lines[:at], ("a", "perhaps"), *lines[at:]])
    assert len(set(before)) == len(lines)
    assert set(before) < set(after)


# -- doctor


def test_doctor_is_content_with_a_fresh_memory(run, jsonl):
    """Nothing is wrong with a memory that was just made; a lexical one is pointed out."""
    run("import", jsonl)
    findings = {f["name"]: f for f in said(run("doctor", "--json"))}
    assert {f["level"] for f in findings.values()} <= {"ok", "note"}
    assert findings["ledger"]["level"] == "ok"
    assert findings["embedder"]["level"] == "note"
    assert "chromadb" in run("doctor").stdout


def test_doctor_makes_no_folder(run, tmp_path):
    """Looking does not leave an empty memory behind."""
    run("doctor")
    assert not (tmp_path / "memory").exists()


def test_doctor_fails_on_a_folder_that_is_no_memory(run, tmp_path):
    """A damaged ledger gives exit code 1 and a line that says so."""
    run("add", "Hello.", "--session", "s")
    for file in (tmp_path / "memory").glob("*.sqlite*"):
        file.write_bytes(b"not a database" * 1000)
    result = run("doctor", "--json", code=1)
    assert "wrong" in {f["level"] for f in json.loads(result.stdout)}


def test_commands_work_beside_a_running_application(run, tmp_path):
    """Doctor says who indexes; what one adds, the other sees."""
    run("add", "Hello.", "--session", "s")
    code = (
        "from neuralflow_memory import open_memory\nfrom neuralflow_memory.testing import HashingEmbedder\n"
        f"with open_memory({str(tmp_path / 'memory')!r}, embedder=HashingEmbedder()) as memory:\n"
        "    chat = memory.session('s')\n    memory.flush()\n    print('open', flush=True)\n    input()\n"
        "    print([m.content for m in chat.messages()], flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        findings = [f["detail"] for f in said(run("doctor", "--json"))]
        assert any(str(other.pid) in detail and "indexes" in detail for detail in findings)
        assert "entries" in run("stats").stdout
        run("add", "Good evening.", "--session", "s")
        assert other.communicate("\n")[0] == "['Hello.', 'Good evening.']\n"


def test_doctor_points_at_one_session_id_with_and_without_a_user(run):
    """session("x") and session("x", user_id="ada") are different chats, which is easily overlooked."""
    run("add", "Hello.", "--session", "x")
    run("add", "Hello.", "--session", "x", "--user", "ada")
    run("add", "Hello.", "--session", "y", "--user", "ada")
    (found,) = [f for f in said(run("doctor", "--json")) if f["name"] == "two chats, one id"]
    assert "'x'" in found["detail"]


def test_parked_entries_are_wrong():
    """Entries that fail to be indexed make doctor fail, and their error is shown."""
    facts = {
        "path": "m",
        "entries": 1,
        "sessions": 1,
        "integrity": "ok",
        "dirty": 1,
        "parked": [{"key": "aa", "attempts": 9, "error": "no space"}],
        "parked_count": 1,
        "last_error": None,
        "exact_tokens": True,
        "tokenizer": "cl100k_base",
        "embedder": "m",
    }
    levels = {f.name: f.level for f in doctor.state(facts)}
    assert levels["parked"] == "wrong"
    assert "parked" not in {f.name for f in doctor.state({**facts, "parked": []})}


def test_doctor_knows_every_extra_of_the_project():
    """The extras that doctor looks for are those that can be installed, with the same libraries."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {n: {re.split(r"[\[<>=~]", d)[0] for d in ds} for n, ds in extras.items() if n != "all"}
    assert {name: set(libraries) for name, libraries in doctor.EXTRAS.items()} == named


# -- errors, help, output


def test_a_mistyped_path_is_one_clean_line_and_makes_no_folder(run, tmp_path):
    """Reading commands neither create a memory nor show a traceback."""
    for command in (["stats"], ["sessions"], ["search", "x", "--user", "ada"], ["context", "--session", "s"]):
        result = run(*command, "--path", tmp_path / "nowhere", code=1)
        assert result.stderr.startswith("Error: there is no memory at")
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["search", "x"],
        ["context"],
        ["search", "x", "--user", "a", "--filter", "{"],
        ["search", "x", "--user", "a", "--filter", "[]"],
        ["search", "x", "--user", "a", "--type", "dreams"],
        ["search", "x", "--user", "a", "-k", "0"],
        ["add", "hello"],
        ["add", "hello", "--session", "s", "--role", "king"],
        ["import", "no-such-file.jsonl"],
        ["dance"],
    ],
)
def test_wrong_usage_exits_with_2(run, args):
    """A command typed wrong is told apart from one that failed."""
    assert "Traceback" not in run(*args, code=2).output


def test_a_wrong_filter_is_an_error_of_ours(run, jsonl):
    """An operator that does not exist fails with exit code 1 and its name."""
    run("import", jsonl)
    result = run("search", "x", "--user", "ada", "--filter", '{"room": {"$near": 1}}', code=1)
    assert "$near" in result.stderr


def test_every_command_has_help_and_stands_in_the_readme(run):
    """No command without a word on what it does, here and in the README."""
    from typer.main import get_command

    commands = get_command(app).commands
    assert sorted(commands) == COMMANDS
    readme = (ROOT / "README.md").read_text()
    for name, command in commands.items():
        assert len(command.help.split()) > 4
        assert command.help.split()[0] in run(name, "--help").stdout
        for option in command.params:
            assert getattr(option, "help", None), f"{name} {option.name} has no help"
        assert not readme or f"neuralflow-memory {name}" in readme or f"`{name}`" in readme


def test_version_is_the_packages(run):
    """`--version` prints what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").stdout.strip() == project["version"]


def test_the_command_line_starts_light():
    """No heavy library is imported before a command needs it."""
    heavy = ("chromadb", "torch", "sentence_transformers", "tiktoken", "langchain_core", "llama_index", "google.genai")
    code = f"import sys, neuralflow_memory.cli; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_was_left_out_is_told_by_reason():
    """A long report is summed up: each turn that is in, and how many are not, and why."""
    inside = [Candidate("turn", "first", 10, included=True, reason="recent")]
    outside = [Candidate("hit", f"id-{i}", 7, included=False, reason="no room left") for i in range(30)]
    context = Context((Message("user", "hello"),), 10, 20, (*inside, *outside))
    lines = shown(render.context_view(context)).splitlines()
    (summed,) = [line for line in lines if "no room left" in line]
    assert "30 hits" in summed
    assert "210" in summed
    assert any("first" in line and "recent" in line for line in lines)


def test_long_ids_take_one_line_of_the_report():
    """Ten characters of an id are shown; the JSON has all of it."""
    own_id = "0123456789abcdef0123456789abcdef"
    context = Context((), 10, 20, (Candidate("turn", own_id, 10, included=True, reason="recent"),))
    (line,) = [line for line in shown(render.context_view(context), width=60).splitlines() if "0123" in line]
    assert re.search(r"in +turn +0123456789… +10 +recent", line)
    assert "abc" not in shown(render.context_view(context), width=60)
    assert json.loads(render.as_json(context))["report"][0]["id"] == own_id


def shown(renderable, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_stored_text_can_not_drive_the_terminal():
    """Escape sequences and rich markup in a stored turn are printed as text."""
    text = render.said("[red]x[/red] \x1b[2J\x9b2J\rend")
    assert "[red]x[/red]" in shown(text)
    assert not {"\x1b", "\x9b", "\r"} & set(text.plain)


@given(
    st.lists(
        st.tuples(st.sampled_from(get_args(get_type_hints(Candidate)["part"])), st.integers(0, 3000), st.booleans()),
        max_size=8,
    ),
    st.integers(0, 4000),
    st.integers(10, 80),
)
def test_the_budget_bar_always_has_its_width(parts, budget, width):
    """Whatever fills the budget, the bar is as long as asked and never overflows."""
    report = tuple(Candidate(part, "i", tokens, inside, "because") for part, tokens, inside in parts)
    context = Context((), sum(c.tokens for c in report if c.included), budget, report)
    bar = render.budget_bar(context, width=width).plain
    assert sum(bar.count(c) for c in "█░") == width


def test_session_times_are_json():
    """What --json prints can be parsed, times included."""
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    value = [SessionInfo("s", None, "default", 1, moment, moment), Message("user", "hi")]
    (session, message) = json.loads(render.as_json(value))
    assert session["created_at"] == "2026-01-02T00:00:00+00:00"
    assert message["content"] == "hi"
