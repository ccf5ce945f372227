"""The first stage: files to what the towers read, messages to tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sgl_diffusion.ar.prompt import Reader
from sgl_diffusion.ar.senses import Senses
from sgl_diffusion.ar.stages.part import ENCODERS, THINKER, WARM_UP, Part
from sgl_diffusion.ar.thinker import places_of, thinker_config
from sgl_diffusion.base.chat import ChatMessage, ChatParams
from sgl_diffusion.base.chat import Part as MessagePart
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.orchestrator.messages import Payload


@dataclass(eq=False)
class _Asked:
    id: str
    params: ChatParams
    parts: deque[MessagePart] = field(default_factory=deque)
    media: bool = False


class Preprocess(Part):
    def load(self) -> Payload:
        self._asked: deque[_Asked] = deque()
        places = places_of(thinker_config(self.setting.folder))
        self._reader = Reader.load(self.setting.folder, places)
        self._senses = Senses.load(self.setting.folder)
        return {"inputs": ["text", *places]}

    def warm_up(self) -> None:
        message = ChatMessage(role="user", parts=(MessagePart(text="Hello"),))
        self._asked.append(_Asked(WARM_UP, ChatParams(messages=(message,))))
        self.step()

    def submit(self, job_id: str, payload: Payload) -> None:
        try:
            params = msgspec.convert(payload["params"], ChatParams)
            params.check()
        except (KeyError, msgspec.ValidationError):
            error = RequestError("The job's parameters do not fit this version of the engine.")
            self.outbox.failed(job_id, error)
            return
        except RequestError as error:
            self.outbox.failed(job_id, error)
            return
        found = [p for message in params.messages for p in message.parts if p.kind != "text"]
        self._asked.append(_Asked(job_id, params, deque(found), bool(found)))

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        raise AssertionError("nothing comes before the first stage")

    def cancel(self, job_id: str) -> None:
        self._asked = deque(asked for asked in self._asked if asked.id != job_id)

    def step(self) -> bool:
        """One medium, or if there is none left, the messages."""
        if not self._asked:
            return False
        asked = self._asked[0]
        try:
            if asked.parts:
                self._sense(asked)
            else:
                self._asked.popleft()
                self._read(asked)
        except Exception as error:
            self.fail(asked.id, error)
        return True

    def running(self) -> int:
        return len(self._asked)

    # -- inside -----------------------------------------------------------------------------------

    def _sense(self, asked: _Asked) -> None:
        sensed = self._senses.sense(asked.parts[0])
        asked.parts.popleft()
        self.outbox.hand_on(asked.id, ENCODERS, {"medium": sensed.told()}, [sensed.features])

    def _read(self, asked: _Asked) -> None:
        params = asked.params
        script = None if params.script is None else self._reader.words(params.script)
        question = {
            "params": msgspec.to_builtins(params),
            "tokens": self._reader.tokens(params.messages),
            "script": script,
        }
        self.outbox.hand_on(asked.id, ENCODERS if asked.media else THINKER, question, [])
        self.outbox.output(asked.id, {}, [])
