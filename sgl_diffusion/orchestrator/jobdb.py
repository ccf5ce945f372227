"""The database file of the job table: opening, migrating, and putting a damaged one aside."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.log import get_logger

log = get_logger(__name__)

# Entry i takes the schema from version i to i + 1; entries are never edited, only added.
_MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
        payload TEXT NOT NULL,
        progress INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        interruptions INTEGER NOT NULL,
        created_at REAL NOT NULL,
        completed_at REAL,
        error TEXT,
        files TEXT NOT NULL
    );
    CREATE INDEX jobs_by_age ON jobs (kind, created_at, id);
    """,
    """
    ALTER TABLE jobs ADD COLUMN expires_at REAL;
    ALTER TABLE jobs ADD COLUMN model TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN adapters TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE jobs ADD COLUMN seeds TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN idempotency_key TEXT;
    ALTER TABLE jobs ADD COLUMN body_hash TEXT NOT NULL DEFAULT '';
    CREATE INDEX jobs_by_request ON jobs (kind, owner, body_hash, created_at);
    CREATE INDEX jobs_by_key ON jobs (kind, owner, idempotency_key);
    CREATE INDEX jobs_by_expiry ON jobs (expires_at);
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        job_id TEXT NOT NULL,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        detail TEXT NOT NULL
    );
    CREATE INDEX events_by_job ON events (job_id, number);
    CREATE TRIGGER events_are_final BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
    CREATE TABLE expired (id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL,
                          at REAL NOT NULL);
    """,
    # What is kept is looked at twice a minute: nothing there may read the whole table.
    """
    CREATE INDEX jobs_by_end ON jobs (completed_at, id) WHERE files != '[]';
    CREATE INDEX events_of_the_gone ON events (at) WHERE kind IN ('deleted', 'expired');
    CREATE INDEX expired_by_age ON expired (at);
    CREATE TABLE kept (bytes INTEGER NOT NULL);
    INSERT INTO kept SELECT COALESCE(SUM(json_extract(file.value, '$.bytes')), 0)
        FROM jobs, json_each(jobs.files) AS file;
    CREATE TRIGGER kept_more AFTER INSERT ON jobs WHEN NEW.files != '[]' BEGIN
        UPDATE kept SET bytes = bytes + (SELECT COALESCE(SUM(json_extract(value, '$.bytes')), 0)
            FROM json_each(NEW.files));
    END;
    CREATE TRIGGER kept_less AFTER DELETE ON jobs WHEN OLD.files != '[]' BEGIN
        UPDATE kept SET bytes = bytes - (SELECT COALESCE(SUM(json_extract(value, '$.bytes')), 0)
            FROM json_each(OLD.files));
    END;
    CREATE TRIGGER kept_other AFTER UPDATE OF files ON jobs BEGIN
        UPDATE kept SET bytes = bytes
            + (SELECT COALESCE(SUM(json_extract(value, '$.bytes')), 0) FROM json_each(NEW.files))
            - (SELECT COALESCE(SUM(json_extract(value, '$.bytes')), 0) FROM json_each(OLD.files));
    END;
    """,
)

# Write-ahead logging shares memory between connections, which these cannot.
NETWORK_FILE_SYSTEMS = frozenset(
    "9p afs ceph cifs fuse.glusterfs fuse.sshfs gfs2 lustre ncpfs nfs nfs4 ocfs2 smb3 smbfs".split()
)


def open_database(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A migrated connection, and whether its file is new: there was none, or a damaged one."""
    fresh = not path.exists()
    if not fresh and not _sound(path):
        _move_aside(path)
        fresh = True
    # Its companions (-wal, -shm, -journal) inherit the mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    # No implicit transactions: every write says BEGIN IMMEDIATE itself.
    db = sqlite3.connect(path, isolation_level=None)
    try:
        for pragma in (
            "busy_timeout = 5000",
            f"journal_mode = {_journal_mode(path)}",
            "synchronous = FULL",
            "foreign_keys = ON",
            "mmap_size = 0",
        ):
            db.execute(f"PRAGMA {pragma}")
        _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db, fresh


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise SetupError(
            f"{path} was written by a newer version of this package.",
            hint="Upgrade, or use another --data-dir.",
        )
    for number, script in enumerate(_MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")


def _journal_mode(path: Path) -> str:
    kind = filesystem_of(path)
    if kind not in NETWORK_FILE_SYSTEMS:
        return "WAL"
    log.warning(
        "%s is on a network file system (%s): the slower rollback journal is used. "
        "A local --data-dir is faster and safer.",
        path.parent,
        kind,
    )
    return "DELETE"


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds `path`, "" where the kernel does not say."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""


def _sound(path: Path) -> bool:
    try:
        db = sqlite3.connect(path)
        try:
            return bool(db.execute("PRAGMA quick_check").fetchone() == ("ok",))
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        # Only real damage counts: a file we may not read is no reason to begin a new one.
        if not error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise
        return False


def _move_aside(path: Path) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", "-wal", "-shm", "-journal"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(path.with_name(f"{path.name}{suffix}.corrupt-{stamp}"))
    log.error("%s was damaged; it is kept as %s.corrupt-%s", path, path.name, stamp)
