"""Bodies of requests, as the OpenAPI document shows them. What OpenAI has a route for has OpenAI's names and meanings.

A parameter of OpenAI's that can't be honoured is refused if it changes the answer, and taken without effect if it does
not (user, metadata, store ...): those are in Ignored. Answers' shapes are in answers.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PriorityName = Literal["emergency", "routine", "background"]
_NOTE = "Patient has type 2 diabetes and was started on metformin for acute kidney injury."
_PNG = (  # a white pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTjRcgAAAABJRU5ErkJggg=="
)


class Body(BaseModel):
    """What every request has. priority: an emergency overtakes routine requests, and these the background."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str = Field(max_length=512, description="The name of a served bundle; see /v1/models.")
    priority: PriorityName | None = Field(None, description="Default: the header X-Priority, else routine.")


class Ignored(BaseModel):
    """Parameters of OpenAI's that change no answer; they are taken, and nothing of them is kept."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, json_object, json_schema, or regex: what the answer is held to, token by token."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None


class Sampled(Body, Ignored):
    """How tokens are chosen. What is left out is as the checkpoint asks to be used."""

    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0 keeps every token.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer.")
    stop: str | list[str] | None = Field(None, description="Up to 16 strings that end the answer.")
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=64)
    cache_salt: str | None = Field(
        None, max_length=256, description="Requests of other salts share no computed tokens with this one."
    )
    logit_bias: dict[str, float] | None = Field(None, description="Not supported; an empty one is taken.")


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Further keys (name, reasoning_content ...) are the chat template's to read."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(max_length=64)
    content: str | list[TextPart] | None = None


class ChatRequest(Sampled):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "MODEL", "messages": [{"role": "user", "content": "What is sepsis?"}], "max_tokens": 16}
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = Field(None, description="Not supported; an empty list is taken.")
    tool_choice: Any = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(Sampled):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "MODEL", "prompt": "The patient was given", "max_tokens": 16}]}
    )

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, description="As OpenAI's, 16 unless told otherwise.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, description="Not supported beyond n.")
    suffix: str | None = Field(None, description="Not supported.")


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="data:image/png;base64,...; nothing is fetched.")
    detail: str | None = None


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl | str


class EmbeddingRequest(Body, Ignored):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "MODEL", "input": _NOTE}]})

    input: str | list[str] | list[ImagePart] | list[int] | list[list[int]] = Field(
        description="Texts, or images where the bundle has an image tower. Token ids are refused."
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, description="The first so many, brought to unit length again.")


class TextsRequest(Body):
    input: str | list[str]


class EntitiesRequest(TextsRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "MODEL", "input": _NOTE}]})


class ClassifyRequest(TextsRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "MODEL", "input": _NOTE, "top_k": 1}]})

    pairs: str | list[str] | None = Field(None, description="A second text for each, for models of pairs.")
    top_k: int | None = Field(None, ge=1, description="So many classes of each at most, the most probable first.")


class RerankRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "MODEL", "query": "kidney injury", "documents": [_NOTE, "The chest is clear."]}]
        }
    )

    query: str
    documents: list[str | TextDocument] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = False


class TextDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str


class MatchRequest(Body):
    """JSON, or multipart/form-data with the same names: several `images` files, `prompts` repeated."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "MODEL", "images": [_PNG], "prompts": ["chest X-ray showing pneumonia", "hand X-ray"]}
            ]
        }
    )

    images: list[str | ImagePart] = Field([], description="Data URLs: data:image/png;base64,...; DICOM as well.")
    prompts: list[str] | dict[str, str | list[str]] = Field(
        description="Classes: names, or a name for each with one prompt or several.", min_length=1
    )
    templates: list[str] | None = Field(None, min_length=1, description='Texts with {}; ["{}"] takes prompts as is.')


RerankRequest.model_rebuild()
