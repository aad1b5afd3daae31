"""The command line: what each command promises, run in-process as a user would type it."""

import io
import json
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from neuralflow_memory.cli import app, doctor, render
from neuralflow_memory.cli.formats import read_jsonl, read_locomo
from neuralflow_memory.errors import InputError
from neuralflow_memory.types import Candidate, Context, Message, SessionInfo

ROOT = Path(__file__).parent.parent
COMMANDS = ["add", "context", "demo", "doctor", "import", "search", "sessions", "stats"]

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


def test_sessions_are_listed_by_user(run, jsonl):
    """`sessions` shows each conversation with how many messages it has."""
    run("import", jsonl)
    listed = {s["session_id"]: s["messages"] for s in said(run("sessions", "--user", "ada", "--json"))}
    assert listed == {"garden": 4, "kitchen": 1}
    assert said(run("sessions", "--user", "bob", "--json")) == []
    assert "garden" in run("sessions", "--user", "ada").stdout


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
        ("{", "Invalid JSON"),
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


def test_doctor_says_when_another_process_has_the_folder(run, tmp_path):
    """A folder in use is not damaged: doctor names the state and exits with 0."""
    run("add", "Hello.", "--session", "s")
    code = (
        f"from neuralflow_memory import open_memory\nwith open_memory({str(tmp_path / 'memory')!r}, embedder='none'):\n"
        "    print('open', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        findings = {f["name"]: f for f in said(run("doctor", "--json"))}
        result = run("stats", code=1)
        other.communicate("\n")
    assert findings["folder"]["level"] == "note"
    assert str(other.pid) in findings["folder"]["detail"]
    assert result.stderr.startswith("Error: ")


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
    assert "30 more" in summed
    assert "210" in summed
    assert any("first" in line and "recent" in line for line in lines)


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
    st.lists(st.tuples(st.sampled_from(list(render.PARTS)), st.integers(0, 3000), st.booleans()), max_size=8),
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
