"""OpenAI's forms of requests and responses: what this service takes of them, and the field that it
adds (``invar``).

A parameter that the service cannot honour is refused rather than passed over; one that asks for
nothing changes nothing (:mod:`serve.http.openai_neutral`).
"""

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from invar_ray.answering.followup import Turn
from invar_ray.errors import RequestError
from invar_ray.schema import Mode
from serve.http.conditions import Conditions
from serve.http.openai_neutral import check_parts, check_texts, without_neutral
from serve.http.protocol import AnswerResponse, clean_text

CHAT_MODEL, EMBEDDING_MODEL, PASSAGE_MODEL = "invar-rag", "invar-encoder", "invar-encoder-passage"


LOW_CONFIDENCE = "\n\n(Not sure: the passages may not answer this question.)"
"""Ends a chat's answer that the service's own route would refuse as too unsure."""


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(extra="ignore")  # hints to a cache and the like

    type: Literal["text", "refusal"] = "text"
    text: str = Field("", validation_alias=AliasChoices("text", "refusal"))

    _clean = field_validator("text")(clean_text)


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")  # answers that are sent back carry fields of theirs

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _clean_content(cls, value: str | list[TextPart] | None) -> str | list[TextPart] | None:
        return clean_text(value) if isinstance(value, str) else value

    def text(self) -> str:
        """Its text, parts joined by line breaks."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = Field(None, description="End with a chunk that counts the tokens.")
    include_obfuscation: bool | None = Field(None, description="Has no effect: nothing is padded.")


class ChatRequest(BaseModel):
    """A conversation; the last user message is searched with and answered, in the light of the
    turns before it where it is a follow-up.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": CHAT_MODEL,
                    "messages": [{"role": "user", "content": "Who keeps the lighthouse?"}],
                    "stream": False,
                }
            ]
        },
    )

    model: str = Field(description=f"`{CHAT_MODEL}`.", examples=[CHAT_MODEL])
    messages: list[Message] = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="Longest answer in tokens.")
    max_completion_tokens: int | None = Field(None, description="The same, by its newer name.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the default, takes the likeliest token."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    user: str | None = Field(None, description="Has no effect.")
    top_k: int | None = Field(
        None, strict=True, description="Number of passages; an extension (`extra_body`)."
    )
    where: Conditions = Field(
        Conditions(),
        description="Only passages that meet these conditions are found; an extension "
        "(`extra_body`).",
    )
    mode: Mode | None = Field(
        None, description="How to search: `dense`, `bm25` or `hybrid`; an extension (`extra_body`)."
    )

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, body: Any) -> Any:
        body = without_neutral(body)
        if isinstance(body, dict):
            check_parts(body.get("messages"))
        return body

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in [value] if isinstance(value, str) else value or []:
            clean_text(text)
        return value

    def question(self) -> tuple[str, list[Turn]]:
        """The last user message, and the turns before it.

        Raises:
            RequestError: if there is none, or it is not the last message.
        """
        if self.messages[-1].role != "user":
            raise RequestError(
                f"the last message is of the {self.messages[-1].role}",
                expected="a message of the user",
            )
        turns: list[Turn] = []
        for message in self.messages[:-1]:
            if message.role == "user":
                turns.append(Turn(message.text()))
            elif message.role == "assistant" and turns:
                turns[-1] = Turn(turns[-1].question, message.text())
        return self.messages[-1].text(), turns

    def style(self) -> str:
        """What the messages of the system and the developer say: how to word the answer."""
        said = (each.text() for each in self.messages if each.role in {"system", "developer"})
        return "\n".join(text.strip() for text in said if text.strip())

    def unused(self, is_follow_up: bool) -> list[str]:
        """A note on the turns that had no part in the answer."""
        others = sum(message.role in {"user", "assistant"} for message in self.messages[:-1])
        if is_follow_up or not others:
            return []
        return [
            f"{others} other messages were not used: the last one is searched with and answered"
        ]

    def length(self) -> int | None:
        """The longest answer asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def stops(self) -> tuple[str, ...]:
        """Its stop strings.

        Raises:
            RequestError: if there are more than four, or one is empty or very long.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or any(not 1 <= len(text) <= 200 for text in stops):
            raise RequestError(
                "stop is not usable", expected="at most 4 strings of 1 to 200 characters"
            )
        return stops


class Usage(BaseModel):
    """Tokens of the prompt (passages included) and of the answer."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        """With their sum."""
        total = prompt_tokens + completion_tokens
        return cls(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total
        )


class ChatMessage(BaseModel):
    """The answer: the model's own text, its `[n]` marks included."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class Choice(BaseModel):
    """The one choice."""

    index: int = 0
    message: ChatMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """OpenAI's `chat.completion`; `invar` holds the checked answer with citations, passages, notes
    and versions.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="Versions of index and generator.")
    choices: list[Choice]
    usage: Usage
    invar: AnswerResponse


class EmbeddingRequest(BaseModel):
    """Texts to embed."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": EMBEDDING_MODEL, "input": ["Who keeps the lighthouse?"]}]
        },
    )

    model: str = Field(
        description=f"`{EMBEDDING_MODEL}`, or `{PASSAGE_MODEL}` for the side of passages.",
        examples=[EMBEDDING_MODEL],
    )
    input: str | list[str] = Field(description="Text or texts; token ids are not taken.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="Must be the encoder's own.")
    user: str | None = Field(None, description="Has no effect.")
    input_type: Literal["query", "passage"] | None = Field(
        None,
        description="Which side of the bi-encoder, whatever the model's name says; an extension "
        "(`extra_body`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, body: Any) -> Any:
        body = without_neutral(body, embeddings=True)
        if isinstance(body, dict):
            check_texts(body.get("input"))
        return body

    @property
    def side(self) -> Literal["query", "passage"]:
        """Which side of the bi-encoder is asked for."""
        return self.input_type or ("passage" if self.model == PASSAGE_MODEL else "query")

    @field_validator("input")
    @classmethod
    def _clean(cls, value: str | list[str]) -> str | list[str]:
        return clean_text(value) if isinstance(value, str) else [clean_text(text) for text in value]


class EmbeddingOut(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """OpenAI's list of embeddings; `invar` holds the versions, and in `cut` the numbers of inputs
    that were longer than the encoder reads (the tokens of `usage` are those that it read).
    """

    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: Usage
    invar: dict[str, Any]


class ModelOut(BaseModel):
    """A model's name; `invar` holds the versions behind it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "invar-ray"
    invar: dict[str, Any]


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelOut]
