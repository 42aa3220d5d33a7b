"""What the endpoints take: OpenAI's parameters that diptych has, and its own. Any other name is refused, never ignored.

Parameters that OpenAI's clients send and that can have one value only here (``frequency_penalty`` 0, ``quality``
"auto") are taken with that value and refused with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; ``GET /v1/models`` shows them."""

    body_bytes: int = 32 * 2**20
    json_depth: int = 32
    pixels: int = 16_000_000  # of a picture sent
    drawn: int = 2048 * 2048  # pixels of a picture drawn
    pictures: int = 8  # of one request
    prompt: int = 8_000  # characters, the whole conversation
    new_tokens: int = 1_024
    steps: int = 200
    n: int = 10
    stored_bytes: int = 128 * 2**20  # uploads, and pictures asked for by url
    stored_seconds: int = 3_600


Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description='WIDTHxHEIGHT in pixels, or "auto"')]


class Strict(BaseModel):
    """No name but the declared ones and no type but theirs; null stands for what is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


class ToDraw(Strict):
    """How a picture is drawn. ``settings`` are further fields of the model's own settings, by name."""

    size: Size | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1, description="another name of num_inference_steps")
    guidance_scale: Finite | None = Field(None, ge=0, le=100)
    negative_prompt: str | None = None
    settings: dict[str, Any] = {}
    partial_images: int = Field(0, ge=0, le=16, description="previews on the way; needs stream")
    stream: bool = False
    seed: Seed | None = None
    user: str | None = Field(None, max_length=256, description="named in the log")

    @model_validator(mode="after")
    def _one_name(self):
        if self.steps is not None and self.num_inference_steps is not None:
            raise ValueError("steps and num_inference_steps are the same; give one")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream")
        return self


class ImageUrl(Strict):
    url: str = Field(description="a data URI (data:image/png;base64,...), or the address of an upload")
    detail: Literal["auto"] | None = None


class FileId(Strict):
    file_id: str = Field(description="the id that POST /v1/files returned")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class FilePart(Strict):
    type: Literal["file"]
    file: FileId


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is system")
    content: str | Annotated[list[Part], Field(min_length=1)]
    refusal: None = Field(None, description="answers have it, and come back as they are")


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(ToDraw):
    """``modalities`` says what the answer is made of, in this order: words, a picture, words about it ..."""

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
    temperature: Finite = Field(0.0, ge=0, le=2)
    top_p: Finite = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1)
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _sensible(self):
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        if len(self.stops) > 4 or not all(self.stops) or any(len(s) > 100 for s in self.stops):
            raise ValueError("stop takes up to 4 texts of 1 to 100 characters")
        if "text" not in self.modalities:
            words = {"max_tokens", "max_completion_tokens", "stop", "logprobs"} & self.model_fields_set
            if words:
                raise ValueError(f"{', '.join(sorted(words))} needs text among modalities")
        if "image" not in self.modalities:
            drawn = (ToDraw.model_fields.keys() - {"stream", "seed", "user"}) & self.model_fields_set
            if drawn:
                raise ValueError(f"{', '.join(sorted(drawn))} needs image among modalities")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ImagesRequest(ToDraw):
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
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _encoding(self):
        if self.output_compression is not None and self.output_format == "png":
            raise ValueError("output_compression is for jpeg and webp")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream sends b64_json, not url")
        return self


class EditsRequest(ImagesRequest):
    """The fields of a form, where numbers are texts. The files ``image`` (one or several, also ``image[]``) and
    ``mask`` come beside them."""

    model_config = ConfigDict(
        strict=False, json_schema_extra={"examples": [{"prompt": "make the star green", "seed": 1}]}
    )
    image_guidance_scale: Finite | None = Field(None, ge=0, le=100)
