"""What a client may ask for, in OpenAI's words, and errors in its shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator, model_validator

_NOT_DONE = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "top_logprobs": None,
    "suffix": None,
    "tools": None,
    "functions": None,
    "response_format": None,
    "logit_bias": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Parameters that change an answer and are not done, with the values at which they ask for nothing."""


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        message: one line.
        kind: OpenAI's ``type``.
        param: what is wrong in the request; None: nothing in particular.
        code: OpenAI's ``code``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a streamed answer has besides text."""

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests have. Other parameters are left alone, unless they would change the answer."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: StrictInt = Field(default=0, ge=-1)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, values: Any) -> Any:
        """Null asks for the default, as OpenAI has it."""
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if "" in given or len(given) > 16:
            raise ValueError("at most 16 strings, none of them empty")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most(self) -> int | None:
        """New tokens that are asked for."""
        return self.max_tokens


class CompletionRequest(_Request):
    """``/v1/completions``."""

    prompt: str | list[StrictInt] | list[str]


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: with text for its content."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(_Request):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def read_request(kind: type[_Request], body: bytes) -> Any:
    """The request in ``body``.

    Raises:
        RequestError: no JSON, parameters of another kind, or some that are not done.
    """
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(place) for place in first["loc"])
        raise RequestError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None) from error
    for name, value in (found.model_extra or {}).items():
        if name in _NOT_DONE and value is not None and value != _NOT_DONE[name] and value != {}:
            raise RequestError(400, f"{name}: not supported by this server; leave it out", param=name)
    return found
