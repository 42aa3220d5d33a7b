"""What the endpoints take: OpenAI's parameters that diptych has, and its own.

An unknown parameter is refused, unless it is null: null stands for a parameter that is not given. Parameters that
clients of OpenAI and vLLM send out of habit and that do not change what is asked for (``IGNORED``) are accepted and
named in the answer's ``warning`` header; a strict server refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diptych.generation.sampling import Penalties
from diptych.models.sizes import parse_size

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description='WIDTHxHEIGHT in pixels, or "auto"')]
Detail = Literal["auto", "low", "high", "original"]


class Strict(BaseModel):
    """Takes the declared names and types only. Null stands for a parameter that is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)
    IGNORED: ClassVar[frozenset[str]] = frozenset()  # accepted without effect
    SAME: ClassVar[tuple[tuple[str, ...], ...]] = ()  # names of one parameter, of which a request gives one

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        for names in self.SAME:
            if len(given := [name for name in names if name in self.model_fields_set]) > 1:
                raise ValueError(f"{' and '.join(given)} are the same; give one")
        return self

    def one_of(self, *names: str) -> Any:
        """The value of the first of ``names`` that is given; None where none is."""
        return next((getattr(self, name) for name in names if getattr(self, name) is not None), None)

    def ignored(self, path: str = "") -> Iterator[str]:
        """The paths of what was sent and has no effect. "auto" asks for nothing and is left out."""
        for name in type(self).model_fields:  # in their order
            if name not in self.model_fields_set:
                continue
            value, at = getattr(self, name), f"{path}{name}"
            if name in self.IGNORED:
                if value != "auto":
                    yield at
            elif isinstance(value, Strict):
                yield from value.ignored(f"{at}.")
            elif isinstance(value, list):
                for i, one in enumerate(value):
                    if isinstance(one, Strict):
                        yield from one.ignored(f"{at}.{i}.")


class ToDraw(Strict):
    """How a picture is drawn. ``settings`` are further fields of the model's settings, by name."""

    size: Size | None = None
    width: int | None = Field(None, ge=1, le=99999, description="with height: another form of size")
    height: int | None = Field(None, ge=1, le=99999, description="with width: another form of size")
    num_inference_steps: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1, description="another name of num_inference_steps")
    guidance_scale: Finite | None = Field(None, ge=0, le=100)
    true_cfg_scale: Finite | None = Field(None, ge=0, le=100, description="another name of guidance_scale")
    cfg_scale: Finite | None = Field(None, ge=0, le=100, description="another name of guidance_scale")
    negative_prompt: str | None = None
    think: bool = Field(False, description="reason first: reasoning_content holds it")
    preset: str | None = Field(None, max_length=64, description="the settings of a published entry point")
    settings: dict[str, Any] = {}
    partial_images: int = Field(0, ge=0, le=16, description="previews on the way; needs stream")
    stream: bool = False
    seed: Seed | None = None
    user: str | None = Field(None, max_length=256, description="named in the log")
    safety_identifier: str | None = None
    SAME: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("steps", "num_inference_steps"),
        ("guidance_scale", "true_cfg_scale", "cfg_scale"),
        ("size", "width"),
        ("size", "height"),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height are given together, or size")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream")
        return self

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(width, height) in pixels; None for the model's own size."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        return None if self.size is None or self.size == "auto" else parse_size(self.size)


class ImageUrl(Strict):
    """Where the picture of a message is."""

    url: str = Field(description="a data URI (data:image/png;base64,...), or the address of an upload")
    detail: Detail | None = Field(None, description="no effect: each model reads at its size")
    IGNORED = frozenset({"detail"})


class FileId(Strict):
    """A file that was uploaded before."""

    file_id: str = Field(description="the id that POST /v1/files returned")


class TextPart(Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FilePart(Strict):
    """An uploaded picture in a message."""

    type: Literal["file"]
    file: FileId


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="developer is read as system; tool and function are read as user"
    )
    content: str | Annotated[list[Part], Field(min_length=1)] | None = Field(None, description="null: of an assistant")
    name: str | None = Field(None, max_length=256, description="no effect")
    refusal: str | None = Field(None, description="part of answers, which clients send back; no effect")
    reasoning_content: str | None = Field(None, description="part of answers, which clients send back; no effect")
    annotations: list[Any] | None = Field(None, description="part of answers, which clients send back; no effect")
    audio: None = Field(None, description="part of answers, which clients send back")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="no effect: models call no tools")
    function_call: dict[str, Any] | None = Field(None, description="no effect: models call no tools")
    tool_call_id: str | None = Field(None, max_length=256, description="no effect")
    IGNORED = frozenset(
        {"name", "refusal", "reasoning_content", "annotations", "tool_calls", "function_call", "tool_call_id"}
    )

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is missing; only an assistant's may be null, not the {self.role}'s")
        return self


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class TextFormat(Strict):
    """The format of an answer: plain text."""

    type: Literal["text"]


class TemplateSettings(Strict):
    """What vLLM's clients send to switch thinking on."""

    enable_thinking: bool = False


class Sampled(Strict):
    """How the tokens of a text are sampled. ``top_k`` and ``repetition_penalty`` are vLLM's."""

    temperature: Finite = Field(0.0, ge=0, le=2)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 and -1: every token")
    repetition_penalty: Finite = Field(1.0, gt=0, le=10)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}

    @model_validator(mode="after")
    def _bias_names_tokens(self) -> Self:
        if wrong := [token for token in self.logit_bias if not re.fullmatch("[0-9]{1,9}", token)]:
            raise ValueError(f"logit_bias: its keys are token ids, not {wrong[0][:40]!r}")
        return self

    @property
    def penalties(self) -> Penalties:
        """The changes of the logits."""
        bias = tuple(sorted((int(token), value) for token, value in self.logit_bias.items()))
        return Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty, bias)


class ChatRequest(ToDraw, Sampled):
    """``modalities`` lists the parts of the answer in order: text, a picture, text about it ..."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "bagel/tiny", "messages": [{"role": "user", "content": "what is a circle?"}]},
                {
                    "model": "bagel/tiny",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                {"type": "text", "text": "how many stars are there?"},
                            ],
                        }
                    ],
                    "stream": True,
                },
                {
                    "model": "bagel/tiny",
                    "messages": [{"role": "user", "content": "a red circle"}],
                    "modalities": ["image"],
                    "size": "64x64",
                    "seed": 1,
                },
            ]
        }
    )
    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "image"]] = Field(["text"], min_length=1, max_length=6)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="another name of max_tokens")
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1)
    stream_options: StreamOptions | None = None
    response_format: TextFormat | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    chat_template_kwargs: TemplateSettings | None = Field(None, description="enable_thinking: another name of think")
    tools: list[dict[str, Any]] | None = Field(None, description="no effect: models call no tools")
    tool_choice: Literal["auto", "none"] | None = None
    functions: list[dict[str, Any]] | None = Field(None, description="no effect: models call no tools")
    function_call: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    SAME = (*ToDraw.SAME, ("max_tokens", "max_completion_tokens"))
    IGNORED = frozenset(
        {
            *("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
            *("reasoning_effort", "verbosity"),
            *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"),
        }
    )

    @model_validator(mode="after")
    def _chat_consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        if len(self.stops) > 4 or not all(self.stops) or any(len(s) > 100 for s in self.stops):
            raise ValueError("stop takes up to 4 texts of 1 to 100 characters")
        if "text" not in self.modalities:
            of_text = {"max_tokens", "max_completion_tokens", "stop", "logprobs", "logit_bias"} & self.model_fields_set
            if of_text:
                raise ValueError(f"{', '.join(sorted(of_text))} needs text among modalities")
        if "image" not in self.modalities:
            shared = {"stream", "seed", "user", "safety_identifier", "think"}
            of_pictures = (ToDraw.model_fields.keys() - shared) & self.model_fields_set
            if of_pictures:
                raise ValueError(f"{', '.join(sorted(of_pictures))} needs image among modalities")
        return self

    @property
    def thinks(self) -> bool:
        """Whether the answer is to be reasoned about first."""
        return self.think or bool(self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, none by default."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ImagesRequest(ToDraw):
    """Draws pictures from a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "bagel/tiny",
                    "prompt": "a red circle left of a blue star",
                    "size": "64x64",
                    "seed": 1,
                    "n": 4,
                },
                {"model": "bagel/tiny", "prompt": "two green squares", "stream": True, "partial_images": 3},
            ]
        }
    )
    model: str | None = None
    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1, description="picture i has seed + i")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(None, description="no effect")
    style: Literal["vivid", "natural"] | None = Field(None, description="no effect")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="no effect")
    IGNORED = frozenset({"quality", "style", "moderation", "safety_identifier"})

    @model_validator(mode="after")
    def _encoding_consistent(self) -> Self:
        if self.output_compression is not None and self.output_format == "png":
            raise ValueError("output_compression is for jpeg and webp")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream sends b64_json, not url")
        return self


class EditsRequest(ImagesRequest):
    """The fields of a form, whose values are strings. Its files are ``image`` (one or several, also ``image[]``) and
    ``mask``."""

    model_config = ConfigDict(
        strict=False, json_schema_extra={"examples": [{"prompt": "make the star green", "seed": 1}]}
    )
    image_guidance_scale: Finite | None = Field(None, ge=0, le=100)
    input_fidelity: Literal["low", "high"] | None = Field(None, description="no effect")
    IGNORED = ImagesRequest.IGNORED | {"input_fidelity"}
