"""What layerskip.json says of the data and of the drafts: counted and measured in training, which changes nothing."""

from collections import Counter

import pytest
import torch
from helpers.configs import finetune_config, make_checkpoint, start_section
from helpers.ranks import train_on_ranks
from helpers.resuming import keep_only
from helpers.training import VALIDATION, losses, texts, train

from layerskip_recipes.acceptance import measuring
from layerskip_recipes.acceptance.exit_quality import exit_quality
from layerskip_recipes.acceptance.trained_exits import LONGEST_DRAFT, read_trained_exits
from layerskip_recipes.model.head import Head
from layerskip_recipes.training import description, validation
from layerskip_recipes.training.early_exit import EarlyExitLoss

EXITS = {"curriculum": None, "exits": "1,2,3", "scale": 1.0, "scale_fn": "uniform"}


def label_counts(recipe, steps) -> Counter:
    """The label tokens of the first steps."""
    samples = [recipe.data.dataset[i] for step in range(steps) for i in recipe.data.samples(step)]
    return Counter(int(t) for sample in samples for t in sample["labels"][1:] if t != -100)


def in_order(vocabulary, counts) -> bool:
    """The tokens of the counts, the most frequent first, and of equal ones the smaller id."""
    return vocabulary == sorted(counts, key=lambda token: (-counts[token], token))


@pytest.mark.slow
def test_a_run_without_validation_measures_its_first_batches(tmp_path, tokenizer_folder, monkeypatch):
    """As test_exit_quality.py checks it, of single samples; the losses are those of a run that measures nothing."""
    monkeypatch.setattr(measuring, "DRAFT_VOCABULARIES", (4, 64, 512))
    monkeypatch.setattr(measuring, "ENOUGH_SAMPLES", 4)
    path = finetune_config(
        tmp_path, tokenizer_folder, early_exit_loss=EXITS, dataset=VALIDATION | {"max_samples": 12},
        max_steps_per_epoch=6, shuffle=True, save_every_n_steps=2,
    )  # fmt: skip
    recipe = train(path)
    found = read_trained_exits(tmp_path / "out" / "epoch_0")
    assert found.exits == [1, 2, 3, 4] and in_order(found.vocabulary, label_counts(recipe, 6))
    measured = found.measured
    assert measured.on == "training"
    assert set(measured.exits) == {1, 2, 3} and set(measured.exits[2]) == {"all", "4", "64"}
    early = read_trained_exits(tmp_path / "out" / "step_2")
    assert in_order(early.vocabulary, label_counts(recipe, 2)) and early.measured != measured

    samples = [recipe.data.dataset[i] for step in (0, 1) for i in recipe.data.samples(step)]
    batches = [{key: torch.tensor([sample[key]]) for key in ("tokens", "labels")} for sample in samples]
    options = {"num_speculations": LONGEST_DRAFT, "vocabulary": found.vocabulary, "sizes": [64]}
    expected = exit_quality(recipe.model.eval(), batches, [2, 4], torch.device("cpu"), **options)[2]
    assert measured.labels == expected.labels
    for kind in ("greedy", "sampled"):
        rates = expected.tokens_per_round["64"][kind]
        assert getattr(measured.exits[2]["64"], kind) == pytest.approx(rates, abs=2e-4)

    whole = losses(tmp_path / "out")
    again = keep_only(tmp_path / "out", "step_4", tmp_path / "again")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert losses(again) == {step: whole[step] for step in (5, 6)}
    resumed = read_trained_exits(again / "epoch_0")
    assert (resumed.vocabulary, resumed.measured) == (found.vocabulary, found.measured)
    monkeypatch.setattr(description, "measured_acceptance", lambda *a, **k: None)
    train(path, f"output_dir={tmp_path}/unmeasured")
    assert losses(tmp_path / "unmeasured") == whole
    assert read_trained_exits(tmp_path / "unmeasured" / "epoch_0").measured is None


def test_a_checkpoint_is_saved_where_measuring_it_needs_too_much_memory(tmp_path, tokenizer_folder, monkeypatch):
    """An epoch must not be lost for a measurement."""
    warnings = []

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation, "exit_quality", fails)
    monkeypatch.setattr(description.log, "warning", lambda text, *_, **__: warnings.append(text))
    train(finetune_config(tmp_path, tokenizer_folder, early_exit_loss=EXITS))
    found = read_trained_exits(tmp_path / "out" / "epoch_0")
    assert found.exits == [1, 2, 3, 4] and found.measured is None
    (warning,) = (text for text in map(str, warnings) if text.startswith("layerskip.json:"))
    assert "memory" in warning


@pytest.mark.slow
def test_a_save_measures_few_tokens_at_a_time(tmp_path, tokenizer_folder, monkeypatch):
    """At most as many as the config's chunk; above 512 tokens the logits would take gigabytes."""
    sizes, call = [], Head.__call__

    def counted(self, x):
        sizes.append(len(x))
        return call(self, x)

    monkeypatch.setattr(Head, "__call__", counted)
    train(finetune_config(tmp_path, tokenizer_folder, early_exit_loss=EXITS | {"chunk_tokens": 50}))
    assert max(sizes) == 50


@pytest.fixture
def head_rows_of_micro_batches(monkeypatch):
    """The `head_rows` with which the loss is called, one for each micro-batch."""
    calls, call = [], EarlyExitLoss.__call__

    def recorded(self, *args, head_rows=None, **options):
        calls.append(head_rows if head_rows is None else head_rows.clone())
        return call(self, *args, head_rows=head_rows, **options)

    monkeypatch.setattr(EarlyExitLoss, "__call__", recorded)
    return calls


def test_early_exits_change_the_heads_rows_of_labels_of_earlier_steps(
    tmp_path, tokenizer_folder, head_rows_of_micro_batches
):
    """All micro-batches of a step have the same rows."""
    recipe = train(
        finetune_config(
            tmp_path, tokenizer_folder, early_exit_loss=EXITS, dataset=VALIDATION | {"max_samples": 12},
            max_steps_per_epoch=3, gradient_accumulation_steps=2, shuffle=True,
        )
    )  # fmt: skip
    assert len(head_rows_of_micro_batches) == 6 and set(head_rows_of_micro_batches[-1].tolist()) == {0.0, 1.0}
    for part, rows in enumerate(head_rows_of_micro_batches):
        assert rows.nonzero()[:, 0].tolist() == sorted(label_counts(recipe, part // 2))


@pytest.mark.slow
def test_early_exits_change_all_rows_of_the_head_without_label_rows_only(
    tmp_path, tokenizer_folder, head_rows_of_micro_batches
):
    train(finetune_config(tmp_path, tokenizer_folder, early_exit_loss=EXITS | {"label_rows_only": False}))
    assert head_rows_of_micro_batches and not any(rows is not None for rows in head_rows_of_micro_batches)


@pytest.mark.slow
def test_a_run_without_early_exits_measures_nothing(tmp_path, tokenizer_folder):
    recipe = train(finetune_config(tmp_path, tokenizer_folder, early_exit_loss=None))
    found = read_trained_exits(tmp_path / "out" / "epoch_0")
    assert found.exits == [4] and found.measured is None and in_order(found.vocabulary, label_counts(recipe, 2))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_count_and_measure_what_one_does(tmp_path, tokenizer_folder):
    path = finetune_config(
        tmp_path, tokenizer_folder, early_exit_loss=EXITS, dataset=texts(tmp_path), max_steps_per_epoch=4,
        dataset_val=texts(tmp_path) | {"split": "train[:6]"}, layer_dropout=None,
        checkpointer=start_section(make_checkpoint(tmp_path / "base", tokenizer_folder)),
    )  # fmt: skip
    train(path, "batch_size=4", f"output_dir={tmp_path}/one")
    for name, more in {"two": [], "training": ["dataset_val=null"]}.items():
        train_on_ranks(path, "batch_size=2", f"output_dir={tmp_path}/{name}", *more)
    one, two, training = (read_trained_exits(tmp_path / name / "epoch_0") for name in ("one", "two", "training"))
    assert one.vocabulary == two.vocabulary == training.vocabulary
    assert (one.measured.on, training.measured.on) == ("dataset_val", "training")
    assert one.measured.labels == two.measured.labels and one.measured.exits.keys() == two.measured.exits.keys()
    for e, of_exit in one.measured.exits.items():
        assert two.measured.exits[e]["all"].greedy == pytest.approx(of_exit["all"].greedy, abs=1e-2)
        assert two.measured.exits[e]["all"].sampled == pytest.approx(of_exit["all"].sampled, abs=1e-3)
