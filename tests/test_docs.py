"""What README.md and docs/ say is so: snippets run, and tables agree with the code they describe."""

import asyncio
import gc
import re
import shlex
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel

from neuralflow_memory import Memory, Session, Settings, State, Task, errors
from neuralflow_memory.models import gemini
from neuralflow_memory.rules import filters
from neuralflow_memory.session import Entries

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MEANING = {"README.md", "search.md"}
"""Pages about search by meaning; the others run without the seconds that a model takes to load."""

_FENCE = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)

_PRINTED = re.compile(r"\n\n<!-- printed -->\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page):
    return page.name


def snippets(page, language):
    """(line, code) of each fenced block in *language* that isn't marked as not to be run."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        if found["language"] == language and not found["mark"]:
            yield text.count("\n", 0, found.start("code")), found["code"]


def printed(page):
    """What the page says that snippets print, by the line of their code: a block marked so right below each."""
    text = page.read_text()
    found = [(block.start("code"), _PRINTED.match(text, block.end())) for block in _FENCE.finditer(text)]
    return {text.count("\n", 0, start): below[1] for start, below in found if below}


def alike(said):
    """What was printed, without ids that are new in each run, and scores, whose last digit depends on the machine."""
    return re.sub(r"(?<!\d)0?\.\d\d", "#", re.sub(r"\b(task|summary)-\w+…", r"\1-#", said)).rstrip()


def tables(page, first):
    """The rows of the tables whose first column is headed *first*, as lists of cells."""
    rows, inside = [], False
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] == first:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rows.append(cells)
    return rows


def unquoted(cell):
    return re.findall(r"`([^`\n]+)`", cell.replace("```", ""))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of this test's own to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- snippets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name)
def test_every_python_snippet_runs(page, elsewhere, monkeypatch, capsys):
    """Each page works from top to bottom, as somebody would type it in, and nothing falls back on the way.

    What a page shows as printed is what its snippet prints.
    """
    if page.name not in MEANING:
        monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    names = {"__name__": "__main__"}
    shown = printed(page)
    assert len(shown) == page.read_text().count("<!-- printed -->")
    try:
        import langchain_classic  # noqa: F401  # turns its deprecations on when it is first imported

        with warnings.catch_warnings():
            # LangChain deprecates these two classes; the page says so.
            warnings.filterwarnings("ignore", message=".*(RunnableWithMessageHistory|ConversationChain)")
            warnings.filterwarnings("error", category=RuntimeWarning)
            for line, code in snippets(page, "python"):
                exec(compile("\n" * line + code, page, "exec"), names)
                said = capsys.readouterr().out
                assert line not in shown or alike(said) == alike(shown[line])
    finally:
        for value in names.values():
            if isinstance(value, Memory):
                value.close()
        names.clear()
        with warnings.catch_warnings():
            # LlamaIndex opens a database for each of its memories and never closes it: let that be said here, not in another test.
            warnings.filterwarnings("ignore", category=ResourceWarning)
            gc.collect()


def test_the_readmes_commands_run(elsewhere, monkeypatch):
    """The console block can be typed in line by line."""
    from typer.testing import CliRunner

    from neuralflow_memory.cli import app

    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    lines = [line.removeprefix("$ ") for _, block in snippets(README, "console") for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "neuralflow-memory"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- not run" in p.read_text()], ids=name)
def test_what_is_not_run_is_at_least_python(page):
    """A snippet that needs a key or somebody's own graph still parses, and each mark belongs to a snippet."""
    marked = [found["code"] for found in _FENCE.finditer(page.read_text()) if found["mark"]]
    assert len(marked) == page.read_text().count("<!-- not run")
    for code in marked:
        compile(code, page, "exec")


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / ".github").glob("*.md"))], ids=name)
def test_links_within_the_repository_lead_somewhere(page):
    """A linked file exists, and so does the heading that a link names."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {target}"


# --- tables ---------------------------------------------------------------------------------------------------------


def options():
    """(name, default, description) of every option, in the model's order."""
    for section, field in Settings.model_fields.items():
        if isinstance(field.default, BaseModel):
            for option, inner in type(field.default).model_fields.items():
                yield f"{section}.{option}", inner.default, inner.description
        else:
            yield section, field.default, field.description


def test_the_options_table_is_the_models():
    """Names, defaults and meanings are those in config.py, in its order."""
    expected = [
        [f"`{option}`", "-" if default is None else f"`{default}`", meaning] for option, default, meaning in options()
    ]
    found = tables(README, "option")
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, (_, _, meaning) in zip(found, expected, strict=True):
        assert row[2] == meaning if meaning else row[2], row


def test_the_extras_table_is_the_projects():
    """Each extra stands there with the libraries that it brings."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = {unquoted(row[0])[0]: unquoted(row[1]) for row in tables(README, "extra")}
    assert list(found) == list(extras)
    for extra, libraries in extras.items():
        brought = [] if extra == "all" else [Requirement(library).name for library in libraries]
        assert found[extra] == brought


def test_every_command_stands_in_the_readme():
    """The table of commands lists each command once, and no other."""
    from typer.main import get_command

    from neuralflow_memory.cli import app

    listed = [unquoted(row[0])[0].removeprefix("neuralflow-memory ") for row in tables(README, "command")]
    assert sorted(listed) == sorted(get_command(app).commands)


def test_every_error_stands_in_troubleshooting():
    """Each error is there with what it also is."""
    ours = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.NeuralFlowError)}
    rows = tables(ROOT / "docs/troubleshooting.md", "error")
    listed = {unquoted(row[0])[0]: unquoted(row[1]) for row in rows}
    assert set(listed) == set(ours)
    for error, bases in listed.items():
        assert set(bases) == {b.__name__ for b in ours[error].__bases__} - {"NeuralFlowError"}, error


def test_the_signals_table_is_the_rankings():
    """Each signal is explained, with the weight that it has."""
    found = {unquoted(row[0])[0]: float(row[1]) for row in tables(ROOT / "docs/search.md", "signal")}
    assert found == Settings().ranking.model_dump()


def test_the_table_of_caps_is_the_budgets():
    """Each cap stands in working_memory.md, whole and scaled down, and so do the marks between which a window moves."""
    page = ROOT / "docs/working_memory.md"
    rows = [row for row in tables(page, "part") if "budget." in row[0]]
    budget = Settings().budget
    for part, whole, quarter in rows:
        option = unquoted(part)[0].removeprefix("budget.")
        cap = getattr(budget, option) * (budget.total if option == "hits_share" else 1)
        assert [number(whole), number(quarter)] == [cap, cap / 4], part
    assert len(rows) == len(type(budget).model_fields) - 1
    limits = re.findall(r"`pruning\.(\w+)` \(([\d,]+)\)", page.read_text())
    pruning = Settings().pruning.model_dump() | {"half": Settings().pruning.max_context_tokens // 2}
    found = {(name, number(value)) for name, value in limits}
    assert found == {
        ("summarization_threshold", pruning["summarization_threshold"]),
        ("max_context_tokens", pruning["max_context_tokens"]),
        ("max_context_items", pruning["max_context_items"]),
        ("max_context_tokens", pruning["half"]),
    }


def number(cell):
    return int(re.search(r"\d[\d,]*", cell)[0].replace(",", ""))


def test_the_table_of_prices_is_the_summarizers():
    """Each model whose price is known stands there with it."""
    rows = tables(ROOT / "docs/working_memory.md", "model")
    found = {model: (float(row[1]), float(row[2])) for row in rows for model in unquoted(row[0])}
    assert found == gemini._PRICES


def test_every_filter_operator_and_field_is_explained():
    """search.md names what the filter language has, and no operator that it has not."""
    rows = tables(ROOT / "docs/search.md", "operator")
    named = {word for row in rows for word in unquoted(row[0])}
    assert named == {*filters._OPERATORS, "$and", "$or"}
    words = set(unquoted((ROOT / "docs/search.md").read_text()))
    assert words >= filters.FIELDS


def test_every_operation_has_the_twin_that_the_docs_promise():
    """ "Every operation has a twin whose name begins with a": same arguments, and a coroutine."""
    without = {"session", "path", "settings", "task", "thread", "values"}  # no I/O
    for owner in (Memory, Session, Entries, State, Task):
        public = {n for n, value in vars(owner).items() if not n.startswith("_") and callable(value)}
        plain = {n for n in vars(owner) if f"a{n}" in public}  # a property that reads from the folder has one, too
        twins = {f"a{n}" for n in plain}
        assert public - plain - twins <= without, owner
        assert all(asyncio.iscoroutinefunction(getattr(owner, twin)) for twin in twins)


def test_the_layers_are_those_that_are_enforced():
    """architecture.md shows the rows of import-linter's contract, from top to bottom."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    enforced = [set(re.findall(r"neuralflow_memory\.(\w+)", row)) for row in contract["layers"]]
    block = next(code for _, code in snippets(ROOT / "docs/architecture.md", "text") if code.startswith("cli\n"))
    assert [set(re.split(r"\s{2,}", line)[0].split(", ")) for line in block.splitlines()] == enforced


def test_every_file_that_architecture_names_is_there():
    """The table of files is the package's as it is now."""
    named = [file for row in tables(ROOT / "docs/architecture.md", "file") for file in unquoted(row[0])]
    assert len(named) > 10
    assert [file for file in named if not (ROOT / "neuralflow_memory" / file).is_file()] == []


def test_what_holds_a_promise_is_there():
    """Each promise names a test file, or says what else holds it; links are checked above."""
    rows = tables(README, "promise")
    assert len(rows) >= 8
    assert all(row[1] for row in rows)


# --- the project's files --------------------------------------------------------------------------------------------


def test_constraints_are_names_and_versions_only():
    """Any package index will do: no address, no file, no local version suffix, and not this package itself."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "neuralflow" not in " ".join(pins)


def test_constraints_satisfy_the_project():
    """Whatever the project asks for has one pinned version, and it is within the project's bounds."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {re.sub(r"[-_.]+", "-", n).lower(): v for n, _, v in (p.partition("==") for p in lines if "==" in p)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    wanted = [Requirement(r) for r in project["project"]["dependencies"]]
    wanted += [Requirement(r) for group in (*extras, *groups) for r in group if isinstance(r, str)]
    for requirement in wanted:
        if requirement.name != project["project"]["name"]:
            assert pins[requirement.name.lower()] in requirement.specifier, requirement


def test_make_alone_lists_every_target():
    """Each target a person may call has a line of help."""
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split())
    assert set(re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE)) == phony


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the documentation's own libraries are not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    """Navigation, links and the reference are whole."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    assert (tmp_path / "site" / "reference" / "index.html").is_file()
