"""Where the tokens of a padded batch lie in a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedbench.forward.attention import Bucket

SLACK = 0.15
"""A row joins a bucket if it is at most this share shorter than the bucket's longest."""
BLOCK = 64
"""Most tokens in a block of several rows."""
SHORT = 128
"""The longest row that goes into a block: for longer ones torch's kernel, which keeps no scores, is as fast."""
SEGMENT_SLACK = 0.5
"""The same where only attention pays for a bucket's padding, and every bucket costs calls."""
STEPS = 16
"""Numbers of tokens between one power of two and the next: a batch in blocks is filled up to one of them."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch [B, T] lie in the packed row [1, N].

    source: [N] index into the flattened padded batch. position: [N] place in its own row. real: [1, N] False for
    padding. first, last: packed place of each row's first and last token, in the batch's own order. sizes: positions
    of each client, whose rows lie together. blocks: whether its buckets are blocks. gather, scatter: [M] and
    [N], from the packed row to that of the buckets and back; None where the two are one.
    """

    source: Tensor
    position: Tensor
    real: Tensor
    first: Tensor
    last: Tensor
    buckets: tuple[Bucket, ...]
    sizes: tuple[int, ...]
    blocks: bool = False
    gather: Tensor | None = None
    scatter: Tensor | None = None

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """What a packed row holds of each token, [1, N, n], in the padded batch of that shape: [B, T, n]."""
        real = self.real[0]
        out = packed.new_zeros(shape.numel(), packed.shape[-1])
        return out.index_copy(0, self.source[real], packed[0][real]).unflatten(0, shape)

    @classmethod
    def of(cls, attention_mask: Tensor) -> Layout:
        """The layout of a right-padded batch, from its mask [B, T]; blocks are filled up to a common size."""
        lengths, width = attention_mask.sum(1).tolist(), attention_mask.shape[1]
        return cls.of_clients([lengths], width, attention_mask.device, fill=_filling(sum(lengths)))

    @classmethod
    def of_clients(cls, lengths: Sequence[Sequence[int]], width: int, device: torch.device, fill: int = 0) -> Layout:
        """The layout of a batch that holds the rows of one client after another, each client in buckets of its own.

        `lengths`: tokens of each row of each client. `width`: of the padded batch. Nothing but the padding inside
        buckets is added, which suits a device where time goes by tokens. In blocks on a CPU, where no row is long.
        `fill`: padding that the last block of each client gets, as one more row, which nobody reads.
        """
        sources, positions, reals, buckets, sizes = [], [], [], [], []
        first: list[int] = []
        last: list[int] = []
        blocks = device.type == "cpu" and max(map(max, lengths)) <= SHORT
        start = before = 0
        for own in lengths:
            places = [0] * len(own)
            begin = start
            groups = _filled(own, BLOCK) if blocks else _alike(own, SLACK)
            for rows in groups:
                row, tokens = torch.tensor(rows), torch.tensor([own[r] for r in rows])
                held = tokens if blocks else tokens[:1].expand(len(rows))  # the positions of each row
                offset = held.cumsum(0) - held
                place = torch.arange(int(held.sum())) - offset.repeat_interleave(held)
                real = place < tokens.repeat_interleave(held)
                source = (row + before).repeat_interleave(held) * width + place
                if blocks:
                    whose = row.repeat_interleave(held)
                    if rows is groups[-1] and fill:
                        source, place, real = (F.pad(x, (0, fill)) for x in (source, place, real))
                        whose = F.pad(whose, (0, fill), value=-1)
                    mask = torch.zeros(len(place), len(place)).masked_fill(whose[:, None] != whose, -torch.inf)
                    alone = len(rows) == 1 and len(place) == len(real.nonzero())
                    buckets.append(Bucket(start, 1, len(place), None if alone else mask[None, None], offset))
                else:
                    buckets.append(Bucket(start, len(rows), own[rows[0]], _padding([own[r] for r in rows], device)))
                sources.append(source)
                positions.append(place)
                reals.append(real)
                for r, o in zip(rows, offset.tolist(), strict=True):
                    places[r] = start + o
                start += len(place)
            before += len(own)
            first += places
            last += [place + n - 1 for place, n in zip(places, own, strict=True)]
            sizes.append(start - begin)
        return cls(
            torch.cat(sources).to(device),
            torch.cat(positions).to(device),
            torch.cat(reals)[None].to(device),
            torch.tensor(first, device=device),
            torch.tensor(last, device=device),
            tuple(buckets),
            tuple(sizes),
            blocks,
        )

    @classmethod
    def of_segments(cls, lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Layout:
        """The same in a segment of equal size for each client, with buckets over the rows of all clients.

        Every segment is as long as the longest client's tokens, and `first` holds as many rows for each client as the
        largest has. Few buckets and one batched product for all clients suit a device where time goes by calls.
        """
        size, most = max(map(sum, lengths)), max(map(len, lengths))
        source = torch.empty(len(lengths), size, dtype=torch.int64)
        position = torch.zeros(len(lengths), size, dtype=torch.int64)
        real = torch.zeros(len(lengths), size, dtype=torch.bool)
        first = torch.empty(len(lengths), most, dtype=torch.int64)
        final = torch.empty(len(lengths), most, dtype=torch.int64)
        starts: list[int] = []
        row = 0
        for c, own in enumerate(lengths):
            # Whatever fills up is the client's own: no value of one client, not even NaN, ever reaches another.
            source[c], first[c], final[c] = row * width, c * size, c * size
            place = 0
            for i, n in enumerate(own):
                source[c, place : place + n] = torch.arange(row * width, row * width + n)
                position[c, place : place + n] = torch.arange(n)
                first[c, i], final[c, i] = c * size + place, c * size + place + n - 1
                starts.append(c * size + place)
                place += n
                row += 1
            real[c, :place] = True
        every = [n for own in lengths for n in own]
        gathers, buckets, start = [], [], 0
        slots = torch.empty(len(every), dtype=torch.int64)
        scatter = torch.empty(len(lengths) * size, dtype=torch.int64)
        for rows in _alike(every, SEGMENT_SLACK):
            longest = every[rows[0]]
            place_of, mask = torch.arange(longest), _padding([every[row] for row in rows], device)
            last = torch.tensor([every[row] - 1 for row in rows])[:, None]
            gathers.append((torch.tensor([starts[row] for row in rows])[:, None] + place_of.minimum(last)).flatten())
            buckets.append(Bucket(start, len(rows), longest, mask))
            for i, row in enumerate(rows):
                slots[row] = start + i * longest
                scatter[starts[row] : starts[row] + every[row]] = torch.arange(every[row]) + slots[row]
            start += longest * len(rows)
        row = 0
        for c, own in enumerate(lengths):
            scatter[c * size + sum(own) : (c + 1) * size] = slots[row]
            row += len(own)
        return cls(
            source.flatten().to(device),
            position.flatten().to(device),
            real.view(1, -1).to(device),
            first.flatten().to(device),
            final.flatten().to(device),
            tuple(buckets),
            (size,) * len(lengths),
            gather=torch.cat(gathers).to(device),
            scatter=scatter.to(device),
        )


def _filling(tokens: int) -> int:
    """What `tokens` lack to the next of the sizes that batches are filled up to.

    oneDNN compiles a kernel for each number of tokens that it meets, and keeps it: so many numbers are few.
    """
    return -tokens % max(1, 2 ** (tokens.bit_length() - 1) // STEPS)


def _alike(lengths: Sequence[int], slack: float) -> list[list[int]]:
    """Rows in groups of like length, longest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[row] >= (1 - slack) * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _filled(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in groups of at most `most` tokens, or of one row: the longest first, each where it first fits."""
    groups: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for i, left in enumerate(free):
            if lengths[row] <= left:
                groups[i].append(row)
                free[i] -= lengths[row]
                break
        else:
            groups.append([row])
            free.append(most - lengths[row])
    return groups


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask of a bucket of rows side by side, the longest first."""
    if lengths[-1] == lengths[0]:
        return None
    return (torch.arange(lengths[0]) < torch.tensor(lengths)[:, None])[:, None, None].to(device)
