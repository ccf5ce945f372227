"""The usual way to serve an omni model: FastAPI in front, transformers' `generate` behind.

    python benchmarks/plain_omni.py --model-path FOLDER

It is the peer of bench_omni.py: inference mode, text streamed by transformers' own streamer, one
request at a time with all threads of the machine, the others wait. Sound comes when all of it is
made, for that is what `generate` does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

sys.path.insert(0, str(Path(__file__).parents[1]))


class Plain:
    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer, Qwen3OmniMoeForConditionalGeneration

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder).eval()
        self._one = threading.Lock()

    def answer(self, wish: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Deltas as they are made."""
        tokens = self._tokenizer.apply_chat_template(
            wish["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        asked = {
            "input_ids": torch.tensor([tokens]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
        }
        with self._one:
            if "audio" in wish.get("modalities", []):
                yield from self._spoken(asked, wish)
            else:
                yield from self._written(asked, wish)

    def _written(self, asked: dict[str, Any], wish: dict[str, Any]) -> Iterator[dict[str, Any]]:
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True)

        def run() -> None:
            with torch.inference_mode():
                self._model.thinker.generate(
                    **asked,
                    do_sample=False,
                    max_new_tokens=wish["max_tokens"],
                    min_new_tokens=wish["max_tokens"],
                    streamer=streamer,
                )

        worker = threading.Thread(target=run)
        worker.start()
        for text in streamer:
            if text:
                yield {"content": text}
        worker.join()

    @torch.inference_mode()
    def _spoken(self, asked: dict[str, Any], wish: dict[str, Any]) -> Iterator[dict[str, Any]]:
        frames = wish["talker_max_new_tokens"] + 1  # the last code makes no frame
        text, sound = self._model.generate(
            **asked,
            speaker="Ethan",
            return_audio=True,
            thinker_max_new_tokens=wish["max_tokens"],
            thinker_min_new_tokens=wish["max_tokens"],
            thinker_do_sample=False,
            thinker_eos_token_id=self._model.config.im_end_token_id,
            talker_max_new_tokens=frames,
            talker_min_new_tokens=frames,
        )
        said = text[0, asked["input_ids"].shape[1] :]
        yield {"content": self._tokenizer.decode(said, skip_special_tokens=True)}
        samples = (sound.flatten().clamp(-1, 1).numpy() * 32767).astype(np.int16)
        yield {"audio": {"data": base64.b64encode(samples.tobytes()).decode()}}


def make_app(plain: Plain) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        wish = await request.json()
        deltas: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def work() -> None:
            for delta in plain.answer(wish):
                loop.call_soon_threadsafe(deltas.put_nowait, delta)
            loop.call_soon_threadsafe(deltas.put_nowait, None)

        threading.Thread(target=work, daemon=True).start()

        async def body() -> Any:
            while (delta := await deltas.get()) is not None:
                chunk = {"choices": [{"index": 0, "delta": delta}]}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    options = parser.parse_args()
    app = make_app(Plain(options.model_path))
    with socket.create_server(("127.0.0.1", 0)) as port:
        print(f"http://127.0.0.1:{port.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[port])


if __name__ == "__main__":
    main()
