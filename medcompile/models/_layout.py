"""The face that each layout of two-tower checkpoints shows to the family clip, and what all of them need.

_open_clip.py has folders of open_clip, _clip_hf.py those of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from medcompile.errors import SourceError

if TYPE_CHECKING:
    from medcompile.sources import TensorRef

# Adding this to a score before softmax makes its weight exactly 0 in fp32 and stays finite in fp16.
MASKED = -10000.0


@dataclass(frozen=True)
class TextFacts:
    """context: tokens at most, special ones included. pooling: the token that the embedding is taken from."""

    context: int
    pad_id: int
    pooling: str


@dataclass(frozen=True)
class ImageFacts:
    """size: (h, w) in pixels that the model was trained on. patch: edge of a patch."""

    size: tuple[int, int]
    patch: int


class Layout(Protocol):
    """A checkpoint of one layout. Parameters of its towers are called as in the checkpoint."""

    @property
    def dim(self) -> int: ...
    @property
    def template(self) -> str: ...
    @property
    def unescape(self) -> bool: ...
    @property
    def prefixes(self) -> tuple[str, ...]: ...

    def image(self) -> ImageFacts: ...
    def text(self) -> TextFacts: ...

    def tower(self, task: str, *, resolution: bool) -> Any:
        """The untrained tower with the graph's face. resolution: its input may have any size. Raises SourceError."""
        ...

    def reference(self, task: str, *, resolution: bool) -> Any:
        """The original library's model with its weights, one of its two encoders behind the graph's face."""
        ...

    def transform(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """transform.json, and notes."""
        ...

    def notes(self, task: str) -> tuple[str, ...]:
        """What had to be assumed about a tower."""
        ...


def match(parameters: Mapping[str, Any], tensors: Mapping[str, TensorRef], task: str) -> dict[str, str]:
    """Every parameter's tensor, under the same name. Raises SourceError for what is missing or of another size.

    A patch embedding's weight [out, c, p, p] may be asked for as [out, c * p * p]: its bytes are the same.
    """
    missing = [name for name in parameters if name not in tensors]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise SourceError(
            f"the checkpoint has no weights for {task}: {', '.join(missing[:4])}{more}",
            fix=f"name a checkpoint with both towers, or leave {task} out of model.tasks",
        )
    for name, parameter in parameters.items():
        have, want = tuple(tensors[name].shape), tuple(parameter.shape)
        flat = (have[0], int(np.prod(have[1:]))) if len(have) == 4 else have
        if want not in (have, flat):
            raise SourceError(
                f"weight {name} has shape {list(have)}, the config asks for {list(want)}",
                fix="the config and the weights are not of one model; fetch both again",
            )
    return {name: name for name in parameters}


def scalar(tensors: Mapping[str, TensorRef], name: str) -> np.float32:
    """A stored number. Raises SourceError if there is none of that name."""
    import ml_dtypes

    if name not in tensors:
        raise SourceError(f"the checkpoint has no {name}", fix="name a checkpoint of a whole two-tower model")
    ref = tensors[name]
    dtype = np.dtype(getattr(ml_dtypes, ref.dtype, ref.dtype))
    return np.float32(np.fromfile(ref.file, dtype, 1, offset=ref.offset)[0])


def edges(source: str, value: object) -> tuple[int, int]:
    """(h, w) from an edge or a pair of them."""
    pair = [value, value] if isinstance(value, int) else value
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair):
        return int(pair[0]), int(pair[1])
    raise SourceError(f"{source}: image size {value!r} is neither an edge nor a pair", fix="fetch the config again")


def numbers(source: str, key: str, value: object) -> list[float]:
    """Three numbers, one for each colour."""
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(n, int | float) for n in value):
        return [float(n) for n in value]
    raise SourceError(f"{source}: {key} is {value!r}, not three numbers", fix="fetch the checkpoint's settings again")


def additive(mask: Any) -> Any:
    """An attention mask [b, s] of ones and zeros in its additive form [b, 1, 1, s]."""
    import torch

    return (1.0 - mask.to(torch.float32))[:, None, None, :] * MASKED
