"""What prepared data holds: counts, documents, hashes, and the batch of any step."""

import numpy as np

from gptlab.data.batch_size_schedule import BatchSizeSchedule
from gptlab.data.order import WindowOrder
from gptlab.data.shards.manifest import Split
from gptlab.data.shards.streams import TokenStream
from gptlab.data.shards.token_dataset import TokenDataset

MAX_PREFIX_BYTES = 2**22  # tokens looked at for the first documents
CHUNK = 2**18  # tokens looked at at a time; more of them would not stay in the processor's cache


def longest_document(stream: TokenStream, end_of_text: int | None) -> int:
    """Tokens of the longest document, its end of text not counted; all of them where there is no end of text."""
    if end_of_text is None:
        return len(stream)
    longest, begin, start = 0, 0, 0
    for tokens in stream.chunks(CHUNK):
        ends = start + np.flatnonzero(tokens == end_of_text)
        if len(ends):
            longest = max(longest, int(np.diff(ends, prepend=begin - 1).max()) - 1)
            begin = int(ends[-1]) + 1
        start += len(tokens)
    return max(longest, len(stream) - begin)


def first_documents(prepared: TokenDataset, split: Split, documents: int, tokens: int) -> list[str]:
    """Decode the beginnings of the first documents of a split, from at most so many tokens of each."""
    stream = prepared.stream(split)
    ids = stream.read([0], min(len(stream), MAX_PREFIX_BYTES))[0]
    end = prepared.tokenizer.end_of_text
    cuts = [] if end is None else np.flatnonzero(ids == end).tolist()
    begins = [0, *(cut + 1 for cut in cuts)]
    texts = [ids[begin:stop] for begin, stop in zip(begins, [*cuts, len(ids)], strict=True)]
    return [prepared.tokenizer.decode(text[:tokens].tolist()) for text in texts if len(text)][:documents]


def batch_texts(
    prepared: TokenDataset, order: WindowOrder, step: int, stages: BatchSizeSchedule
) -> list[tuple[int, str]]:
    """Decode the windows of step ``step`` (counted from 1, as in metrics.csv), each with its first token."""
    stream = prepared.stream("train")
    starts = order.starts(np.arange(stages.first(step - 1), stages.first(step), dtype=np.int64))
    rows = stream.read(starts, order.block_size + 1)
    return [(int(start), prepared.tokenizer.decode(row.tolist())) for start, row in zip(starts, rows, strict=True)]
