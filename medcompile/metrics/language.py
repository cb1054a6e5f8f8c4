"""The metrics of language models: perplexity, divergence from the reference, agreement, and choices by likelihood.

Numbers come token by token, from texts that both models were shown; which texts, and how they are cut, is not known
here. Perplexity and divergence are costs: less is better, and a margin says how much more is tolerated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.intervals import Floats
from medcompile.metrics.material import Ints, Material, MissingMaterial, Predictions, per_unit, renumbered, share
from medcompile.metrics.pairs import METRICS as PAIRS
from medcompile.metrics.samples import PairedCost, PairedFlips, Sample, UnitTotals

LIKELIEST = 64
"""How many columns of Predictions.kept_ids are the likeliest tokens; those after them are drawn from the others."""
RESOLUTION = 1e-6  # float32 rounding of a logit, as a share of perplexity or in nats
BROKEN = -100.0
"""The log-likelihood that a token counts with where a model gives NaN or Inf."""


def _perplexity(name: str, m: Material) -> Sample:
    """exp of the mean negative log-likelihood of all tokens; judged is its rise as a share of the reference's.

    So max_drop: 0.01 tolerates a perplexity of 1.01 times the reference's. The ratio of the two depends on the
    difference of the totals of log-likelihood alone, paired within each document.
    """

    def totals(p: Predictions) -> Floats:
        logs = np.concatenate([np.asarray(v, np.float64) for v in p.values])
        return per_unit(_unit_of_token(m), np.where(np.isfinite(logs), logs, BROKEN)[:, None])

    tokens = per_unit(_unit_of_token(m), np.ones((len(_unit_of_token(m)), 1)))
    return PairedCost(
        UnitTotals(tokens, totals(m.reference), totals(m.candidate)),
        lambda common, model: np.exp(-share(model[..., 0], common[..., 0])),
        int(tokens.sum()),
        resolution=RESOLUTION,
        relative=True,
    )


def _divergence(name: str, m: Material) -> Sample:
    """Mean Kullback-Leibler divergence of the candidate from the reference per token, over the vocabulary, in nats.

    At each position the terms of the reference's likeliest tokens are summed, and the sum over all others is estimated
    by tokens drawn from the reference's distribution over them: without bias, so that only noise, which the interval
    holds, takes it below 0. Lumping the others together instead would miss a quarter where distributions are flat.
    """
    if m.reference.kept_logs is None or m.candidate.kept_logs is None or m.reference.positions is None:
        raise MissingMaterial(f"metric {name} needs the likelihood of tokens beside the right one")
    p, q = (np.fmax(np.asarray(logs, np.float64), BROKEN) for logs in (m.reference.kept_logs, m.candidate.kept_logs))
    top, drawn = np.exp(p[:, :LIKELIEST]), (p - q)[:, LIKELIEST:]
    found = (top * (p - q)[:, :LIKELIEST]).sum(axis=1)
    if drawn.shape[1]:
        found += np.maximum(1.0 - top.sum(axis=1), 0.0) * drawn.mean(axis=1)
    unit = renumbered(_unit_of_token(m)[m.reference.positions])
    counts, sums = per_unit(unit, np.ones((len(unit), 1))), per_unit(unit, found[:, None])
    return PairedCost(
        UnitTotals(counts, np.zeros_like(sums), sums),
        lambda common, model: share(model[..., 0], common[..., 0]),
        len(unit),
        resolution=RESOLUTION,
    )


def _top1_agreement(name: str, m: Material) -> Sample:
    """Share of tokens for which both models find the same one likeliest."""
    if m.reference.top1 is None or m.candidate.top1 is None:
        raise MissingMaterial(f"metric {name} needs the likeliest token of every position")
    same: NDArray[np.bool_] = (m.reference.top1 == m.candidate.top1) & (m.candidate.top1 >= 0)
    return PairedFlips(np.ones(len(same), dtype=bool), same, renumbered(_unit_of_token(m)), one_way=True)


def _unit_of_token(m: Material) -> Ints:
    return np.repeat(m.unit, [len(v) for v in m.reference.values])


METRICS: Mapping[str, Callable[[str, Material], Sample]] = {
    "perplexity": _perplexity,
    "kl": _divergence,
    "top1_agreement": _top1_agreement,
    "accuracy": PAIRS["accuracy"],
    "accuracy[label]": PAIRS["accuracy[label]"],
}
