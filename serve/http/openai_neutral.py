"""OpenAI's parameters that this service has no use for: where they ask for nothing they change
nothing, where they ask for something the request is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invar_ray.errors import RequestError

ANYTHING = object()
"""Stands for every value: a hint or a name, which cannot change an answer."""

_ONE = "one answer is given: ask again for another, with another seed"
_TOOLS = "this service calls no tools and no functions: it answers from the passages of its index"
_LOGPROBS = (
    "log-probabilities are not given: `invar.confidence` of a response is the mean over the answer"
)
_FORMAT = "answers are plain text, JSON mode and schemas are not there: parse the field `invar`"
_PENALTY = "penalties on tokens are not there: leave it out, or send 0"
_KEPT = "nothing is stored here: keep it on your side"
_BIAS = "the likelihood of single tokens cannot be changed here"
_TEXT = "only text is read and written"
_MODEL = "the model behind this service does not reason apart, so there is no effort to set"
_SAMPLING = "only temperature, top_p, seed and stop are there to sample with"
_INPUTS = "inputs that are too long are cut, and `invar.cut` of the response names them"

_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _TEXT),
    "best_of": ((1,), _ONE),
    "echo": ((False,), "the prompt is not sent back: `invar.passages` has what was read"),
    "frequency_penalty": ((0,), _PENALTY),
    "function_call": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "ignore_eos": ((False,), _SAMPLING),
    "logit_bias": (({},), _BIAS),
    "logprobs": ((False, 0), _LOGPROBS),
    "metadata": (({},), _KEPT),
    "min_p": ((0,), _SAMPLING),
    "min_tokens": ((0,), _SAMPLING),
    "modalities": ((["text"],), _TEXT),
    "n": ((1,), _ONE),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "prediction": ((), "an answer cannot be predicted for this service"),
    "presence_penalty": ((0,), _PENALTY),
    "prompt_cache_key": ((ANYTHING,), ""),
    "prompt_cache_retention": ((ANYTHING,), ""),
    "reasoning_effort": (("none",), _MODEL),
    "repetition_penalty": ((1,), _PENALTY),
    "response_format": (({"type": "text"},), _FORMAT),
    "safety_identifier": ((ANYTHING,), ""),
    "service_tier": (("auto", "default"), "there is one tier of service here"),
    "store": ((False,), _KEPT),
    "tool_choice": (("none", "auto"), _TOOLS),
    "tools": (([],), _TOOLS),
    "top_logprobs": ((0,), _LOGPROBS),
    "verbosity": (("medium",), "the length of an answer is set with max_tokens"),
    "web_search_options": ((), "this service searches its own index, never the web"),
}
_EMBEDDINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "priority": ((0,), "there is one tier of service here"),
    "truncate": ((True, "END", "RIGHT"), _INPUTS),
    "truncate_prompt_tokens": ((-1,), _INPUTS),
}


def without_neutral(body: Any, embeddings: bool = False) -> Any:
    """The body without parameters that ask for nothing (absent, ``null`` or neutral).

    Raises:
        RequestError: one asks for what this service cannot do.
    """
    if not isinstance(body, Mapping):
        return body
    table = _EMBEDDINGS if embeddings else _CHAT
    left = dict(body)
    for name, (neutral, why) in table.items():
        value = left.pop(name, None)
        if value is None or ANYTHING in neutral or any(_same(value, each) for each in neutral):
            continue
        raise RequestError(f"{name} cannot be honoured", expected=why)
    return left


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where 0 and 0.0 are one, and ``true`` is not 1."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return bool(value == neutral)


def check_texts(value: Any) -> None:
    """That ``input`` of an embedding request holds texts.

    Raises:
        RequestError: it holds token ids.
    """
    first = value[0] if isinstance(value, list) and value else value
    first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, int):
        raise RequestError(
            "input holds token ids, and whose tokens they are cannot be known",
            expected="texts",
            action="let the client send texts: OpenAIEmbeddings(check_embedding_ctx_length=False) "
            "in LangChain",
        )


def check_parts(messages: Any) -> None:
    """That messages hold text alone.

    Raises:
        RequestError: a part of one is something else.
    """
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind not in {"text", "refusal"}:
                raise RequestError(
                    f"messages.{number} holds a part that is no text", expected="parts of type text"
                )
