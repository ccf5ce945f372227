"""The job table of several servers: a PostgreSQL database, and which of them are alive.

A server is a *node* with a name. While it lives its session holds a lock by that name, so another
node that gets the lock knows that it is gone, without any clock. So the database has to be reached
directly: a pooler that lends sessions would lend the locks with them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import SetupError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.sqldb import Found, Values

if TYPE_CHECKING:
    from psycopg import Connection

log = get_logger(__name__)

# Entry i takes the schema from version i to i + 1; entries are never edited, only added.
_MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT COLLATE "C" PRIMARY KEY,
        kind TEXT NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
        payload TEXT NOT NULL,
        progress INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        interruptions INTEGER NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        completed_at DOUBLE PRECISION,
        expires_at DOUBLE PRECISION,
        error TEXT,
        files TEXT NOT NULL,
        model TEXT NOT NULL,
        adapters TEXT NOT NULL,
        seeds TEXT NOT NULL,
        owner TEXT NOT NULL,
        idempotency_key TEXT,
        body_hash TEXT NOT NULL
    );
    CREATE INDEX jobs_by_age ON jobs (kind, created_at, id);
    CREATE INDEX jobs_by_request ON jobs (kind, owner, body_hash, created_at);
    CREATE INDEX jobs_by_key ON jobs (kind, owner, idempotency_key);
    CREATE INDEX jobs_by_expiry ON jobs (expires_at);
    CREATE INDEX jobs_that_wait ON jobs (created_at, id) WHERE status = 'queued';
    CREATE TABLE events (
        number BIGSERIAL PRIMARY KEY,
        job_id TEXT NOT NULL,
        at DOUBLE PRECISION NOT NULL,
        kind TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        detail TEXT NOT NULL
    );
    CREATE INDEX events_by_job ON events (job_id, number);
    CREATE INDEX events_of_the_gone ON events (at) WHERE kind IN ('deleted', 'expired');
    CREATE FUNCTION events_are_final() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'events are never changed' USING ERRCODE = '23000'; END $$;
    CREATE TRIGGER events_are_final BEFORE UPDATE ON events
        FOR EACH ROW EXECUTE FUNCTION events_are_final();
    CREATE TABLE expired (id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL,
                          at DOUBLE PRECISION NOT NULL);
    CREATE INDEX expired_by_age ON expired (at);
    CREATE TABLE nodes (name TEXT PRIMARY KEY);
    CREATE TABLE claims (
        job_id TEXT PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
        node TEXT NOT NULL REFERENCES nodes,
        bound BOOLEAN NOT NULL,
        bytes BIGINT NOT NULL
    );
    CREATE INDEX claims_by_node ON claims (node) INCLUDE (bytes);
    """,
)
_WRITERS = 0x5347_4C44  # the lock of a transaction that writes
_LOCK_SECONDS = 5.0  # for the session of an earlier process of this name to be noticed as gone
_NAMED = re.compile(r"(?<!:):([a-z_]+)")
_OPTIONS = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"


class PostgresDatabase:
    """One session of one node. A session that broke is made anew with the next transaction; what
    other nodes took over meanwhile stays theirs."""

    def __init__(self, url: str, node: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise SetupError(
                "A job table in PostgreSQL needs psycopg, which is not installed.",
                hint="pip install 'sgl-diffusion[postgres]'",
            ) from None
        self.refusals: tuple[type[Exception], ...] = (psycopg.IntegrityError,)
        self.failures: tuple[type[Exception], ...] = (psycopg.Error,)
        self.node = node
        self._url = url
        self._inside = False  # a transaction, which must not go on in another session
        self._connection: Connection[Any]
        try:
            self._connect()
            try:
                with self.transaction():
                    self._migrate()
                    self.execute("INSERT INTO nodes VALUES (?) ON CONFLICT DO NOTHING", (node,))
            except BaseException:
                self.close()
                raise
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise SetupError(
                f"The job database cannot be used: {reason}.",
                hint="Check --database-url, and that the server of the database runs.",
            ) from error

    def execute(self, sql: str, values: Values = ()) -> Found:
        if not self._inside:
            self._reconnect()
        found: Found = self._connection.execute(_translated(sql), values or None)
        return found

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._reconnect()
        with self._connection.transaction():
            self._inside = True
            try:
                self.execute("SELECT pg_advisory_xact_lock(?)", (_WRITERS,))
                yield
            finally:
                self._inside = False

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def gone(self, node: str) -> Iterator[bool]:
        """Whether a node is not alive; while this is open it cannot come back to life."""
        taken = self._lock(node)
        try:
            yield taken
        finally:
            if taken:
                self.execute(f"SELECT pg_advisory_unlock({_KEY})", (node,))

    def _lock(self, node: str) -> bool:
        found = self.execute(f"SELECT pg_try_advisory_lock({_KEY})", (node,)).fetchone()
        return bool(found[0])

    def _reconnect(self) -> None:
        if not self._connection.closed:
            return
        log.warning("the session of node %s broke, and is made anew", self.node)
        try:
            self._connect()
        except SetupError as error:  # the database has not noticed the end of the old one yet
            raise UnavailableError(error.message, hint=error.hint) from None

    def _connect(self) -> None:
        """Begin a session that holds the lock of this node."""
        import psycopg

        self._connection = psycopg.connect(
            self._url, autocommit=True, connect_timeout=5, options=_OPTIONS
        )
        end = time.monotonic() + _LOCK_SECONDS
        while not self._lock(self.node):
            if time.monotonic() > end:
                self._connection.close()
                raise SetupError(
                    f"Another server is running as node {self.node!r}.",
                    hint="Give each server a name of its own with --node-name.",
                )
            time.sleep(0.1)

    def _migrate(self) -> None:
        self.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        found = self.execute("SELECT version FROM schema_version").fetchone()
        version = 0 if found is None else int(found[0])
        if version > len(_MIGRATIONS):
            raise SetupError(
                "The job database was written by a newer version of this package.",
                hint="Upgrade this server, too.",
            )
        for script in _MIGRATIONS[version:]:
            self._connection.execute(script)
        if version < len(_MIGRATIONS):
            self.execute("DELETE FROM schema_version")
            self.execute("INSERT INTO schema_version VALUES (?)", (len(_MIGRATIONS),))


_KEY = "hashtextextended('sgl_diffusion ' || ?::text, 0)"


def _translated(sql: str) -> str:
    """Placeholders as psycopg writes them."""
    return _NAMED.sub(r"%(\1)s", sql).replace("?", "%s")
