"""Every error this package raises for a user, in one tree.

    SglError                    what happened, why, and the next step
    ├── SetupError              the command cannot start: exit code 3
    │   ├── ConfigError         wrong option, file or environment value: exit code 2
    │   ├── ModelNotFoundError  no such folder or hub repository: exit code 4
    │   └── PortInUseError      exit code 98
    ├── RequestError            the request is wrong: HTTP 400
    ├── NotFoundError           no such object: HTTP 404
    ├── ConflictError           the object is in the wrong state: HTTP 409
    ├── BusyError               the queue is full: HTTP 429
    ├── UnavailableError        no worker can serve now: HTTP 503
    └── EngineError             the work failed: HTTP 500
        ├── CancelledError      somebody cancelled the job
        ├── WorkerLostError     the worker died under the job
        └── OutOfMemoryError    the device had too little memory

Invariants of our own use `assert`. A foreign exception never reaches a client: `to_wire` turns it
into a plain EngineError that says where to look.
"""

from __future__ import annotations

from typing import Any


class SglError(Exception):
    """A failure with a text meant for a person.

    `message` says what happened and why, `hint` says what to do next, `code` is the stable machine
    word and `param` the dotted path of the argument to blame.
    """

    code = "error"
    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class SetupError(SglError):
    code = "setup_error"
    exit_code = 3


class ConfigError(SetupError):
    code = "config_error"
    exit_code = 2


class ModelNotFoundError(SetupError):
    code = "model_not_found"
    exit_code = 4


class PortInUseError(SetupError):
    code = "port_in_use"
    exit_code = 98


class RequestError(SglError):
    code = "invalid_value"
    exit_code = 2


class NotFoundError(SglError):
    code = "not_found"


class ConflictError(SglError):
    code = "conflict"


class BusyError(SglError):
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after = retry_after


class UnavailableError(SglError):
    code = "not_ready"
    exit_code = 3


class EngineError(SglError):
    code = "engine_error"


class CancelledError(EngineError):
    code = "cancelled"


class WorkerLostError(EngineError):
    code = "worker_lost"


class OutOfMemoryError(EngineError):
    code = "out_of_memory"
    exit_code = 5


def _tree(root: type[SglError]) -> dict[str, type[SglError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def to_wire(error: BaseException) -> dict[str, Any]:
    """The fields of an error that may cross a socket."""
    if isinstance(error, MemoryError):
        error = OutOfMemoryError(
            "The worker had too little memory.", hint="Ask for less, or give it more."
        )
    if isinstance(error, ImportError):
        error = EngineError(
            f"The worker cannot load {error.name or 'a library'}.",
            hint="`sglang doctor` says how to mend it.",
        )
    if not isinstance(error, SglError):
        error = EngineError(
            f"The worker met an internal error ({type(error).__name__}).",
            hint="The worker's log holds the traceback.",
        )
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "code": error.code,
        "param": error.param,
    }


def from_wire(fields: dict[str, Any]) -> SglError:
    """The error that `to_wire` described."""
    kind = _tree(SglError).get(str(fields.get("type")), EngineError)
    return kind(
        str(fields.get("message", "")),
        hint=str(fields.get("hint", "")),
        code=fields.get("code"),
        param=fields.get("param"),
    )
