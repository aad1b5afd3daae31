"""The ledger's tables, as numbered migrations. A shipped migration is never edited; a change is a new one.

Entry numbers are `owner << 32 | n`, with n counted per owner: the rows of one user lie side by side in every table that
is keyed by the number, so that loading a scope is one range scan however many other users there are, and a number
shows whose it is.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable

APPLICATION_ID = 0x4E464D31  # "NFM1": tells our files from other SQLite files
OWNER_SHIFT = 32

_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # An owner is the widest scope that may be read at once: a user, or a session that has none.
    """CREATE TABLE owners (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, user_id TEXT,
        last_n INTEGER NOT NULL DEFAULT 0, erase_epoch INTEGER NOT NULL DEFAULT 0)""",
    # The session '' of an owner holds what belongs to no conversation: knowledge.
    """CREATE TABLE sessions (
        id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, session_id TEXT NOT NULL,
        created_at INTEGER NOT NULL, active_at INTEGER NOT NULL,
        last_seq INTEGER NOT NULL DEFAULT 0, last_position INTEGER NOT NULL DEFAULT 0,
        summary INTEGER, version INTEGER NOT NULL DEFAULT 0,
        UNIQUE (owner, session_id))""",
    """CREATE TABLE entries (
        no INTEGER PRIMARY KEY, session INTEGER NOT NULL, seq INTEGER NOT NULL, position INTEGER, key BLOB NOT NULL,
        id TEXT NOT NULL, type INTEGER NOT NULL, role TEXT, name TEXT, agent_id TEXT,
        content TEXT NOT NULL, body TEXT, payload TEXT, metadata TEXT, codec INTEGER NOT NULL DEFAULT 0,
        tags TEXT, category TEXT, source TEXT, importance REAL NOT NULL, provenance TEXT NOT NULL, trust REAL NOT NULL,
        sources TEXT, created_at INTEGER NOT NULL, written_at INTEGER NOT NULL, updated_at INTEGER NOT NULL,
        expires_at INTEGER, version INTEGER NOT NULL, tokens INTEGER NOT NULL, counter TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX entries_by_key ON entries (key)",
    "CREATE UNIQUE INDEX entries_by_seq ON entries (session, seq)",
    # The window, in its order; a cold session's is read without touching what was folded.
    "CREATE INDEX entries_in_window ON entries (session, position) WHERE position IS NOT NULL",
    # What ranking reads of an entry, in one narrow row: term ids in order, and the constants of its signals.
    """CREATE TABLE features (
        no INTEGER PRIMARY KEY, session INTEGER NOT NULL, seq INTEGER NOT NULL, type INTEGER NOT NULL, speaker TEXT,
        agent_id TEXT, created_at INTEGER NOT NULL, expires_at INTEGER, importance REAL NOT NULL,
        words INTEGER NOT NULL, question INTEGER NOT NULL, terms BLOB NOT NULL)""",
    # The embedding cache: by entry, found again by the hash of owner, model and text.
    "CREATE TABLE vectors (no INTEGER PRIMARY KEY, model INTEGER NOT NULL, hash BLOB NOT NULL, vector BLOB NOT NULL)",
    "CREATE INDEX vectors_by_hash ON vectors (hash)",
    "CREATE TABLE models (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dimensions INTEGER NOT NULL)",
    # Entries whose state the vector index has not seen yet: (entry, version), not operations.
    """CREATE TABLE dirty (
        no INTEGER PRIMARY KEY, key BLOB NOT NULL, version INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        retry_at INTEGER NOT NULL DEFAULT 0, error TEXT)""",
    # Keyed hashes without text: what was deleted stays deleted, whatever writes late.
    """CREATE TABLE tombstones (
        key BLOB PRIMARY KEY, owner INTEGER NOT NULL, version INTEGER NOT NULL, deleted_at INTEGER NOT NULL)
        WITHOUT ROWID""",
)


def _m001_tables(db: sqlite3.Connection) -> None:
    for statement in _TABLES:
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('secret', ?)", (secrets.token_bytes(16),))


def _m002_working_memory(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE entries ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0")
    db.execute("CREATE INDEX entries_working ON entries (session) WHERE type = 1")
    # The model that the session's prompts went to, as the host reported it.
    db.execute("ALTER TABLE sessions ADD COLUMN model TEXT")
    # Tokens a model was charged for, over ours: count, mean, and sum of squared deviations (Welford).
    db.execute(
        "CREATE TABLE calibration (tenant TEXT NOT NULL, model TEXT NOT NULL, n INTEGER NOT NULL, mean REAL NOT NULL, "
        "m2 REAL NOT NULL, PRIMARY KEY (tenant, model)) WITHOUT ROWID"
    )
    # What summaries took, by day (since 1970, UTC) and session.
    db.execute(
        "CREATE TABLE spending (day INTEGER NOT NULL, session INTEGER NOT NULL, calls INTEGER NOT NULL, "
        "input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost REAL NOT NULL, "
        "PRIMARY KEY (day, session)) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX spending_by_session ON spending (session)")
    from . import summaries  # which knows our constants

    # A summary used to quote the one before it, and to name the turns of its own fold only. What such ones cover is folded
    # anew.
    for session, owner in db.execute("SELECT id, owner FROM sessions WHERE summary IS NOT NULL").fetchall():
        made = "SELECT no FROM entries WHERE session = ? AND seq < 0 AND type = 3"
        gone = [number for (number,) in db.execute(made, (session,))]
        summaries.unfold(db, owner=owner, session=session, changed=(), gone=gone, now=0)


def _m003_values(db: sqlite3.Connection) -> None:
    # Keyed values. A path is the namespace's labels, each ended by a NUL, so that a prefix is a range of whole labels.
    # `ttl` is how long a value lives after it was put or read last.
    db.execute(
        "CREATE TABLE items (owner INTEGER NOT NULL, path BLOB NOT NULL, key TEXT NOT NULL, created_at INTEGER NOT NULL, "
        "updated_at INTEGER NOT NULL, ttl INTEGER, expires_at INTEGER, texts INTEGER NOT NULL, "
        "codec INTEGER NOT NULL DEFAULT 0, value TEXT NOT NULL, PRIMARY KEY (owner, path, key)) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX items_expiring ON items (owner, expires_at) WHERE expires_at IS NOT NULL")
    # The entries that a value is found by, as many as `texts` says.
    db.execute(
        "CREATE TABLE item_texts (owner INTEGER NOT NULL, path BLOB NOT NULL, key TEXT NOT NULL, no INTEGER NOT NULL, "
        "PRIMARY KEY (owner, path, key, no)) WITHOUT ROWID"
    )
    db.execute("CREATE UNIQUE INDEX item_texts_by_no ON item_texts (no)")


def _m004_traits(db: sqlite3.Connection) -> None:
    # More than whether it is a question, and the names by which speakers call each other; `retokenize` makes both anew.
    db.execute("ALTER TABLE features RENAME COLUMN question TO traits")
    db.execute("ALTER TABLE features ADD COLUMN called TEXT")


def _m005_questions(db: sqlite3.Connection) -> None:
    # Vectors of the questions that an owner asked last, by the hash of owner, model and text; no text.
    db.execute(
        "CREATE TABLE IF NOT EXISTS questions "
        "(id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, hash BLOB NOT NULL UNIQUE, vector BLOB NOT NULL)"
    )
    db.execute("CREATE INDEX IF NOT EXISTS questions_by_owner ON questions (owner)")


def _m006_age_of_marks(db: sqlite3.Connection) -> None:
    # When an entry was marked, in seconds since 1970. A new column could not have a default that is an expression.
    db.execute("ALTER TABLE dirty RENAME TO dirty_before")
    db.execute(
        "CREATE TABLE dirty (no INTEGER PRIMARY KEY, key BLOB NOT NULL, version INTEGER NOT NULL, "
        "attempts INTEGER NOT NULL DEFAULT 0, retry_at INTEGER NOT NULL DEFAULT 0, error TEXT, "
        "marked_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)))"
    )
    columns = "no, key, version, attempts, retry_at, error"
    db.execute(f"INSERT INTO dirty ({columns}) SELECT {columns} FROM dirty_before")
    db.execute("DROP TABLE dirty_before")


def _m007_changes(db: sqlite3.Connection) -> None:
    # Which entries were changed, by which process (a random number): what others have in RAM of them is old. The newest
    # ten thousand are kept.
    db.execute(
        "CREATE TABLE changes (id INTEGER PRIMARY KEY, no INTEGER NOT NULL, session INTEGER, origin INTEGER NOT NULL)"
    )
    db.execute(
        "CREATE TRIGGER changes_kept AFTER INSERT ON changes WHEN NEW.id % 1000 = 0 BEGIN "
        "DELETE FROM changes WHERE id <= NEW.id - 10000; END"
    )


def _add(db: sqlite3.Connection, table: str, **columns: str) -> bool:
    """Add *columns* that are not there yet; whether there were such."""
    there = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    new = [name for name in columns if name not in there]
    for name in new:
        db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    return bool(new)


def _m008_states(db: sqlite3.Connection) -> None:
    from . import states  # which has a use for the tables in RAM, too

    for statement in states.TABLES:
        db.execute(statement)


def _m009_tiers(db: sqlite3.Connection) -> None:
    # What is cold: its text is in the archive, and the codec of its row in `entries` says so.
    _add(db, "features", cold="INTEGER NOT NULL DEFAULT 0")
    # A block holds so many entries, in so many bytes before it is compressed. Where fewer of them stand in `archived`, some
    # have left it, and it is to be written anew.
    db.execute(
        "CREATE TABLE IF NOT EXISTS blocks (id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, name TEXT NOT NULL UNIQUE, label TEXT, "
        "entries INTEGER NOT NULL, size INTEGER NOT NULL)"
    )
    db.execute("CREATE INDEX IF NOT EXISTS blocks_by_owner ON blocks (owner)")
    db.execute(
        "CREATE TABLE IF NOT EXISTS archived (no INTEGER PRIMARY KEY, block INTEGER NOT NULL, archived_at INTEGER NOT NULL)"
    )
    _add(db, "archived", said="INTEGER")
    db.execute("CREATE INDEX IF NOT EXISTS archived_by_block ON archived (block)")
    # Knowledge by a hash of its text: what is remembered again is looked up before it is written.
    db.execute("CREATE INDEX IF NOT EXISTS archived_known ON archived (said) WHERE said IS NOT NULL")
    # How often an entry was used, earlier uses counting less, as of its last use.
    db.execute(
        "CREATE TABLE IF NOT EXISTS uses (no INTEGER PRIMARY KEY, count REAL NOT NULL, used_at INTEGER NOT NULL)"
    )
    # What retention has deleted, to be brought back for some days: its rows in `entries`, `features` and `versions`.
    db.execute(
        "CREATE TABLE IF NOT EXISTS trash (no INTEGER PRIMARY KEY, key BLOB NOT NULL, session INTEGER NOT NULL, run TEXT NOT NULL, "
        "deleted_at INTEGER NOT NULL, entry BLOB NOT NULL)"
    )
    db.execute("CREATE INDEX IF NOT EXISTS trash_by_key ON trash (key)")
    db.execute("CREATE INDEX IF NOT EXISTS trash_by_session ON trash (session)")


def _m010_versions(db: sqlite3.Connection) -> None:
    # Since when and until when it holds, where that was said; and what it stands for, and what stands for it: ids.
    since_until = {"valid_from": "INTEGER", "valid_to": "INTEGER"}
    _add(db, "entries", **since_until, supersedes="TEXT", superseded_by="TEXT")
    _add(db, "features", **since_until)
    # Knowledge by how it begins: what is remembered again is looked up before it is written.
    db.execute("CREATE INDEX IF NOT EXISTS entries_known ON entries (session, substr(content, 1, 64)) WHERE type = 2")
    db.execute(
        "CREATE INDEX IF NOT EXISTS entries_superseded ON entries (session, superseded_by) WHERE superseded_by IS NOT NULL"
    )
    # What an entry was before it was changed, but for what never changes of it.
    db.execute(
        "CREATE TABLE IF NOT EXISTS versions (no INTEGER NOT NULL, version INTEGER NOT NULL, role TEXT, name TEXT, content TEXT NOT NULL, "
        "body TEXT, payload TEXT, metadata TEXT, codec INTEGER NOT NULL, tags TEXT, category TEXT, source TEXT, "
        "importance REAL NOT NULL, provenance TEXT NOT NULL, trust REAL NOT NULL, sources TEXT, created_at INTEGER NOT NULL, "
        "updated_at INTEGER NOT NULL, expires_at INTEGER, tokens INTEGER NOT NULL, counter TEXT NOT NULL, "
        "valid_from INTEGER, valid_to INTEGER, supersedes TEXT, superseded_by TEXT, PRIMARY KEY (no, version))"
    )
    # Segments whose turns were looked through for knowledge: how much was found, NULL while that has only failed.
    db.execute(
        "CREATE TABLE IF NOT EXISTS extractions "
        "(no INTEGER PRIMARY KEY, found INTEGER, attempts INTEGER NOT NULL DEFAULT 0)"
    )
    # The turns (source) that knowledge (no) was found in.
    db.execute(
        "CREATE TABLE IF NOT EXISTS derivations "
        "(source INTEGER NOT NULL, no INTEGER NOT NULL, PRIMARY KEY (source, no)) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX IF NOT EXISTS derivations_by_no ON derivations (no)")
    # However an entry is deleted, what is known of it goes with it.
    db.execute(
        "CREATE TRIGGER IF NOT EXISTS entries_gone AFTER DELETE ON entries BEGIN "
        "DELETE FROM versions WHERE no = OLD.no; DELETE FROM extractions WHERE no = OLD.no; "
        "DELETE FROM derivations WHERE no = OLD.no; END"
    )


def _m011_transfer(db: sqlite3.Connection) -> None:
    # Whether somebody asked for it to be deleted, so that no older copy may bring it back. Otherwise it went by itself: it
    # was made from something that changed, was over, had expired or was replaced.
    if _add(db, "tombstones", asked="INTEGER NOT NULL DEFAULT 0"):
        db.execute("UPDATE tombstones SET asked = 1")  # of those from before nobody knows


def _m012_in_any_order(db: sqlite3.Connection) -> None:
    # They came in other orders, too, before there was a release; each does only what is left to do.
    for step in (_m008_states, _m009_tiers, _m010_versions, _m011_transfer):
        step(db)


def _m013_heads(db: sqlite3.Connection) -> None:
    # The last change of an owner whose row in `changes` was pruned: its id and origin. What is cached of the owner was made
    # from this state, unless `changes` has a newer one.
    _add(db, "owners", head="TEXT")
    db.execute("DROP TRIGGER IF EXISTS changes_kept")
    db.execute(
        "CREATE TRIGGER changes_kept AFTER INSERT ON changes WHEN NEW.id % 1000 = 0 BEGIN "
        "UPDATE owners SET head = gone.id || '.' || gone.origin FROM (SELECT no >> 32 AS owner, max(id) AS id, origin "
        "FROM changes WHERE id <= NEW.id - 10000 GROUP BY no >> 32) AS gone WHERE gone.owner = owners.id; "
        "DELETE FROM changes WHERE id <= NEW.id - 10000; END"
    )


def _m014_reindex(db: sqlite3.Connection) -> None:
    """Nothing: older versions must not open a folder that may hold vectors of two models, which `vectors` tells of."""


def _m015_analysis(db: sqlite3.Connection) -> None:
    # Of whose texts nothing is told yet.
    db.execute("CREATE INDEX IF NOT EXISTS features_unanalysed ON features (no) WHERE words < 0")


def _m016_forgotten_questions(db: sqlite3.Connection) -> None:
    # How often an owner's questions were forgotten: one that was asked before is not to be kept after that.
    _add(db, "owners", forgotten="INTEGER NOT NULL DEFAULT 0")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _m001_tables,
    _m002_working_memory,
    _m003_values,
    _m004_traits,
    _m005_questions,
    _m006_age_of_marks,
    _m007_changes,
    _m008_states,
    _m009_tiers,
    _m010_versions,
    _m011_transfer,
    _m012_in_any_order,
    _m013_heads,
    _m014_reindex,
    _m015_analysis,
    _m016_forgotten_questions,
)


def migrate(db: sqlite3.Connection) -> None:
    """Bring *db* to the newest schema, one transaction a step."""
    for number, step in enumerate(MIGRATIONS[version(db) :], start=version(db) + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            if version(db) < number:  # another process may have been faster
                step(db)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


def version(db: sqlite3.Connection) -> int:
    """The number of migrations that *db* has had."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])
