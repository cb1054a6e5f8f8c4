"""Paged attention, one operator and its lowerings: the numpy reference, the Triton kernel, the TensorRT plugin.

The operator is the node `medcompile::PagedAttention`; reference.py says what it computes.
"""

from __future__ import annotations
