"""A draft for a model that stays as it is: its loss against plain PyTorch, a run, its checkpoints, resume."""

import json
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.configs import start_section
from helpers.resuming import resumed, same_tensors
from helpers.speculation import run
from helpers.tiny import VOCAB, make_tiny
from helpers.training import VALIDATION, read_log, train
from safetensors.torch import load_file, save_file

from layerskip_recipes.acceptance import measuring
from layerskip_recipes.acceptance.trained_exits import LONGEST_DRAFT, read_trained_exits
from layerskip_recipes.checkpoint.drafts import read_description
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import Draft, weights_hash
from layerskip_recipes.model.head import capped
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.draft_loss import DraftLoss, DraftSection
from layerskip_recipes.training.model_setup import fresh_draft

SECTIONS = {kind: {"kind": kind, "exit_layer": 2} for kind in ("copy", "adapter")}


def plain_states(model, draft, tokens):
    """The logits of the draft (of an adapter for its first and second token in a row) and of the last layer."""
    x = model.tok_embeddings(tokens)
    states = [x]
    for layer in model.layers:
        states.append(layer(states[-1]))
    last = model.norm(states[-1])
    if draft.kind == "copy":
        drafted = [states[0]]
    else:
        first, eps = draft.layers[0], 1e-6
        drafted, before = [], last
        for _ in range(2):
            before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
            halves = [h * (h.pow(2).mean(-1, keepdim=True) + eps).rsqrt() for h in (states[draft.exit_layer], before)]
            drafted.append(first.layer(torch.cat(halves, -1) @ first.join.weight.T))
            before = draft.norm(drafted[-1])
    for layer in draft.layers if draft.kind == "copy" else ():
        drafted = [layer(h) for h in drafted]
    return [capped(model.output(h), model.logit_cap) for h in (*map(draft.norm, drafted), last)]


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("vocabulary", [None, range(5, 90, 2)], ids=["all", "some"])
@pytest.mark.parametrize("family", ["llama3_2", "gemma2", "qwen2_tied"])
def test_loss_and_gradients_are_those_of_plain_pytorch(family, vocabulary, kind, float64):
    """In chunks that do not divide the tokens, with labels that do not count, over some tokens."""
    model = layerskip_decoder(make_tiny(family)).requires_grad_(False)
    section = DraftSection.parse(SECTIONS[kind] | {"chunk_tokens": 5})
    draft = section.build(model)
    torch.manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokens, labels = torch.randint(VOCAB, (2, 9)), torch.randint(VOCAB, (2, 9))
    labels[0, :3] = -100
    counted = (labels != -100).flatten().nonzero()[:, 0]
    ids = draft.vocabulary = None if vocabulary is None else list(vocabulary)
    loss, _ = DraftLoss(section, draft)(model, tokens, labels, counted=counted)
    (3 * loss).backward()
    found = {name: parameter.grad for name, parameter in draft.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())

    draft.zero_grad()
    *drafted, last = plain_states(model, draft, tokens)
    ids = list(range(VOCAB)) if ids is None else ids
    last, expected = last.flatten(0, 1)[counted][:, ids], 0
    for logits in drafted:
        ours = logits.flatten(0, 1)[counted][:, ids]
        divergence = F.kl_div(ours.log_softmax(-1), last.log_softmax(-1), reduction="batchmean", log_target=True)
        expected = expected + divergence / len(drafted)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_hash_names_weights_and_not_their_dtype():
    model = make_tiny()
    state = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    assert weights_hash(state) == weights_hash({name: value.bfloat16() for name, value in state.items()})
    changed = dict(state)
    changed["norm.scale"] = state["norm.scale"] + 1
    assert weights_hash(changed) != weights_hash(state)


@pytest.fixture
def draft_config(finetune, checkpoint):
    """A training of a draft for the model of `checkpoint`."""

    def config(kind="copy", **changes):
        defaults = {"draft": SECTIONS[kind], "layer_dropout": None, "early_exit_loss": None}
        return finetune(**{"checkpointer": start_section(checkpoint)} | defaults | changes)

    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_run_trains_the_draft_alone(kind, checkpoint, tmp_path, draft_config, monkeypatch):
    monkeypatch.setattr(measuring, "ENOUGH_SAMPLES", 64)
    recipe = train(draft_config(kind, epochs=6, shuffle=False, dataset_val=VALIDATION), "optimizer.lr=1e-2")
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in recipe.model.parameters())
    trained = {id(parameter) for parameter in recipe.draft.parameters()}
    assert {id(p) for group in recipe.optimizers.all[0].param_groups for p in group["params"]} == trained

    folder = tmp_path / "out" / "epoch_5"
    files = ["draft.safetensors", "layerskip.json", "recipe_state.pt", "written"]
    assert sorted(file.name for file in folder.iterdir()) == files
    assert same_tensors(load_file(folder / "draft.safetensors"), recipe.draft.state_dict())
    described = json.loads((folder / "layerskip.json").read_text())
    reader = {"checkpointer": "FullModelHFCheckpointer", "files": ["model.safetensors"], "model_type": "LLAMA3_2"}
    base = {"folder": str(checkpoint), "hash": weights_hash(recipe.model.state_dict()), **reader}
    assert described.pop("measured")
    assert described == {
        "format": 3, "kind": kind, "exit_layer": 2,
        "steps": 12, "vocabulary": None, "base": base,
    }  # fmt: skip

    log, measured = read_log(tmp_path / "out"), read_trained_exits(folder).measured
    assert log[12]["loss"] < log[1]["loss"] and log[12]["val_loss_final"] == log[0]["val_loss_final"]
    assert 0 < log[12]["val_agreement_draft"] < 1 and log[12]["val_loss_draft"] != log[0]["val_loss_draft"]
    assert (measured.on, measured.exits, len(measured.draft.greedy)) == ("dataset_val", {}, LONGEST_DRAFT)
    assert measured.draft.greedy[5] - 1 == pytest.approx(log[12]["val_accepted_length_draft"], abs=1e-3)


@pytest.mark.slow
def test_validation_measures_a_draft_without_its_dropout(draft_config):
    recipe = train(draft_config(dataset_val=VALIDATION), "model.attn_dropout=0.9")
    one, two = (recipe.validation.measure(recipe.model, 2, recipe.draft) for _ in range(2))
    assert one == two and recipe.draft.training and not recipe.model.training


@pytest.mark.slow
def test_a_draft_vocabulary_is_the_most_frequent_tokens(tmp_path, draft_config):
    recipe = train(draft_config(draft=SECTIONS["adapter"] | {"vocabulary": 40}))
    folder, drafts = tmp_path / "out" / "epoch_0", []
    counts = Counter(token for sample in recipe.data.dataset for token in sample["tokens"])
    described = json.loads((folder / "layerskip.json").read_text())["vocabulary"]
    assert described == sorted(described) and len(set(described)) == 40
    assert min(counts[token] for token in described) >= max(counts[t] for t in counts if t not in described)
    draft = read_description(str(folder), "draft")
    assert (draft.exit_layer, draft.vocabulary) == (2, described)
    speculation = Speculation(2, 3, described, draft=draft)
    generation = run(recipe.model, [[1, 2, 3]], 12, speculation=speculation, on_draft=drafts.append)
    assert generation.generated == run(recipe.model, [[1, 2, 3]], 12).generated
    assert {token for (row,) in drafts for token in row} <= set(described)


@pytest.mark.slow
def test_resume_with_other_weights_of_the_model_is_refused(checkpoint, tmp_path, draft_config):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    path = draft_config(checkpointer=start_section(base), epochs=2)
    train(path)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint: .*model's weights"):
        resumed(path, "epoch_0")


def test_a_draft_is_a_part_of_the_model_at_first():
    model = layerskip_decoder(make_tiny())
    tokens = torch.randint(VOCAB, (2, 9))
    decoder = Draft(model, "copy", 2).decoder(model)
    assert torch.equal(decoder(tokens), model(tokens, exit_layer=2))


def test_an_adapter_is_the_next_layer_at_first():
    """On the sum of the states that it joins, each divided by its root mean square."""
    model = layerskip_decoder(make_tiny("qwen2_tied"))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    draft = Draft(model, "adapter", 1)
    draft.load_state_dict(fresh_draft(draft, model.state_dict()))
    x, y = torch.randn(2, 3, 5, model.norm.scale.shape[0])
    state = sum(h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() for h in (x, y))
    expected = model.norm(model.layers[1](state))
    torch.testing.assert_close(draft(torch.cat([x, y], -1)), expected)


def test_a_draft_whose_model_another_checkpointer_reads_is_refused(checkpoint, tmp_path, draft_config):
    """Its folder does not lead to a model for hf_decoder."""
    train(draft_config(checkpointer=start_section(checkpoint)))
    message = rf"^model_dir: '{tmp_path}/out/epoch_0' is a draft for a model that FullModelHFCheckpointer reads. "
    for cfg, config, own in ((GenerateConfig, "hf/generate", "prompt=x"), (FinetuneConfig, "hf/task", "device=cpu")):
        overrides = [f"model_dir={tmp_path}/out", own]
        with pytest.raises(ConfigError, match=message):
            cfg.load(load_config(config, overrides))
