"""A server of OpenAI's completions protocol that reads by rule: what it writes depends on the
prompt it is sent.

It stands where a vLLM would stand, for tests that need sensible answers, refusals, silence and
broken connections, which the untrained model of the test store does not write.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from invar_ray.text.prompts import REFUSAL

_PASSAGE = re.compile(r"^\[(\d+)\] ([^:]+): (.*)$", re.MULTILINE)
_QUESTION = re.compile(r"^Question: (.*)$", re.MULTILINE)
# Words of a question (rewrites keep some), the title that answers it, what stands there.
_RULES = (
    (("ferry",), "Ferry", "nine in the morning"),
    (("light", "gorse"), "Gorse Island", "Mara Voss"),
    (("orchard", "grows"), "Orchard", "Pears and plums"),
)


def read(prompt: str) -> str:
    """What the reader writes for a prompt: an answer with its number, a refusal, or nothing."""
    asked = _QUESTION.findall(prompt)
    question = asked[-1].lower() if asked else ""
    if "silence" in question:
        return ""
    passages = {title: number for number, title, _ in _PASSAGE.findall(prompt)}
    for words, title, answer in _RULES:
        if title in passages and any(word in question for word in words):
            if "uncited" in question:
                return answer
            other = next((number for name, number in passages.items() if name != title), None)
            also = f" [{other}]" if "twice" in question and other else ""
            return f"{answer} [{passages[title]}]{also}"
    return REFUSAL


def worded(answer: str, system: str) -> str:
    """The answer as a system message wants it: in capitals, or whatever it says "Say" of."""
    ordered = re.search(r"Say (.+)\.", system)
    if ordered:
        return f"{ordered.group(1)} [1]"
    return answer.upper() if "capitals" in system else answer


class Reader:
    """The server, on a free port of this machine.

    Attributes:
        pause_s: between two pieces; a test makes it long to see a stream in its middle.
        broken_after: pieces after which the connection breaks, if any.
        gone: streams that were closed by the other side before their end.
        messages: those of the last chat.
    """

    def __init__(self) -> None:
        self.pause_s, self.broken_after, self.gone = 0.0, -1, 0
        self.messages: list[dict[str, str]] = []
        api = FastAPI()

        @api.post("/v1/completions")
        async def completions(request: Request) -> StreamingResponse:
            body = await request.json()
            return stream(body["model"], read(body["prompt"]), chat=False)

        @api.post("/v1/chat/completions")
        async def chat(request: Request) -> StreamingResponse:
            body = await request.json()
            self.messages = body["messages"]
            said = {each["role"]: each["content"] for each in self.messages}
            text = worded(read(said["user"]), said.get("system", ""))
            return stream(body["model"], text, chat=True)

        def stream(model: str, text: str, *, chat: bool) -> StreamingResponse:
            pieces = re.findall(r"\s*\S+", text)

            async def chunks() -> AsyncIterator[str]:
                base = {
                    "id": "c",
                    "object": "chat.completion.chunk" if chat else "text_completion",
                    "created": 1,
                    "model": model,
                }
                done = False
                try:
                    for count, piece in enumerate([*pieces, ""]):
                        if count == self.broken_after:
                            raise OSError("the connection breaks")
                        reason = None if piece else "stop"
                        choice = {
                            **({"delta": {"content": piece}} if chat else {"text": piece}),
                            "index": 0,
                            "logprobs": None,
                            "finish_reason": reason,
                        }
                        yield f"data: {json.dumps({**base, 'choices': [choice]})}\n\n"
                        await asyncio.sleep(self.pause_s)
                    done = True
                finally:
                    self.gone += not done
                counts = {
                    "prompt_tokens": 1,
                    "completion_tokens": len(pieces),
                    "total_tokens": 1 + len(pieces),
                }
                yield f"data: {json.dumps({**base, 'choices': [], 'usage': counts})}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(chunks(), media_type="text/event-stream")

        config = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
