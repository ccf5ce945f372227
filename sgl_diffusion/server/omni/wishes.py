"""From the fields of a chat request to how its answer is drawn and spoken."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from sgl_diffusion.base.chat import DEFAULT_VOICE, ChatCard, Speech, TextSampling
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.server.schemas.chat import ChatRequest
from sgl_diffusion.server.validate import whole

MODALITIES = ("text", "audio")
STREAMED_FORMAT = "pcm16"
_TOP_LEVEL = ("temperature", "top_p", "top_k", "seed")
_LENGTH = ("max_tokens", "max_new_tokens")
_THINKER = (*_TOP_LEVEL, "stop", *_LENGTH)
_TALKER = ("temperature", "top_p", "top_k", "repetition_penalty", *_LENGTH)
_TALKER_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


def new_seed() -> int:
    return secrets.randbits(31)


def sampling_of(wanted: ChatRequest) -> TextSampling:
    """How the text is drawn: `stage_sampling.thinker` wins over the fields beside it."""
    given = {name: getattr(wanted, name) for name in _TOP_LEVEL}
    given["max_tokens"] = wanted.max_completion_tokens or wanted.max_tokens
    given["stop"] = wanted.stop
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(wanted, name) == 0:
            raise RequestError(f"{name} must be at least 1.", code="out_of_range", param=name)
    stage = _stage(wanted.stage_sampling, "thinker", _THINKER)
    given |= _lengths(stage, "max_tokens")
    known = {name: value for name, value in given.items() if value is not None}
    if "stop" in known:
        known["stop"] = _stops(known["stop"])
    known["top_k"] = _cut(known.get("top_k"))
    known.setdefault("seed", new_seed())
    known = _numbers(known, "stage_sampling.thinker" if stage else "")
    return TextSampling(**known, logprobs=wanted.logprobs, top_logprobs=wanted.top_logprobs)


def speech_of(wanted: ChatRequest, card: ChatCard) -> Speech | None:
    """How the answer is spoken; None where only text is asked for."""
    modalities = wanted.modalities
    for index, name in enumerate(modalities):
        if name not in MODALITIES:
            raise RequestError(
                "This model does not answer in that modality.",
                hint=f"It answers in {', '.join(MODALITIES[: 2 if card.voices else 1])}.",
                code="unsupported_parameter",
                param=f"modalities.{index}",
            )
    if not modalities:
        raise RequestError("modalities is empty.", param="modalities")
    audio, params = wanted.audio or {}, _voice_of(wanted.stage_params)
    known = _manner_of(wanted)
    if "audio" not in modalities:
        if audio:
            raise RequestError(
                "audio is given, but not asked for.",
                hint='Send modalities ["text", "audio"] with it.',
                code="conflicting_parameters",
                param="audio",
            )
        return None
    _check_names(audio, ("voice", "format"), "audio")
    voice = voice_name(audio.get("voice"), "audio.voice") or params or DEFAULT_VOICE
    try:
        return Speech(voice=card.voice(voice), **known)
    except RequestError as error:
        if error.param == "voice":
            error.param = "audio.voice"
        raise


def _manner_of(wanted: ChatRequest) -> dict[str, Any]:
    """What is wished for of the talker, checked also where it does not speak."""
    given = {name: getattr(wanted, f"talker_{name}") for name in _TALKER_FIELDS}
    given |= _stage(wanted.stage_sampling, "talker", _TALKER)
    known = {name: v for name, v in _lengths(given, "max_frames").items() if v is not None}
    if "top_k" in known:
        known["top_k"] = _cut(known["top_k"])
    known = _numbers(known, "stage_sampling.talker")
    Speech(**known).check()
    return known


def sound_format(wanted: ChatRequest) -> str:
    """The name of the format that the sound of a chat comes in."""
    audio = wanted.audio or {}
    name = audio.get("format", STREAMED_FORMAT if wanted.stream else "wav")
    if not isinstance(name, str):
        raise RequestError("format must be a text.", code="invalid_type", param="audio.format")
    if wanted.stream and name not in (STREAMED_FORMAT, "pcm"):
        raise RequestError(
            "Streamed sound has the format pcm16.",
            hint="Leave format out, or do not stream.",
            code="conflicting_parameters",
            param="audio.format",
        )
    return "pcm" if name == STREAMED_FORMAT else name


def voice_name(given: Any, param: str) -> str | None:
    """A voice is a name, or an object with it as `id`."""
    name = given.get("id") if isinstance(given, dict) else given
    if name is not None and not isinstance(name, str):
        raise RequestError("A voice is a name.", code="invalid_type", param=param)
    return name


def _stage(given: Mapping[str, Any], stage: str, names: tuple[str, ...]) -> dict[str, Any]:
    _check_names(given, ("thinker", "talker"), "stage_sampling")
    values = _object(given, stage, names, "stage_sampling")
    return {name: value for name, value in values.items() if value is not None}


def _voice_of(given: Mapping[str, Any]) -> str | None:
    """`stage_params` knows one thing that is no sampling: the voice of the talker."""
    _check_names(given, ("thinker", "talker"), "stage_params")
    _object(given, "thinker", (), "stage_params")
    talker = _object(given, "talker", ("voice",), "stage_params")
    return voice_name(talker.get("voice"), "stage_params.talker.voice")


def _object(
    given: Mapping[str, Any], stage: str, names: tuple[str, ...], where: str
) -> dict[str, Any]:
    """What is said of a stage; null says nothing."""
    values = given.get(stage)
    if values is None:
        return {}
    path = f"{where}.{stage}"
    if not isinstance(values, dict):
        raise RequestError(f"{path} must be an object.", code="invalid_type", param=path)
    _check_names(values, names, path)
    return values


def _check_names(given: Iterable[str], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            shown = "".join(c for c in str(name)[:64] if c.isprintable())
            raise RequestError(
                f"{where} has no {shown!r}.",
                hint=suggest(shown, known) if known else "Leave it out.",
                code="unknown_parameter",
                param=f"{where}.{shown}",
            )


def _lengths(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Both spellings of the length under one name."""
    values = {key: value for key, value in given.items() if key not in _LENGTH}
    for key in _LENGTH:
        if given.get(key) is not None:
            values[name] = given[key]
    return values


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise RequestError("stop is a text or a list of them.", code="invalid_type", param="stop")
    return tuple(stops)


def _cut(top_k: Any) -> Any:
    return 0 if top_k in (None, -1) and not isinstance(top_k, bool) else top_k


_WHOLE = {"top_k", "seed", "max_tokens", "max_frames"}


def _numbers(known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same, with all that has to be a number as one, or a whole one."""
    found = dict(known)
    for name, value in known.items():
        if name == "stop":
            continue
        if name in _WHOLE:
            found[name] = value = whole(value)
        kinds = int if name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a whole number" if name in _WHOLE else "a number"
            path = f"{where}.{name}".lstrip(".")
            raise RequestError(f"{path} must be {wanted}.", code="invalid_type", param=path)
    return found


def changed(speech: Speech, **fields: Any) -> Speech:
    """With those of `fields` that are given."""
    known = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(speech, **known)
