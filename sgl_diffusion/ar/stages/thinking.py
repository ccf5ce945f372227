"""The third stage: the question read, its answers written word by word, and told to the talker.

A step takes in one question, and then advances the batch by one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import Tensor

from sgl_diffusion.ar.batch import Batch
from sgl_diffusion.ar.prefix import PrefixStore, block_keys
from sgl_diffusion.ar.prompt import Prompt, Reader, expand
from sgl_diffusion.ar.row import ChatJob, Row
from sgl_diffusion.ar.sampling import Draw, Drawn
from sgl_diffusion.ar.senses import Medium, medium_of
from sgl_diffusion.ar.stages.part import TALKER, WARM_UP, Part, tensors
from sgl_diffusion.ar.tellers import Teller, make_teller
from sgl_diffusion.ar.thinker import Thinker, family_of, load_thinker, places_of
from sgl_diffusion.ar.towers import Felt
from sgl_diffusion.ar.writing import Writing, bytes_of
from sgl_diffusion.base.chat import ChatMessage, ChatParams, Speech, TextSampling
from sgl_diffusion.base.chat import Part as MessagePart
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.orchestrator.messages import Metric, Payload


@dataclass
class _Coming:
    """A job whose question has not come yet."""

    media: list[Medium] = field(default_factory=list)
    felt: list[Felt] = field(default_factory=list)


class Thinking(Part):
    def load(self) -> Payload:
        setting = self.setting
        limits = setting.limits
        self.outbox.loading("loading the thinker")
        self.model = load_thinker(setting.folder, dtype=setting.dtype, device=setting.device)
        self._coming: dict[str, _Coming] = {}
        self._jobs: dict[str, ChatJob] = {}
        self._arriving: deque[tuple[ChatJob, Payload]] = deque()
        self._places = places_of(self.model.config)
        self._reader = Reader.load(setting.folder, self._places)
        self._tokenizer = self._reader.tokenizer
        self._teller: Teller | None = None
        if limits.speech:
            self._teller = make_teller(setting.folder, self.model)
        tap = None if self._teller is None else self._teller.tap
        self.thinker = Thinker(self.model, limits.rows, tap, setting.record)
        self._prefixes = PrefixStore(limits.prefix_bytes)
        self.batch = Batch(
            self.thinker,
            self._prefixes,
            limits.rows,
            self._ends(),
            self._token,
            lambda row, error: self.fail(row.job.id, error),
        )
        self._length = min(limits.length, self.thinker.max_length)
        self._name = setting.name or family_of(setting.folder).name
        return {"name": self._name, "context_length": self._length}

    def warm_up(self) -> None:
        sampling = TextSampling(temperature=0.0, max_tokens=2)
        messages = (ChatMessage(role="user", parts=(MessagePart(text="Hello"),)),)
        speech = None if self._teller is None else Speech(voice=self._teller.voices[0])
        params = ChatParams(messages=messages, sampling=sampling, speech=speech)
        tokens = self._reader.tokens(messages)
        question = {"params": msgspec.to_builtins(params), "tokens": tokens, "script": None}
        self.feed(WARM_UP, question, [])
        while self.step():
            pass
        self.batch.steps.clear()

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        coming = self._coming.setdefault(job_id, _Coming())
        if "medium" in meta:
            medium = medium_of(meta["medium"])
            vectors, *deep = tensors(arrays, self.setting.device)
            dtype = self.setting.dtype
            coming.media.append(medium)
            coming.felt.append(Felt(medium.kind, vectors.to(dtype), [d.to(dtype) for d in deep]))
            return
        del self._coming[job_id]
        params = msgspec.convert(meta["params"], ChatParams)
        job = self._jobs[job_id] = ChatJob(job_id, params, coming.media, coming.felt)
        self._arriving.append((job, meta))

    def cancel(self, job_id: str) -> None:
        self._coming.pop(job_id, None)
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._arriving = deque(item for item in self._arriving if item[0] is not job)
            self.batch.drop(job.rows)

    def step(self) -> bool:
        arrived = bool(self._arriving)
        if self._arriving:
            job, meta = self._arriving.popleft()
            try:
                self._make_rows(job, meta)
            except Exception as error:
                self.fail(job.id, error)
        return self.batch.step() or arrived

    def running(self) -> int:
        return len(self._jobs) + len(self._coming)

    def metrics(self) -> list[Metric]:
        steps = [
            Metric(name="decode_steps_total", value=count, labels={"rows": str(rows)})
            for rows, count in sorted(self.batch.steps.items())
        ]
        return [
            *steps,
            Metric(name="prefix_reused_tokens_total", value=self._prefixes.reused_tokens),
            Metric(name="prefix_bytes", value=self._prefixes.bytes, kind="gauge"),
        ]

    # -- inside -----------------------------------------------------------------------------------

    def _make_rows(self, job: ChatJob, meta: Payload) -> None:
        counts = [len(felt.vectors) for felt in job.felt]
        params, teller = job.params, self._teller
        script: Sequence[int] = meta["script"] or ()
        job.prompt = expand(meta["tokens"], self._places, job.media, counts)
        prompt = job.prompt
        sampling = params.sampling
        room = self._length - len(prompt.tokens) - len(script)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(prompt.tokens)} tokens; {self._name} takes "
                f"{self._length}, the answer among them.",
                hint="Send less, or smaller media.",
                code="context_length_exceeded",
                param="messages",
            )
        spoken = params.speech is not None and teller is not None
        read = bool(script) and teller is not None and teller.reads
        if read:
            prompt = Prompt([*prompt.tokens, *script], prompt.media, prompt.marks)
        passage = self.thinker.passage(prompt, job.felt)
        keys = block_keys(prompt.tokens, prompt.marks)
        if spoken and teller is not None and (teller.tap.everything or job.media):
            # What is taken over from earlier prompts has no states for the talker.
            passage.states, keys = {}, []
        for index in range(params.n):
            row = Row(
                job,
                index,
                passage,
                keys,
                Draw(sampling, sampling.seed + index),
                Writing(self._tokenizer, sampling.stop),
                min(room, sampling.max_tokens or room),
                script=tuple(script) if read else (),
                spoken=spoken,
            )
            job.rows.append(row)
        self.outbox.progress(job.id, 0, job.rows[0].most, "read")
        if script and not read:
            for row in job.rows:
                self._token(row, row.recite(script))
        else:
            self.batch.add(job.rows)

    def _token(self, row: Row, text: str) -> None:
        job = row.job
        ended = row.finish_reason is not None
        if job.params.stream and (text or ended):
            part = {"index": row.index, "text": text, "finish_reason": row.finish_reason}
            part["logprobs"] = self._logprobs(row, row.told)
            row.told = len(row.drawn)
            self.outbox.output(job.id, part, [], final=False)
        if row.spoken:
            self._say(row)
        if ended and job.id in self._jobs and job.done():
            del self._jobs[job.id]
            choices = [each.answer(self._logprobs(each)) for each in job.rows]
            self.outbox.output(job.id, {"choices": choices, "usage": job.usage()}, [])

    def _say(self, row: Row) -> None:
        """Hand on what can be said now, and with the first of it how it is said."""
        assert self._teller is not None
        job, ended = row.job, row.finish_reason is not None
        row.unspoken += row.words()
        vectors: list[Tensor] = self._teller.words(row)
        told: Payload = {
            "row": row.index,
            "rows": job.params.n,
            "stream": job.params.stream,
            "characters": len(row.writing.text),
            "ended": ended,
        }
        arrays: list[Tensor] = []
        if vectors and not row.speaking:
            row.speaking = True
            opening, arrays = self._teller.opening(row, vectors.pop(0))
            seed = job.params.sampling.seed + row.index
            manner = msgspec.to_builtins(job.params.speech)
            told["opening"] = {**opening, "manner": manner, "seed": seed}
            told["arrays"] = len(arrays)
        if ended and row.speaking:
            vectors.append(self._teller.last_word())
        if vectors or arrays or ended:
            self.outbox.hand_on(job.id, TALKER, told, [*arrays, *vectors])

    def _logprobs(self, row: Row, start: int = 0) -> list[dict[str, Any]] | None:
        if not row.job.params.sampling.logprobs:
            return None
        return [self._logprob(drawn) for drawn in row.drawn[start:]]

    def _logprob(self, drawn: Drawn) -> dict[str, Any]:
        top = [self._scored(token, score) for token, score in drawn.top]
        return {**self._scored(drawn.token, drawn.logprob), "top": top}

    def _scored(self, token: int, score: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": score, "data": bytes_of(self._tokenizer, token)}

    def _ends(self) -> frozenset[int]:
        """The tokens that end an answer: what the checkpoint says, and the end of a message."""
        told = self.model.generation_config.eos_token_id
        ends = set(told if isinstance(told, list) else [told]) - {None}
        tokenizer = self._tokenizer
        ends |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} - {None}
        return frozenset(ends)
