"""Which examples each process computes in each step.

The examples of a step depend on seed, epoch and the number of examples in a step alone, so any
number of processes trains on the same. Within a step they are dealt so that all processes have
nearly as many tokens, in each pass: a step takes as long as its slowest process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class StepBatches(Sampler[list[int]]):
    """The batches of all passes of all processes: process 0, 1, …, of the first pass, and so on.

    An epoch's last step has fewer examples. If that leaves a process without any, the epoch's first
    ones come again.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        passes: int,
        processes: int,
        by_length: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        """`passes` are those of a step, --grad-accum; `epoch` is called when an epoch begins."""
        self._lengths, self._batch_size = list(lengths), batch_size
        self._passes, self._processes = passes, processes
        self._by_length, self._seed, self._epoch = by_length, seed, epoch

    @property
    def _step(self) -> int:
        return self._batch_size * self._passes * self._processes

    def __len__(self) -> int:
        whole, rest = divmod(len(self._lengths), self._step)
        passes = whole * self._passes + -(-rest // (self._batch_size * self._processes))
        return passes * self._processes

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self._step):
            examples = order[start : start + self._step]
            passes = -(-len(examples) // (self._batch_size * self._processes))
            if self._processes == 1:
                yield from _split(examples, self._batch_size)
                continue
            while len(examples) < passes * self._processes:
                examples += order[: passes * self._processes - len(examples)]
            shares = deal(examples, self._lengths, self._processes)
            by_process = [deal(share, self._lengths, passes) for share in shares]
            for number in range(passes):
                yield from (parts[number] for parts in by_process)

    def _order(self) -> list[int]:
        """All examples in the order of this epoch."""
        generator, epoch = torch.Generator(), self._epoch()
        if not self._by_length:
            # As accelerate's sampler, which earlier versions used.
            generator.manual_seed(self._seed + epoch)
            random: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
            return random
        generator.manual_seed(self._seed + 1_000_003 * epoch)
        grouped: list[int] = get_length_grouped_indices(
            self._lengths, self._step, generator=generator
        )
        return grouped


def deal(examples: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deals examples into shares of equally many, or one more, and nearly as many tokens.

    From the longest down, an example goes to the share with the fewest tokens that has room.
    """
    least, more = divmod(len(examples), count)
    room = [least + (number < more) for number in range(count)]
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for example in sorted(examples, key=lengths.__getitem__, reverse=True):
        open_to = (number for number in range(count) if len(shares[number]) < room[number])
        number = min(open_to, key=tokens.__getitem__)
        shares[number].append(example)
        tokens[number] += lengths[example]
    return shares


def _split(examples: Sequence[int], size: int) -> Iterator[list[int]]:
    yield from (list(examples[start : start + size]) for start in range(0, len(examples), size))
