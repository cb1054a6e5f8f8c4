"""What the image towers of all layouts share: patches without a convolution, and positions for other resolutions.

Both are for tracing. They compute what the libraries' own modules compute, in operators that every backend has.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _classes() -> tuple[type, type]:
    import torch
    from torch.nn import functional

    class Patches(torch.nn.Module):
        """A Conv2d whose stride is its kernel, as one matrix product: [b, c, h, w] -> [b, rows * columns, out].

        Its weight is the convolution's, flat: [out, c * p * p], the same bytes.
        """

        def __init__(self, conv: Any) -> None:
            super().__init__()
            self.patch = int(conv.kernel_size[0])
            self.weight = torch.nn.Parameter(torch.empty(conv.out_channels, conv.in_channels * self.patch**2))
            self.bias = torch.nn.Parameter(torch.empty(conv.out_channels)) if conv.bias is not None else None

        def forward(self, x: Any) -> Any:
            batch, channels, height, width = x.shape
            rows, columns, p = height // self.patch, width // self.patch, self.patch
            x = x.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
            return functional.linear(x.reshape(batch, rows * columns, channels * p * p), self.weight, self.bias)

    class Attention(torch.nn.Module):
        """timm's attention with its one projection for queries, keys and values, taken apart before the heads are."""

        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.qkv, self.proj = attention.qkv, attention.proj
            self.heads, self.size, self.scale = attention.num_heads, attention.head_dim, attention.scale

        def forward(self, x: Any, attn_mask: None = None, is_causal: bool = False) -> Any:
            batch, tokens, _ = x.shape
            shape = (batch, tokens, self.heads, self.size)
            q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            weights = (q @ k.transpose(2, 3) * self.scale).softmax(dim=-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.heads * self.size))

    return Patches, Attention


def patches(conv: Any) -> Any:
    """The module that takes conv's place. conv: a Conv2d without padding, its stride equal to its square kernel."""
    return _classes()[0](conv)


def attention(original: Any) -> Any:
    """The module that takes the place of a plain timm Attention."""
    return _classes()[1](original)


def is_patch_embedding(conv: Any) -> bool:
    import torch

    return (
        isinstance(conv, torch.nn.Conv2d)
        and tuple(conv.kernel_size) == tuple(conv.stride)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and tuple(conv.padding) == (0, 0)
        and tuple(conv.dilation) == (1, 1)
        and conv.groups == 1
    )


def interpolated(table: Any, rows: Any, columns: Any, *, antialias: bool) -> Any:
    """Position embeddings [old, old, dim] for a grid of [rows, columns]: bicubic, as torch's interpolate() does it.

    Two products with a matrix of cubic weights that is computed in the graph; exactly the table itself where the grid
    is its own. antialias: the kernel widens when the grid shrinks (timm); without, it does not (transformers).
    Returns [rows * columns, dim].
    """
    import torch

    old, _, dim = table.shape
    if not antialias:  # taps beyond the border read the border
        index = torch.arange(-2, old + 2).clamp(0, old - 1)
        table = table[index][:, index]
    across = _weights(columns, old, antialias) @ table  # [old, columns, dim]
    down = _weights(rows, old, antialias) @ across.reshape(table.shape[0], columns * dim)
    return down.reshape(rows * columns, dim)


def _weights(new: Any, old: int, antialias: bool) -> Any:
    """What each old position gives to each new one, [new, old], or [new, old + 4] with two more beyond each border.

    The distance between two centres is a ratio of integers, and divided once: nothing is rounded before.
    """
    import torch

    border = 0 if antialias else 2
    sources = (2 * torch.arange(-border, old + border) + 1) * new
    targets = (2 * torch.arange(new) + 1) * old
    stretch = torch.sym_max(new, old) if antialias else new
    x = ((sources[None] - targets[:, None]).abs() / (2 * stretch)).clamp(max=2.0)
    a = -0.5 if antialias else -0.75  # torch's kernels differ
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    weights = torch.where(x < 1, inner, outer)
    return weights / weights.sum(dim=1, keepdim=True) if antialias else weights


def embedded(trunk: Any, pixels: Any, *, interpolate: bool) -> Any:
    """Tokens of a timm vision transformer before its first block, [b, tokens, dim], from pixels [b, 3, h, w].

    trunk: with patches() in its patch_embed.proj. interpolate: positions are resized to the grid, as timm does it.
    """
    import torch

    x = trunk.patch_embed.norm(trunk.patch_embed.proj(pixels))
    extra = [t.expand(x.shape[0], -1, -1) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
    positions = trunk.pos_embed
    if positions is None:
        return torch.cat([*extra, x], dim=1)
    if interpolate:
        (rows, columns), patch = trunk.patch_embed.grid_size, trunk.patch_embed.patch_size[0]
        count = positions.shape[1] - rows * columns
        table = positions[0, count:].reshape(rows, columns, -1)
        grid = interpolated(table, pixels.shape[2] // patch, pixels.shape[3] // patch, antialias=True)[None]
        positions = torch.cat([positions[:, :count], grid], dim=1) if count else grid
    if trunk.no_embed_class:
        return torch.cat([*extra, x + positions], dim=1)
    return torch.cat([*extra, x], dim=1) + positions
