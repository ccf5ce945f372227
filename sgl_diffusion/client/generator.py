"""`DiffGenerator`: generate from plain Python, without a server and without asyncio.

The engine runs in this process: the stage in one thread, the client's event loop in another. The
caller's thread only waits, so Ctrl-C cancels the job at its next step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import RequestError, UnavailableError
from sgl_diffusion.base.lora import MERGE_MODES, check_strength, check_target, line_up_settings
from sgl_diffusion.base.options import resolve
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.base.trace import joined
from sgl_diffusion.client.client import Client
from sgl_diffusion.client.pictures import as_paths, shaped
from sgl_diffusion.client.types import (
    Event,
    Generation,
    GenerationHandle,
    Limits,
    Partial,
    Snapshot,
    partial_of,
)
from sgl_diffusion.orchestrator.topology import App

T = TypeVar("T")

_WISHES = tuple(field.name for field in dataclasses.fields(SamplingParams))


class DiffGenerator:
    """A loaded model. Use it as a context manager, or call `shutdown` at the end."""

    def __init__(self, app: App) -> None:
        """Load the app's model; returns when it is ready, raises why it cannot be."""
        # A thread that loads a model cannot be stopped; nobody should wait long for that.
        # Many ranks are processes anyway, and end together with the first of them.
        limits = Limits(leave=3.0, term=0.1)
        self._client = Client(app, in_process=not app.processes, limits=limits)
        self._loop = _ClientThread(self._client)
        self._shutdown = weakref.finalize(self, self._loop.close)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._loop.run(self._client.start())
            self._loop.run(self._client.ready())
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def from_pretrained(cls, model_path: str | None = None, **options: Any) -> Self:
        """Load a folder or hub repository; without one, the small model that comes along.

        `options` are the fields of `EngineOptions`: `device`, `dit_precision`, and so on.
        """
        from sgl_diffusion.apps.diffusion import diffusion_app

        given = {"model_path": model_path, **options}
        chosen = resolve(EngineOptions, [("the arguments", given)]).value
        # Should the engine fail and start anew, it has the same adapters again.
        folder = tempfile.TemporaryDirectory(prefix="sgl-diffusion-")
        try:
            generator = cls(diffusion_app(chosen, lora_state=Path(folder.name) / "loras.json"))
        except BaseException:
            folder.cleanup()
            raise
        generator._folder = folder
        return generator

    @property
    def card(self) -> ModelCard:
        """The loaded model and what it can do."""
        card = self._client.card()
        assert card is not None, "a generator is made with its model ready"
        return card

    def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Snapshot], None] | None = None,
        on_partial: Callable[[Partial], None] | None = None,
        **wishes: Any,
    ) -> Generation:
        """Make pictures or clips and wait for them.

        `wishes` are the other fields of `SamplingParams`; `num_frames=1` asks a video model for
        pictures, and `images` (a path, or several) gives it pictures to work on. `on_progress` is
        called in this thread with every change of the job, `on_partial` with the `partial_images`.
        """
        params = self.resolve(prompt, **wishes)
        changes: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        handle = self._loop.run(self._client.submit(params))
        outcome = self._loop.spawn(_follow(handle, changes))
        try:
            while (event := changes.get()) is not None:
                if on_progress is not None:
                    on_progress(event.snapshot)
                partial = partial_of(event)
                if on_partial is not None and partial is not None:
                    on_partial(partial)
            return outcome.result()
        except BaseException:
            # Ctrl-C, or an error of the callback: nobody waits for the job any more.
            self._loop.call(handle.cancel)
            raise

    def resolve(self, prompt: str, **wishes: Any) -> ResolvedParams:
        """What `generate` would do with these arguments."""
        for name in wishes:
            if name not in _WISHES:
                raise RequestError(
                    f"There is no sampling parameter {name!r}.",
                    hint=suggest(name, _WISHES),
                    param=name,
                )
        if wishes.get("images") is not None:
            wishes["images"] = as_paths(wishes["images"])
        if wishes.get("mask") is not None:
            wishes["mask"] = os.fspath(wishes["mask"])
        try:
            wish = msgspec.convert({"prompt": prompt, **wishes}, SamplingParams)
        except msgspec.ValidationError as error:
            raise RequestError(
                f"An argument has a wrong type: {error}.", code="invalid_type"
            ) from None
        frames = wish.num_frames
        if frames is None and wish.images and self.card.edits == "image-to-image":
            frames = 1
        video = frames != 1 if self.card.makes_video else frames not in (None, 1)
        return self._client.resolve(shaped(self.card, wish), video=video)

    def set_lora(
        self,
        lora_nickname: str | list[str],
        lora_path: str | list[str | None] | None = None,
        target: str | list[str] = "all",
        strength: float | list[float] = 1.0,
        merge_mode: str = "auto",
        lora_alpha: float | list[float | None] | None = None,
        lora_weight_name: str | list[str | None] | None = None,
        lora_revision: str | list[str | None] | None = None,
    ) -> dict[str, Any]:
        """Replace the adapters that every generation gets; a known nickname needs no path."""
        if merge_mode not in MERGE_MODES:
            raise RequestError(
                f"merge_mode is {merge_mode!r}.",
                hint=f"Use one of: {', '.join(MERGE_MODES)}.",
                param="merge_mode",
            )
        settings = line_up_settings(
            lora_nickname=lora_nickname,
            lora_path=lora_path,
            target=target,
            strength=strength,
            lora_alpha=lora_alpha,
            lora_weight_name=lora_weight_name,
            lora_revision=lora_revision,
        )
        return self._loop.run(self._client.loras.set(settings, merge_mode))

    def unmerge_lora_weights(self, target: str = "all") -> dict[str, Any]:
        """Generate without adapters again; the weights are those that were loaded."""
        check_target(target)
        return self._loop.run(self._client.loras.unmerge(target))

    def merge_lora_weights(self, target: str = "all", strength: float = 1.0) -> dict[str, Any]:
        """Put the adapters that were set back into use, all at this strength."""
        check_target(target)
        check_strength(strength)
        return self._loop.run(self._client.loras.merge(target, strength))

    def list_loras(self) -> dict[str, Any]:
        """The adapters that are loaded, and those in use."""
        return self._loop.run(self._client.loras.report())

    def start_profile(self) -> None:
        """Record what the engine does from now on."""
        self._loop.run(self._client.start_profile())

    def stop_profile(self) -> dict[str, Any]:
        """The record as an object that Perfetto reads, once it is a JSON file."""
        return joined(self._loop.run(self._client.stop_profile()))

    def shutdown(self) -> None:
        """Unload the model and end the threads; more calls do nothing."""
        self._shutdown()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()


class _ClientThread:
    """The client's event loop, in a thread of its own until `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),), daemon=True)
        self._thread.start()
        self._started.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.spawn(work).result()

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if not self._thread.is_alive():
            work.close()
            raise UnavailableError("The generator was shut down.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[], Any]) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.call(self._end.set)
        # The garbage collector may call this from any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._started.set()
        await self._end.wait()
        await self._client.stop()


async def _follow(handle: GenerationHandle, changes: queue.SimpleQueue[Event | None]) -> Generation:
    try:
        async for event in handle.events():
            changes.put(event)
        return await handle.result()
    finally:
        changes.put(None)
