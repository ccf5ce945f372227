"""What the job table asks of a database: statements in SQLite's words, and transactions of which
there is one at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

Values = Mapping[str, Any] | Sequence[Any]


class Found(Protocol):
    """The rows of a statement."""

    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Database(Protocol):
    """`transaction` keeps other writers out until it ends, and undoes what fails. `refusals` are
    its errors about what was asked, `failures` all others."""

    refusals: tuple[type[Exception], ...]
    failures: tuple[type[Exception], ...]

    def execute(self, sql: str, values: Values = ()) -> Found: ...
    def transaction(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...


class SqliteDatabase:
    """One connection to a file, without transactions of its own making."""

    refusals: tuple[type[Exception], ...] = (sqlite3.IntegrityError,)
    failures: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def execute(self, sql: str, values: Values = ()) -> Found:
        return self.connection.execute(sql, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield

    def close(self) -> None:
        self.connection.close()
