"""Scores computed from the log-probabilities of choices.

`logprobs` are nats, [n, choices], NaN for choices that a question lacks; `shares` are the
probabilities, normalised over the choices, [n, choices], 0 there; `answer` is the position of the
right choice, [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from qlora_harness.compare.statistics import Floats
from qlora_harness.results.answers import logprobs_of

Positions = NDArray[np.integer]
_BINS = 15  # of the calibration error, of equal width (Guo et al. 2017)
_SMALLEST = 1e-300  # floor under probabilities, so that logarithms stay finite


def probabilities(logprobs: Floats) -> Floats:
    """Returns the shares, [n, choices]."""
    return np.asarray(softmax(np.where(np.isnan(logprobs), -np.inf, logprobs), axis=1))


def nll_of(shares: Floats, answer: Positions) -> Floats:
    """Returns the negative log-probability of the right choice, nats, [n]."""
    return np.asarray(-np.log(np.maximum(shares[np.arange(len(shares)), answer], _SMALLEST)))


def brier_of(shares: Floats, answer: Positions) -> Floats:
    """Returns the sum over choices of (probability - 1 or 0)², [n]."""
    right = np.zeros_like(shares)
    right[np.arange(len(shares)), answer] = 1
    return np.asarray(((shares - right) ** 2).sum(axis=1))


def divergence(reference: Floats, other: Floats) -> float:
    """Returns the mean KL(reference ‖ other) of the shares of two runs, nats."""
    ratio = np.log(np.maximum(reference, _SMALLEST)) - np.log(np.maximum(other, _SMALLEST))
    return float((reference * ratio).sum(axis=1).mean())


def calibration_error(shares: Floats, answer: Positions) -> float:
    """Returns the expected calibration error over 15 bins of equal width."""
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == answer
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(shares))


def best_choices(logprobs: Floats) -> Floats:
    """Returns 1 for the best choice and 0 for others; k tied best have 1/k each, [n, choices]."""
    tied = logprobs == np.nanmax(logprobs, axis=1, keepdims=True)
    return np.asarray(tied / tied.sum(axis=1, keepdims=True))


def letter_centred(logprobs: Floats, answer: Positions) -> Floats:
    """Returns values, [n], whose mean is the accuracy without letter preference: 0 at chance.

    The mean over questions is subtracted from each letter's log-probability, and the expected
    accuracy of the resulting mix of letters from the accuracy of the best choices. The values
    linearise this estimate, so they can be paired. All questions must have the same choices.
    """
    chosen = best_choices(logprobs - logprobs.mean(axis=0))
    chosen_share = chosen.mean(axis=0)
    right_share = np.bincount(answer, minlength=chosen.shape[1]) / len(answer)
    credit = chosen[np.arange(len(answer)), answer]
    return np.asarray(
        credit - chosen @ right_share - chosen_share[answer] + chosen_share @ right_share
    )


class RunAnswers:
    """The answers of one run as arrays over questions, each computed once."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.logprobs = logprobs_of(frame)
        self.answer = frame["answer"].to_numpy()
        self.credit: Floats = frame["credit"].to_numpy()
        self.score: Floats = frame["score"].to_numpy()
        self.weight: Floats = frame["weight"].to_numpy()
        self.has_choices = self.logprobs.shape[1] > 0
        whole = self.has_choices and bool(np.isfinite(self.logprobs).all())
        self.alike = whole and len(np.unique(self.answer)) > 1
        """Whether all questions have the same choices, and none is always right."""
        self.counts = self.has_choices or bool(np.isin(self.score, (0, 1)).all())
        """Whether each answer is right or wrong."""

    @cached_property
    def subjects(self) -> NDArray[np.intp]:
        """The number of each question's subject, in alphabetical order."""
        codes: NDArray[np.intp] = pd.factorize(self.frame["subject"].astype(str), sort=True)[0]
        return codes

    @cached_property
    def shares(self) -> Floats:
        """The probabilities of the choices."""
        return probabilities(self.logprobs)

    @cached_property
    def nll(self) -> Floats:
        """The NLL of the right choice, nats."""
        return nll_of(self.shares, self.answer)

    @cached_property
    def brier(self) -> Floats:
        """The Brier score."""
        return brier_of(self.shares, self.answer)

    @cached_property
    def best(self) -> Floats:
        """The best choices, ties shared."""
        return best_choices(self.logprobs)

    @cached_property
    def centred(self) -> Floats:
        """The letter-centred values."""
        return letter_centred(self.logprobs, self.answer)


def stacked(runs: Sequence[RunAnswers], name: str) -> Floats:
    """Returns one of the arrays of runs, [runs, n]."""
    return np.array([getattr(run, name) for run in runs])
