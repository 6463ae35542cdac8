"""What log-probabilities of choices say, question by question.

`logprobs` are in nats, [n, choices], NaN where a question has no such choice; `shares` are the
probabilities of the choices among each other, [n, choices], 0 there; `answer` is the place of the
right choice, [n].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Places = NDArray[np.integer]

_BINS = 15  # of the calibration error, of equal width (Guo et al. 2017)
_SMALLEST = 1e-300  # floor under probabilities, so that logarithms stay finite


def probabilities(logprobs: Floats) -> Floats:
    """Returns the shares, [n, choices]."""
    found: Floats = softmax(np.where(np.isnan(logprobs), -np.inf, logprobs), axis=1)
    return found


def nll_of(shares: Floats, answer: Places) -> Floats:
    """Returns the negative log-probability of the right choice, nats, [n]."""
    found: Floats = -np.log(np.maximum(shares[np.arange(len(shares)), answer], _SMALLEST))
    return found


def brier_of(shares: Floats, answer: Places) -> Floats:
    """Returns the sum over choices of (probability - 1 or 0)², [n]."""
    right = np.zeros_like(shares)
    right[np.arange(len(shares)), answer] = 1
    found: Floats = ((shares - right) ** 2).sum(axis=1)
    return found


def divergence(reference: Floats, other: Floats) -> float:
    """Returns the mean KL(reference ‖ other) of the shares of two runs, nats."""
    ratio = np.log(np.maximum(reference, _SMALLEST)) - np.log(np.maximum(other, _SMALLEST))
    return float((reference * ratio).sum(axis=1).mean())


def calibration_error(shares: Floats, answer: Places) -> float:
    """Returns the expected calibration error over 15 bins of equal width."""
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == answer
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(shares))


def best_choices(logprobs: Floats) -> Floats:
    """Returns 1 for the best choice and 0 for others; k tied best have 1/k each, [n, choices]."""
    tied = logprobs == np.nanmax(logprobs, axis=1, keepdims=True)
    found: Floats = tied / tied.sum(axis=1, keepdims=True)
    return found


def letter_centred(logprobs: Floats, answer: Places) -> Floats:
    """Returns values, [n], whose mean is the accuracy without a preference for letters.

    Each letter's log-probability is taken less its mean over the questions, and the accuracy of
    the best choices then less what their own mix of letters scores: 0 without knowledge. The
    values are the estimate's linearisation, so they can be paired as others are. All questions
    must have the same choices.
    """
    chosen = best_choices(logprobs - logprobs.mean(axis=0))
    chosen_share = chosen.mean(axis=0)
    right_share = np.bincount(answer, minlength=chosen.shape[1]) / len(answer)
    credit = chosen[np.arange(len(answer)), answer]
    found: Floats = (
        credit - chosen @ right_share - chosen_share[answer] + chosen_share @ right_share
    )
    return found
