"""The worker of a chat stage: what the stage process drives.

A step takes in one medium or one prompt of one job, and then advances the batch by one token.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from sgl_diffusion.ar.batch import Batch
from sgl_diffusion.ar.prefix import PrefixStore, block_keys
from sgl_diffusion.ar.prompt import Reader
from sgl_diffusion.ar.row import ChatJob, Row
from sgl_diffusion.ar.sampling import Draw, Drawn
from sgl_diffusion.ar.senses import Senses
from sgl_diffusion.ar.speaking import Qwen3Speaker
from sgl_diffusion.ar.thinker import Thinker, family_of, load_thinker, places_of
from sgl_diffusion.ar.towers import Towers
from sgl_diffusion.ar.writing import Writing
from sgl_diffusion.base.chat import ChatCard, ChatMessage, ChatParams, Part, Speech, TextSampling
from sgl_diffusion.base.errors import EngineError, RequestError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox

log = get_logger(__name__)

_WARM_UP = "warm-up"


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """`length` is in tokens, prompt and answer; `prefix_bytes` and `media_bytes` are for what is
    kept of earlier requests. Without `speech` the talker is not loaded."""

    rows: int
    length: int
    prefix_bytes: int
    media_bytes: int
    speech: bool = True


class ChatWorker:
    """Implements `orchestrator.stage.Worker`."""

    def __init__(
        self,
        folder: Path,
        name: str | None,
        limits: ChatLimits,
        outbox: Outbox,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Without a `name` the model has that of its family."""
        self._folder = folder
        self._name = name or ""
        self._limits = limits
        self._outbox = outbox
        self._device = device
        self._dtype = dtype
        self._jobs: dict[str, ChatJob] = {}
        self._arriving: deque[ChatJob] = deque()
        self._warm_up_error: SglError | None = None

    def load(self) -> Payload:
        self._name = self._name or family_of(self._folder).name
        self._outbox.loading("loading the thinker")
        model = load_thinker(self._folder, dtype=self._dtype, device=self._device)
        self._speaker = self._load_speaker(model)
        self._reader = Reader.load(self._folder, places_of(model))
        self._senses = Senses.load(self._folder)
        self._towers = Towers(model, self._limits.media_bytes)
        tap = 0 if self._speaker is None else self._speaker.tap
        self._thinker = Thinker(model, self._limits.rows, tap)
        self._prefixes = PrefixStore(self._limits.prefix_bytes)
        self._batch = Batch(
            self._thinker, self._prefixes, self._limits.rows, self._ends(model), self._token
        )
        self._length = min(self._limits.length, self._thinker.max_length)
        self._warm_up()
        speaker = self._speaker
        card = ChatCard(
            name=self._name,
            context_length=self._length,
            inputs=("text", *places_of(model)),
            voices=() if speaker is None else speaker.voices,
            sample_rate=0 if speaker is None else speaker.sample_rate,
        )
        return dataclasses.asdict(card)

    def submit(self, job_id: str, payload: Payload) -> None:
        try:
            params = msgspec.convert(payload["params"], ChatParams)
            params.check()
        except (KeyError, msgspec.ValidationError):
            error = RequestError("The job's parameters do not fit this version of the engine.")
            self._outbox.failed(job_id, error)
            return
        except RequestError as error:
            self._outbox.failed(job_id, error)
            return
        self._accept(ChatJob(job_id, params))

    def cancel(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            if job in self._arriving:
                self._arriving.remove(job)
            self._batch.drop(job.rows)
            if self._speaker is not None:
                for row in job.rows:
                    self._speaker.drop(row)

    def control(self, action: str, payload: Payload) -> Payload:
        raise RequestError(f"This worker has no control action {action!r}.", code="not_supported")

    def step(self) -> bool:
        arriving = bool(self._arriving)
        if arriving:
            self._take_in(self._arriving[0])
        wrote = self._batch.step()
        spoke = self._speaker is not None and self._speaker.step()
        return arriving or wrote or spoke

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        steps = [
            Metric(name="decode_steps_total", value=count, labels={"rows": str(rows)})
            for rows, count in sorted(self._batch.steps.items())
        ]
        return [
            *steps,
            *(self._speaker.metrics() if self._speaker is not None else ()),
            Metric(name="prefix_reused_tokens_total", value=self._prefixes.reused_tokens),
            Metric(name="prefix_bytes", value=self._prefixes.bytes, kind="gauge"),
            Metric(name="media_reused_total", value=self._towers.reused),
        ]

    # -- inside -----------------------------------------------------------------------------------

    def _load_speaker(self, thinker: Any) -> Qwen3Speaker | None:
        if not self._limits.speech or family_of(self._folder).name != "qwen3-omni":
            return None
        self._outbox.loading("loading the talker")
        return Qwen3Speaker.load(self._folder, thinker, self._limits.rows, self._dtype, self._heard)

    def _accept(self, job: ChatJob) -> None:
        for message in job.params.messages:
            job.parts += [part for part in message.parts if part.kind != "text"]
        self._jobs[job.id] = job
        self._arriving.append(job)

    def _take_in(self, job: ChatJob) -> None:
        """One medium, or if there is none left, the prompt."""
        try:
            if job.parts:
                job.media.append(self._senses.sense(job.parts[0]))
                job.felt.append(self._towers.feel(job.media[-1]))
                job.parts.popleft()
                return
            self._arriving.popleft()
            self._make_rows(job)
        except Exception as error:
            self._fail(job, error)

    def _make_rows(self, job: ChatJob) -> None:
        counts = [len(felt.vectors) for felt in job.felt]
        params, speaker = job.params, self._speaker
        script = [] if params.script is None else self._reader.words(params.script)
        job.prompt = self._reader.read(params.messages, job.media, counts)
        sampling = params.sampling
        room = self._length - len(job.prompt.tokens) - len(script)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(job.prompt.tokens)} tokens; {self._name} takes "
                f"{self._length}, the answer among them.",
                hint="Send less, or smaller media.",
                code="context_length_exceeded",
                param="messages",
            )
        passage = self._thinker.passage(job.prompt, job.felt)
        keys = block_keys(job.prompt.tokens, job.prompt.marks)
        if params.speech is not None and job.media:
            # What is taken over from earlier prompts has no states for the talker.
            passage.states, keys = {}, []
        for index in range(job.params.n):
            row = Row(
                job,
                index,
                passage,
                keys,
                Draw(sampling, sampling.seed + index),
                Writing(self._reader.tokenizer, sampling.stop),
                min(room, sampling.max_tokens or room),
                silent=params.speech is None or speaker is None,
            )
            job.rows.append(row)
        self._outbox.progress(job.id, 0, job.rows[0].most, "read")
        if script:
            for row in job.rows:
                self._token(row, row.recite(script))
        else:
            self._batch.add(job.rows)

    def _token(self, row: Row, text: str) -> None:
        job = row.job
        if job.params.stream and (text or row.finish_reason is not None):
            part = {"index": row.index, "text": text, "finish_reason": row.finish_reason}
            part["logprobs"] = self._logprobs(row, row.told)
            row.told = len(row.drawn)
            self._outbox.output(job.id, part, [], final=False)
        if not row.silent and self._speaker is not None:
            self._speaker.say(row)
        self._end_if_done(job)

    def _heard(self, row: Row, samples: Tensor, reason: str | None) -> None:
        job = row.job
        row.silent = reason is not None
        if not job.params.stream:
            row.sound.append(samples)
        elif len(samples) or row.silent:
            part = {"index": row.index, "finish_reason": reason}
            self._outbox.output(job.id, {"sound": part}, [samples], final=False)
        self._end_if_done(job)

    def _end_if_done(self, job: ChatJob) -> None:
        if job.id not in self._jobs or not job.done():
            return
        del self._jobs[job.id]
        if job.id != _WARM_UP:
            choices = [row.answer(self._logprobs(row)) for row in job.rows]
            sounds = [torch.cat(row.sound) for row in job.rows if row.sound]
            self._outbox.output(job.id, {"choices": choices, "usage": job.usage()}, sounds)

    def _logprobs(self, row: Row, start: int = 0) -> list[dict[str, Any]] | None:
        if not row.job.params.sampling.logprobs:
            return None
        return [self._logprob(drawn) for drawn in row.drawn[start:]]

    def _logprob(self, drawn: Drawn) -> dict[str, Any]:
        name = self._reader.tokenizer.decode
        return {
            "token": name([drawn.token]),
            "logprob": drawn.logprob,
            "top": [{"token": name([token]), "logprob": score} for token, score in drawn.top],
        }

    def _fail(self, job: ChatJob, error: Exception) -> None:
        """This job ends here; the others and the worker go on."""
        if not isinstance(error, SglError):
            log.error("job %s failed", job.id, exc_info=error)
            error = EngineError(
                f"The engine met an internal error ({type(error).__name__}).",
                hint="The worker's log holds the traceback.",
            )
        self.cancel(job.id)
        if job.id == _WARM_UP:
            self._warm_up_error = error
        else:
            self._outbox.failed(job.id, error)

    def _warm_up(self) -> None:
        """What cannot work here fails now, and not in every job."""
        self._outbox.loading("warming up")
        message = ChatMessage(role="user", parts=(Part(text="Hello"),))
        sampling = TextSampling(temperature=0.0, max_tokens=2)
        speech = None
        if self._speaker is not None:
            speech = Speech(voice=self._speaker.voices[0], max_frames=2)
        params = ChatParams(messages=(message,), sampling=sampling, speech=speech)
        self._accept(ChatJob(_WARM_UP, params))
        while self.step():
            pass
        self._batch.steps.clear()
        if self._speaker is not None:
            self._speaker.forget_steps()
        if self._warm_up_error is not None:
            raise self._warm_up_error

    def _ends(self, model: Any) -> frozenset[int]:
        """The tokens that end an answer: what the checkpoint says, and the end of a message."""
        told = model.generation_config.eos_token_id
        ends = set(told if isinstance(told, list) else [told]) - {None}
        tokenizer = self._reader.tokenizer
        ends |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} - {None}
        return frozenset(ends)
