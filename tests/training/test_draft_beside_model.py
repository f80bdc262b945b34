"""A draft that is trained beside its model: the model is that of ordinary finetuning, and generation finds it."""

import inspect
import json
import logging
import shutil

import pytest
import torch
from helpers.configs import generate_config, hf_sections, start_section
from helpers.json_lines import change_json
from helpers.resuming import COSINE, final_weights, resumed, same_tensors
from helpers.tiny import VOCAB, make_tiny
from helpers.training import VALIDATION, losses, note_good_draft, read_log, set_up, train
from safetensors.torch import load_file, save_file
from torchtune import training

from layerskip_recipes import LLM
from layerskip_recipes.checkpoint.drafts import own_draft, read_description, read_draft
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import weights_hash
from layerskip_recipes.training.auto_settings import DRAFT_RATE, full_learning_rate
from layerskip_recipes.training.draft_loss import DraftLoss, DraftSection
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.model_setup import fresh_draft
from layerskip_recipes.training.resuming import find_checkpoint

KINDS = {"copy": {"kind": "copy", "exit_layer": 2}, "adapter": {"kind": "adapter", "exit_layer": 2, "vocabulary": 200}}
BESIDE = {kind: section | {"finetune_model": True} for kind, section in KINDS.items()}


@pytest.fixture
def beside_config(finetune, checkpoint):
    """A training of a model and of its draft, which starts from `checkpoint`."""

    def config(kind="copy", **changes):
        settings = {"draft": BESIDE[kind], "layer_dropout": None, "early_exit_loss": None, "clip_grad_norm": 0.5}
        return finetune(**{"checkpointer": start_section(checkpoint)} | settings | changes)

    return config


LORA = {"rank": 2, "alpha": 4, "attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True}


def with_adapters(checkpoint, **changes):
    sections = hf_sections(checkpoint)
    return sections | {"model": sections["model"] | {"lora": LORA | changes}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma2", "qwen2_tied"])
def test_model_and_draft_have_the_gradients_they_have_alone(family, kind, float64):
    """The sum of the losses; the gradients of the model are its own, and so are those of the draft."""
    model = layerskip_decoder(make_tiny(family))
    section = DraftSection.parse(BESIDE[kind])
    draft = section.build(model)
    draft.vocabulary = None if kind == "copy" else list(range(5, 90, 2))
    tokens, labels = torch.randint(VOCAB, (2, 9)), torch.randint(VOCAB, (2, 9))
    labels[0, :3] = -100
    counted = (labels != -100).flatten().nonzero()[:, 0]

    def gradients(loss):
        for part in (model, draft):
            part.zero_grad()
        loss.backward()
        return [{name: p.grad for name, p in part.named_parameters()} for part in (model, draft)]

    last = EarlyExitLoss(curriculum=None, exits=-1)
    both, by_exit = DraftLoss(section, draft, model_loss=last)(model, tokens, labels, counted=counted)
    of_model, of_draft = gradients(both)
    alone, _ = DraftLoss(section, draft)(model, tokens, labels, counted=counted)
    [_, expected] = gradients(alone)
    torch.testing.assert_close(of_draft, expected)
    logits = model(tokens).flatten(0, 1)
    ordinary = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    [expected, _] = gradients(ordinary)
    torch.testing.assert_close(of_model, expected)
    torch.testing.assert_close(both, ordinary + alone)
    assert by_exit == {model.num_layers: pytest.approx(ordinary.item())}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_that_of_ordinary_finetuning(kind, checkpoint, tmp_path, beside_config):
    """To the bit, also with a clipped gradient. The draft learns faster, and moves with the folder."""
    path = beside_config(kind, epochs=8, shuffle=False, dataset_val=VALIDATION, lr_scheduler=COSINE)
    recipe = train(path, "optimizer.lr=3e-3")
    train(path, "optimizer.lr=3e-3", "draft=null", f"output_dir={tmp_path / 'plain'}")
    trained = final_weights(tmp_path / "out" / "epoch_7")
    assert same_tensors(trained, final_weights(tmp_path / "plain" / "epoch_7"))
    assert not same_tensors(trained, load_file(checkpoint / "model.safetensors"))
    parts = (recipe.model, recipe.draft)
    assert recipe.cfg.checkpoint_bytes == 3 * 4 * sum(p.numel() for part in parts for p in part.parameters())
    rates = [group["initial_lr"] for group in recipe.optimizers.all[0].param_groups]
    assert rates == [3e-3, DRAFT_RATE * 3e-3]

    log, plain = read_log(tmp_path / "out"), read_log(tmp_path / "plain")
    assert log[16]["val_loss_final"] == plain[16]["val_loss_final"] < log[0]["val_loss_final"]
    assert log[16]["loss_final"] == pytest.approx(plain[16]["loss"]) and log[16]["loss"] > log[16]["loss_final"]
    of_draft = {step: log[step]["loss"] - log[step]["loss_final"] for step in (1, 16)}
    assert of_draft[16] < of_draft[1]

    moved = shutil.move(tmp_path / "out" / "epoch_7", tmp_path / "moved")
    described = read_description(own_draft(moved), "draft")
    assert (described.base.folder, described.kind, described.measured.on) == (str(moved), kind, "dataset_val")
    assert described.base.hash == weights_hash(recipe.model.state_dict())
    draft = read_draft(described, recipe.model, "draft")
    assert same_tensors(draft.state_dict(), recipe.draft.state_dict())
    assert json.loads((moved / "layerskip.json").read_text())["exits"] == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"), [("copy", {}), ("adapter", {"use_dora": True}), ("copy", {"quantize_base": True})]
)
def test_adapters_are_those_of_ordinary_finetuning_beside_a_draft(kind, changes, checkpoint, tmp_path, beside_config):
    """All weights of the draft are trained. It starts from the model's layers, and drafts for the merged model."""
    path = beside_config(kind, **with_adapters(checkpoint, **changes), epochs=4, shuffle=False)
    start = set_up(path)
    expected = fresh_draft(start.draft, LLM.load(str(checkpoint)).model.state_dict())
    assert same_tensors(start.draft.state_dict(), expected) and not any("lora" in name for name in expected)
    recipe = train(path, "optimizer.lr=3e-3")
    train(path, "optimizer.lr=3e-3", "draft=null", f"output_dir={tmp_path / 'plain'}")
    folders = [tmp_path / out / "epoch_3" for out in ("out", "plain")]
    assert same_tensors(*(torch.load(folder / "adapter_model.pt", weights_only=True) for folder in folders))
    assert same_tensors(*map(final_weights, folders))
    assert all(p.requires_grad and not torch.equal(p, expected[n]) for n, p in recipe.draft.named_parameters())
    rates = [group["initial_lr"] for group in recipe.optimizers.all[0].param_groups]
    width = recipe.model.tok_embeddings.embedding_dim
    assert rates == [3e-3, pytest.approx(3e-3 * DRAFT_RATE * full_learning_rate(width) / 3e-4)]

    llm = LLM.load(str(folders[0]))
    assert same_tensors(*(draft.state_dict() for draft in (*llm.state.trained_drafts.values(), recipe.draft)))
    plain = llm.generate("def main(", 12, draft=None)
    drafted = LLM.load(str(folders[0]), draft=str(folders[0])).generate("def main(", 12)
    assert drafted.tokens == plain.tokens and drafted.stats.drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False])
def test_a_second_run_trains_the_draft_further(beside, checkpoint, tmp_path, beside_config):
    """A draft of another form starts afresh, and so does one whose model was replaced, or that cannot be read."""
    path, first, second = beside_config(**hf_sections(checkpoint), epochs=4), tmp_path / "out", tmp_path / "second"
    train(path, "optimizer.lr=3e-3")
    again = [f"model.path={first}", f"checkpointer.path={first}", f"draft.finetune_model={str(beside).lower()}"]
    own = load_file(first / "epoch_3" / "draft" / "draft.safetensors")
    assert same_tensors(set_up(path, *again, f"output_dir={second}").draft.state_dict(), own)
    other = set_up(path, *again, f"output_dir={second}", "draft.exit_layer=1")
    file = first / "epoch_3" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    of_another_model = set_up(path, *again, f"output_dir={second}")
    (first / "epoch_3" / "draft" / "layerskip.json").write_text('{"format": 2}')
    for recipe in (other, of_another_model, set_up(path, *again, f"output_dir={second}")):
        assert same_tensors(recipe.draft.state_dict(), fresh_draft(recipe.draft, recipe.model.state_dict()))


def test_without_a_learning_rate_the_draft_learns_faster_too(beside_config):
    recipe = set_up(beside_config(), "~optimizer.lr")
    default = inspect.signature(torch.optim.AdamW).parameters["lr"].default
    assert [group["lr"] for group in recipe.optimizers.all[0].param_groups] == [default, DRAFT_RATE * default]


@pytest.mark.slow
@pytest.mark.parametrize("override", ["optimizer_in_bwd=true", "dtype=bf16", "enable_activation_checkpointing=true"])
def test_the_model_is_that_of_ordinary_finetuning_however_it_steps(override, tmp_path, beside_config):
    """The draft is trained in fp32 beside a model in bf16."""
    path = beside_config("adapter", clip_grad_norm=None)
    train(path, override, "optimizer.lr=3e-3")
    train(path, override, "optimizer.lr=0.0", f"output_dir={tmp_path / 'start'}")
    train(path, override, "optimizer.lr=3e-3", "draft=null", f"output_dir={tmp_path / 'plain'}")
    weights = (final_weights(out / "epoch_0") for out in (tmp_path / "out", tmp_path / "plain"))
    assert same_tensors(*weights)
    files = [tmp_path / out / "epoch_0" / "draft" / "draft.safetensors" for out in ("start", "out")]
    start, end = map(load_file, files)
    assert {value.dtype for value in end.values()} == {torch.float32}
    assert not any(torch.equal(end[name], value) for name, value in start.items())


@pytest.fixture
def promising(checkpoint, tmp_path, beside_config):
    """A run's checkpoint whose draft seems to pay, and a generation config for it."""
    train(beside_config(**hf_sections(checkpoint)), "optimizer.lr=3e-3")
    folder = tmp_path / "out" / "epoch_0"
    note_good_draft(folder / "draft")
    changes = hf_sections(folder) | {"self_speculation": {}, "output_dir": "unused"}
    return folder, generate_config(tmp_path, folder, **changes, benchmark={"compare": True})


@pytest.mark.slow
def test_generation_finds_the_draft(promising, caplog, monkeypatch):
    """It drafts if that should pay. A draft that does not fit the weights of another reader is left alone."""
    folder, path = promising
    own = str(folder / "draft")
    with caplog.at_level(logging.INFO):
        recipe = LayerSkipGenerate(load_config(str(path)))
    assert recipe.plan.draft.folder == own and "Drafts: trained draft, " in caplog.text
    recipe.setup()
    report = recipe.generate()
    assert report["drafted"] > 0 and report["identical"] is True
    llm = LLM.load(str(folder))
    plain = llm.generate("def main(", 8, draft=None).tokens
    assert llm.generate("def main(", 8, num_speculations=3).tokens == plain

    draft = read_draft(read_description(str(folder), "draft"), llm.model, "draft")
    assert same_tensors(draft.state_dict(), load_file(f"{own}/draft.safetensors"))

    # Its weights fit the model before it is quantised, and its text is that of the quantised model.
    int8 = "quantizer._component_=torchao.quantization.Int8WeightOnlyConfig"
    quantised = LayerSkipGenerate(load_config(str(path), [int8]))
    quantised.setup()
    report = quantised.generate()
    assert quantised.plan.draft.folder == own and report["drafted"] > 0 and report["identical"] is True

    # Who wants no draft gets none; a reason is given where it cannot be used.
    assert LayerSkipGenerate(load_config(str(path), ["self_speculation.draft=null"])).plan is None
    reader = {"checkpointer": "FullModelHFCheckpointer", "files": ["model.safetensors"], "model_type": "LLAMA3_2"}
    description = json.loads((folder / "draft" / "layerskip.json").read_text())
    change_json(folder / "draft" / "layerskip.json", base=description["base"] | reader)
    assert own_draft(folder) == own and not read_description(own, "draft").is_for(HFCheckpointer)
    assert not LLM.load(str(folder)).state.trained_drafts
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert LayerSkipGenerate(load_config(str(path))).plan is None
    assert f"No drafts: the draft in {own} was trained for weights that another checkpointer reads" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "adapters"), [(False, False), (True, True)])
def test_a_resumed_run_trains_model_and_draft_as_if_never_stopped(
    shards, adapters, checkpoint, tmp_path, beside_config
):
    sections = with_adapters(checkpoint) if adapters else {}
    saves = {"save_every_n_steps": 1, "enable_async_checkpointing": shards, "keep_last_n_checkpoints": 4}
    path = beside_config(**sections, epochs=2, lr_scheduler=COSINE, **saves)
    train(path)
    whole, end = losses(tmp_path / "out"), tmp_path / "out" / "epoch_1"
    for checkpoint, done in (("step_1", 1), ("epoch_0", 2)):
        again = resumed(path, checkpoint)
        assert losses(again) == {step: whole[step] for step in range(done + 1, 5)}
        assert same_tensors(final_weights(end), final_weights(again / "epoch_1"))
        drafts = [load_file(folder / "draft" / "draft.safetensors") for folder in (end, again / "epoch_1")]
        assert same_tensors(*drafts)


@pytest.mark.slow
def test_a_damaged_draft_makes_a_checkpoint_unusable(tmp_path, beside_config):
    train(beside_config(epochs=2))
    file = tmp_path / "out" / "epoch_1" / "draft" / "draft.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert find_checkpoint(tmp_path / "out") == tmp_path / "out" / "epoch_0"


def test_a_function_that_builds_a_checkpointer_is_refused(checkpoint, beside_config, monkeypatch):
    """Before the training: the checkpoint could not say how to read the model."""
    build = training.FullModelHFCheckpointer
    monkeypatch.setattr("helpers.configs.reader", lambda **arguments: build(**arguments), raising=False)
    with pytest.raises(ConfigError, match=r"^checkpointer\._component_: helpers\.configs\.reader "):
        train(beside_config(checkpointer=start_section(checkpoint) | {"_component_": "helpers.configs.reader"}))


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_a_loaded_model_has_the_settings_of_the_command(promising, compile):
    """Length, vocabulary, precision, where drafts end and look-ups, with the draft named to both."""
    folder, path = promising
    own = own_draft(folder)
    cfg = GenerateConfig.load(load_config(str(path), [f"self_speculation.draft={own}"]))
    llm = LLM.load(str(folder), draft=own)
    command, _ = DraftPlanner.of_config(cfg, None).plan(cfg.self_speculation, 0.0, compile)
    llm.generate("def main(", 20, compile=compile)
    (chosen,) = llm.chosen.values()
    assert chosen.plan == command
    (built,) = llm.state.drafts.values()
    int8 = any("Int8" in type(parameter).__name__ for parameter in built.decoder.parameters())
    assert int8 == command.draft_int8 == compile
