"""Shapes of answers, for the OpenAPI document. Nothing is checked against them while serving; the tests do that."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Told(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's shape of an error."""

    error: Told


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class CachedTokens(BaseModel):
    cached_tokens: int


class GeneratedUsage(Usage):
    completion_tokens: int
    prompt_tokens_details: CachedTokens


class Logprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Generated(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: GeneratedUsage


class ChatAnswer(Generated):
    """With `stream`: server-sent events of chat.completion.chunk objects, then [DONE]."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Generated):
    """With `stream`: server-sent events of text_completion objects, then [DONE]."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Listed(BaseModel):
    object: Literal["list"]
    model: str
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Listed):
    data: list[Embedding]


class Entity(BaseModel):
    """text is input[start:end], in characters."""

    label: str
    text: str
    start: int
    end: int
    score: float


class Entities(BaseModel):
    object: Literal["entities"]
    index: int
    entities: list[Entity]


class EntitiesAnswer(Listed):
    data: list[Entities]


class Score(BaseModel):
    label: str
    score: float


class Classification(BaseModel):
    object: Literal["classification"]
    index: int
    label: str
    scores: list[Score]


class ClassifyAnswer(Listed):
    data: list[Classification]


class Document(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(Listed):
    results: list[Ranked]


class PromptScore(BaseModel):
    """prompt, or label where the prompts were given by label."""

    prompt: str | None = None
    label: str | None = None
    score: float


class Match(BaseModel):
    object: Literal["match"]
    index: int
    scores: list[PromptScore]


class MatchAnswer(Listed):
    data: list[Match]


class ModelAnswer(BaseModel):
    """One served bundle. ready: whether its process can answer now."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    digest: str
    tasks: list[str]
    variant: str | None
    target: str | None
    ready: bool


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelAnswer]


class HealthAnswer(BaseModel):
    """models: each one's state."""

    status: Literal["ok", "unavailable"]
    models: dict[str, str] = {}


ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": CompletionAnswer,
    "/v1/embeddings": EmbeddingAnswer,
    "/v1/rerank": RerankAnswer,
    "/v1/entities": EntitiesAnswer,
    "/v1/classify": ClassifyAnswer,
    "/v1/match": MatchAnswer,
}
