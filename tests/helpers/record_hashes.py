"""Records bit-exact results of gptlab, to compare two commits after a refactoring.

    PYTHONPATH=<checkout>/src python tests/helpers/record_hashes.py <folder> [--only tiny,muon]
    python tests/helpers/record_hashes.py --compare <folder a>/hashes.json <folder b>/hashes.json

Trains, samples, evaluates, prepares and exports in <folder> with gptlab's commands. Writes <folder>/hashes.json, which
contains the trace, metrics, config and samples of every configuration, and hashes of prepared and exported files. This
takes about eight minutes on one CPU core. PYTHONPATH selects the commit, since this script imports nothing from gptlab.
Use the same Python environment and the same machine for both commits. The run directories remain in <folder>, so that
other commits can read them as well. With --only, other entries of an existing hashes.json are kept.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Columns and keys that contain times, memory, paths or versions
MEASURED = {"tokens_per_second", "data_wait", "peak_memory_gb", "mfu", "time", "seconds", "path", "gptlab"}
FINGERPRINT = re.compile(r"-[0-9a-f]{12}(?=/)")  # of a cache entry, from the path and time of its source
TIME = re.compile(rb"\d{4}-\d\d-\d\d[T_]\d\d[:-]\d\d[:-]\d\d([+-]\d{4})?")

SMALL = (
    *("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=6"),
    *("train.eval_every=3", "train.eval_windows=10", "schedule.warmup_steps=2", "callbacks.samples.max_new_tokens=40"),
)
TRACED = ("train.log_every=1", "callbacks=[default,trace]", "trainer.accelerator=cpu")
MODERN = (
    *("model=gpt2_modern", "tokenizer=bytes", "model.n_layer=4", "model.n_head=2", "model.n_embd=64"),
    *("model.block_size=32", "model.attention_window=16", "model.value_embeddings=1"),
    *("data.source=documents.jsonl", "data.column=text", "data.documents=masked"),
)
RUNS: dict[str, tuple[str, ...]] = {
    "tiny": SMALL,
    "default": ("train.max_steps=6", "train.eval_windows=10", "callbacks.samples.max_new_tokens=40"),
    "modern": (*SMALL, *MODERN),
    "muon": (*SMALL, "optimizer=muon"),
    "ddp": (*SMALL, "trainer=ddp", "trainer.devices=2"),
    "fsdp": (*SMALL, "trainer=fsdp", "trainer.devices=2"),
    "fsdp_tp": (*SMALL, "trainer=fsdp_tp", "trainer.devices=4"),
    "accumulation": (*SMALL, "train.micro_batch_size=3", "model.dropout=0.1"),
    "ema": (*SMALL, "train.ema_decay=0.9", "data.num_workers=1"),
    "lora": (*SMALL, "init_from=outputs/tiny/run", "lora=all", "optimizer=adamw_finetune", "optimizer.lr=0.01"),
    "chunked_loss": (*SMALL, "train.loss_chunk=64", "model.activation=gelu"),
    "batch_schedule": (*SMALL, "train.batch_schedule=[[2,4],[4,8]]", "data.order=block"),
    "activation_checkpointing": (*SMALL, "model.activation_checkpointing=true"),
    "compiled": (*SMALL, "train.compile=blocks"),
    "bfloat16": (*SMALL, "trainer.precision=bf16-mixed", "tokenizer=bpe", "tokenizer.vocab_size=300"),
    "resumed": (*SMALL, "train.max_steps=3", "schedule.decay_steps=6"),
}
SWEEP = (*SMALL, "seed=1,2", "optimizer.lr=1e-3,3e-3", "train.max_steps=4", "train.eval_every=2")
TEXTS = {  # arguments of gptlab.sample
    "tiny": ("run=outputs/tiny/run", "prompt=line", "num_samples=2", "top_k=null"),
    "filtered": (
        "run=outputs/tiny/run",
        "prompt=line",
        "top_k=50",
        "top_p=0.9",
        "min_p=0.001",
        "repetition_penalty=1.2",
    ),
    "modern": ("run=outputs/modern/run", "prompt=line", "top_k=null"),
    "ema": ("run=outputs/ema/run",),
    "lora": ("run=outputs/lora/run",),
    "fsdp": ("run=outputs/fsdp/run",),
}
EVALUATIONS = {
    "tiny": ("run=outputs/tiny/run", "stride=16"),
    "modern": ("run=outputs/modern/run",),
    "fsdp_tp": ("run=outputs/fsdp_tp/run",),
    "hf": ("run=exports/hf", "data=text", "data.source=text.txt", "tokenizer=bytes"),
}
CORPORA = {
    "characters": ("data=text", "data.source=text.txt", "tokenizer=characters"),
    "bytes": ("data=text", "data.source=documents.jsonl", "data.column=text", "tokenizer=bytes"),
    "bpe": (
        "data=text",
        "data.source=documents.jsonl",
        "data.column=text",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
    ),
    "gpt2": ("data=text", "data.source=text.txt", "tokenizer=gpt2", "data.task_bytes=20000", "prepare.workers=2"),
}
# The exported run by format; nanoGPT requires the exact GELU
EXPORTS = {"hf": "tiny", "nanogpt": "chunked_loss", "llmc": "tiny", "gguf": "tiny", "onnx": "tiny"}
OTHERS = ("sweep", "sample", "evaluate", "prepare", "export")
# Entries whose runs an entry reads; missing ones are recorded first
NEEDS = {
    "lora": {"tiny"},
    "export": {"tiny", "chunked_loss"},
    "sample": {"tiny", "modern", "ema", "lora", "fsdp"},
    "evaluate": {"tiny", "modern", "fsdp_tp", "export"},
}


class Recorder:
    """Runs commands in a directory and reads the files that they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "GPTLAB_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache" / "inductor"),
        }
        lines = (f"line {i}: the {['cat', 'dog', 'cow'][i % 3]} has {i * i % 97} of {i % 7}\n" for i in range(2000))
        texts = (f"{i}: the {['cat', 'dog'][i % 2]} has " + "a fish and " * (i % 5) for i in range(800))
        documents = (json.dumps({"text": text}) + "\n" for text in texts)
        for name, parts in {"text.txt": lines, "documents.jsonl": documents}.items():
            if not (path := self.folder / name).exists():  # its modification time is part of the cache key
                path.write_text("".join(parts))

    def record(self, name: str) -> Any:
        """Runs one entry and returns its record."""
        if name in RUNS:
            return self.train(name)
        return getattr(self, name)()

    def command(self, name: str, *arguments: str) -> str:
        """Runs a command of gptlab and returns its standard output; exits if the command fails."""
        done = subprocess.run(
            (sys.executable, "-m", f"gptlab.{name}", *arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{name} {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def train(self, name: str) -> dict[str, Any]:
        """Trains outputs/<name>/run."""
        run = self.empty(f"outputs/{name}") / "run"
        self.command("train", *RUNS[name], *TRACED, f"name={name}")
        (made,) = run.parent.iterdir()
        made.rename(run)  # a name without the time, since later files may contain it
        if name == "resumed":
            self.command("train", f"resume={run}", "train.max_steps=6")
        return self.read_run(run)

    def sweep(self) -> dict[str, Any]:
        """Trains a sweep of 2 x 2 trials."""
        directory = self.empty("outputs/sweep") / "run"
        where = f"hydra.sweep.dir={directory.relative_to(self.folder)}"
        self.command("train", "-m", *SWEEP, *TRACED, "name=sweep", where)
        return {f"trial {number}": self.read_run(directory / str(number)) for number in range(4)}

    def sample(self) -> dict[str, str]:
        """Samples at temperature 1."""
        same = ("temperature=1", "seed=7", "max_new_tokens=60")
        return {name: self.command("sample", *arguments, *same) for name, arguments in TEXTS.items()}

    def evaluate(self) -> dict[str, Any]:
        """Scores models on the val split."""
        results = {}
        for name, arguments in EVALUATIONS.items():
            out = self.empty(f"evaluations/{name}")
            self.command("evaluate", *arguments, f"out={out}")
            (file,) = out.glob("*.json")
            results[name] = self.masked({k: v for k, v in json.loads(file.read_text()).items() if k not in MEASURED})
        return results

    def prepare(self) -> dict[str, Any]:
        """Prepares corpora, and converts one for nanoGPT."""
        results = {}
        for name, arguments in CORPORA.items():
            cache = self.empty(f"prepared/{name}")
            self.command("prepare", *arguments, f"data.cache_dir={cache}")
            results[name] = self.read_files(cache)
        (shards,) = (path for path in (self.folder / "prepared" / "gpt2").glob("text-*") if path.is_dir())
        for target in ("nanogpt", "llmc"):
            out = self.empty(f"converted/{target}")
            out.rmdir()
            self.command("prepare", f"convert={shards}", f"format={target}", f"out={out}")
            results[f"as {target}"] = self.read_files(out)
        return results

    def export(self) -> dict[str, Any]:
        """Exports runs in every format."""
        results = {}
        for target, run in EXPORTS.items():
            out = self.empty(f"exports/{target}")
            out.rmdir()
            self.command("export", f"run=outputs/{run}/run", f"format={target}", f"out=exports/{target}")
            results[target] = self.read_files(out)
        return results

    def read_run(self, run: Path) -> dict[str, Any]:
        """Returns the trace, metrics and file hashes of a run directory."""
        with (run / "metrics.csv").open(newline="") as file:
            metrics = [{key: row[key] for key in row if key not in MEASURED} for row in csv.DictReader(file)]
        return {
            "trace": [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()],
            "metrics": metrics,
            "config": self.hash_of(run / "config.yaml"),
            "manifest": self.hash_of(run / "manifest.json"),
            "samples": {path.name: self.hash_of(path) for path in sorted(run.glob("samples/*.txt"))},
            "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        }

    def read_files(self, folder: Path) -> dict[str, str]:
        """Returns the hashes of the files below a directory, except for internal files of the cache."""
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
        return {
            FINGERPRINT.sub("", path.relative_to(folder).as_posix()): self.hash_of(path)
            for path in paths
            if path.parent.name != "verified"
        }

    def hash_of(self, path: Path) -> str:
        """Returns the SHA-256 of a file, with times and the directory masked."""
        data = path.read_bytes().replace(str(self.folder).encode(), b"FOLDER")
        return hashlib.sha256(TIME.sub(b"TIME", data)).hexdigest()[:16]

    def masked(self, value: Any) -> Any:
        """Returns JSON with the directory masked."""
        return json.loads(json.dumps(value).replace(str(self.folder), "FOLDER"))

    def empty(self, name: str) -> Path:
        """Creates an empty directory of this name, and removes an existing one."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def record(folder: Path, only: list[str]) -> None:
    """Records the named entries, or all, and those that they need; writes hashes.json after each."""
    entries = (*RUNS, *OTHERS)
    if unknown := set(only) - set(entries):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}. Valid entries: {', '.join(entries)}.")
    recorder, file = Recorder(folder), folder / "hashes.json"
    hashes = json.loads(file.read_text()) if only and file.exists() else {}
    pending = list(reversed(only or ["prepare", *RUNS, "sweep", "sample", "export", "evaluate"]))
    done = set()
    while pending:
        name = pending[-1]
        if missing := sorted(NEEDS.get(name, set()) - hashes.keys()):
            pending += missing
            continue
        pending.pop()
        if name in done:
            continue
        start = time.monotonic()
        hashes[name] = recorder.record(name)
        done.add(name)
        file.write_text(json.dumps(hashes, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Yields the keys at which two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{place} > {key}" if place else key)
            else:
                yield f"{place} > {key}: only in the {'first' if key in a else 'second'}"
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from differences(left, right, f"{place} [{number}]")
    elif a != b:
        yield f"{place}: {str(a)[:60]!r} != {str(b)[:60]!r}"


def compare(first: Path, second: Path, shown: int = 5) -> bool:
    """Prints for each entry whether two records are equal, and otherwise the first differences."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    equal = True
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            found = [f"only in the {'first' if name in a else 'second'}"]
        else:
            found = list(differences(a[name], b[name]))
        equal &= not found
        print(f"{name}: {f'{len(found)} differences' if found else 'equal'}")
        for line in found[:shown]:
            print(f"  {line}")
    return equal


def main() -> None:
    """Records results, or compares two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="entries to record, separated by commas")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    options = parser.parse_args()
    if options.compare:
        sys.exit(not compare(*options.compare))
    if options.folder is None:
        parser.error("a folder or --compare is required")
    record(options.folder, [name for name in options.only.split(",") if name])


if __name__ == "__main__":
    main()
