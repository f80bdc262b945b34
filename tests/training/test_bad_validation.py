"""Wrong settings of validation and checkpoints: one line, before weights are loaded or anything is written."""

from pathlib import Path

import pytest
from helpers.adapters import reader
from helpers.configs import finetune_config, make_checkpoint
from helpers.refusals import check
from helpers.training import VALIDATION
from torchtune.training import FullModelHFCheckpointer


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer_folder) -> Path:
    """A checkpoint whose exits differ."""
    return make_checkpoint(tmp_path_factory.mktemp("validation") / "start", tokenizer_folder)


@pytest.fixture
def path(start, tmp_path, tokenizer_folder, monkeypatch) -> Path:
    """A config with validation on a checkpoint whose weights must not be read."""

    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(tmp_path)
    return finetune_config(tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), dataset_val=VALIDATION)


NO_INTEGER = {"0": "0", "true": "True", "1.5": "1.5"}


BAD = [
    *(
        (f"{key}={value}", key, shown, f"an integer of 1 or more (or null); for example {key}=")
        for key in (
            "run_val_every_n_steps", "batch_size_val", "max_batches_val", "save_every_n_steps",
            "keep_last_n_checkpoints",
        )
        for value, shown in NO_INTEGER.items()
    ),
    *(
        (f"{key}=flase", key, "'flase'", "true, false")
        for key in ("enable_async_checkpointing", "save_adapter_weights_only")
    ),
    *(
        (f"val_loss_margin={value}", "val_loss_margin", shown, "a number of 0 or more; for example val_loss_margin=")
        for value, shown in {"-1": "-1", "5%": "'5%'", ".nan": "nan"}.items()
    ),
    *(
        (f"layers_val={value}", "layers_val", shown, "Allowed: indices 0..3 and slices")
        for value, shown in {"9": "9", "[]": "[]", "first": "'first'", "2:2": "2:2"}.items()
    ),
    ("dataset_val=null; layers_val=9", "layers_val", "9", "dataset_val"),
    ("dataset_val=3", "dataset_val", "3", "_component_"),
    ("dataset_val=[]", "dataset_val", "[]", "_component_"),
    ("dataset_val=heldout", "dataset_val._component_", "'heldout'", ""),
    ("dataset_val.sqlen=3", "dataset_val.sqlen", "no such argument", "Nearest: seq_len"),
    ("~dataset_val._component_", "dataset_val", "'heldout'", "_component_"),
    ("dataset_val=null; run_val_every_n_steps=3", "run_val_every_n_steps", "3", "dataset_val"),
    ("enable_async_checkpointing=true", "enable_async_checkpointing", "True", "save_every_n_steps"),
    ("run_val_every_n_step=3", "run_val_every_n_step", "unknown key", "Nearest: run_val_every_n_steps"),
    ("dataset_val.seq_len=0", "dataset_val", "0", "1 or more"),
    ("dataset_val.seq_len=1000", "dataset_val", "1000", "128"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "given", "allowed"), BAD)
def test_bad_input(overrides, key, given, allowed, path):
    """One ValueError with the key, the value and what works, before weights are loaded or anything is written."""
    check("finetune", path, overrides, key, given, allowed)
