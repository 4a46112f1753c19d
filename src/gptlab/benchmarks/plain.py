"""Prepares a corpus as nanoGPT does: datasets.map with tiktoken, and one file of tokens per split.

python -m gptlab.benchmarks.plain <corpus.jsonl> <folder> <val fraction> <processes>
"""

import json
import sys
from pathlib import Path

import numpy as np
import tiktoken
from datasets import load_dataset
from tiktoken_ext.openai_public import r50k_pat_str

from gptlab.data.tokenizers.gpt2_vocabulary import gpt2_merges

BATCHES = 1024  # number of chunks in which a file of tokens is written
END_OF_TEXT = 50256

# reads the same vocabulary files as gptlab, so that no network access is needed
encoding = tiktoken.Encoding(
    "gpt2", pat_str=r50k_pat_str, mergeable_ranks=gpt2_merges(None), special_tokens={"<|endoftext|>": END_OF_TEXT}
)


def tokenize(example: dict[str, str]) -> dict[str, object]:
    """Returns the token IDs of a document, followed by the end-of-text token."""
    ids = [*encoding.encode_ordinary(example["text"]), END_OF_TEXT]
    return {"ids": ids, "len": len(ids)}


def main(corpus: str, folder: str, val_fraction: float, processes: int) -> None:
    """Prepares a corpus and prints the number of tokens of each split as JSON."""
    rows = load_dataset("json", data_files=corpus, split="train", cache_dir=f"{folder}/cache")
    splits = rows.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")
    tokenized = splits.map(tokenize, remove_columns=["text"], num_proc=processes)
    tokens = {}
    for split, documents in tokenized.items():
        tokens[split] = int(np.sum(documents["len"], dtype=np.uint64))
        path = Path(folder, f"{split}.bin")
        file = np.memmap(path, dtype=np.uint16, mode="w+", shape=(tokens[split],))
        batches, written = min(BATCHES, len(documents)), 0
        for number in range(batches):
            batch = documents.shard(num_shards=batches, index=number, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            file[written : written + len(ids)] = ids
            written += len(ids)
        file.flush()
    print(json.dumps(tokens))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
