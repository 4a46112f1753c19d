"""Training information in a model card, without paths of this machine."""

import pytest

from conftest import tiny_config
from gptlab.data.shards.manifest import Manifest
from gptlab.exporters.model_card import ModelCardInfo, model_title
from gptlab.pretrained.source import ModelSource
from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path, commit
from run_directories import rows_of, write_run


@pytest.mark.parametrize(("origin", "dataset"), [("/home/someone/secret/text.txt", "text.txt"), ("a/b, c", "a/b, c")])
def test_model_card_has_the_best_checkpoint_and_no_local_path(tmp_path, origin, dataset):
    rows = rows_of(20)
    steps = [row["step"] for row in rows]
    rows[steps.index(10) + 1]["val/loss"], rows[steps.index(5) + 1]["val/loss"] = 1.0, 0.5  # step 5 was not saved
    batch = ("train.global_batch_size=12", "model.block_size=64")
    run = write_run(tmp_path / "outputs" / "first" / "2026-11-25", *batch, rows=rows)
    for step, loss in ((10, 1.0), (20, 2.0)):
        unfinished = run / "checkpoints" / f"unfinished-{step}"
        unfinished.mkdir(parents=True)
        (unfinished / "state.pt").touch()
        facts = CheckpointMetadata(step=step, val_loss=loss, evaluation_due=False)
        commit(unfinished, checkpoint_path(run / "checkpoints", step), facts, {})
    splits = {"train": [], "val": []}
    about = {"format": 1, "tokenizer": {"name": "bytes"}, "vocab_size": 257, "dtype": "uint16", "splits": splits}
    Manifest(**about, origin=origin).save(run)
    source = ModelSource(str(run), run, tiny_config(block_size=64), None, None)
    assert model_title(source) == "first/2026-11-25"
    best = next(row for row in rows if row.get("val/loss") == 1.0)
    assert ModelCardInfo.of(source) == ModelCardInfo(dataset, 10, 10 * 768, 1.0, best["val/bits_per_byte"])


def test_title_of_an_external_model_is_its_name(tmp_path):
    for name, title in (("gpt2", "gpt2"), ("hf://someone/model", "model"), (str(tmp_path / "folder"), "folder")):
        source = ModelSource(name, tmp_path, tiny_config(), None, None)
        assert (model_title(source), ModelCardInfo.of(source)) == (title, ModelCardInfo())
