"""A draft for a model that stays as it is: its loss against plain PyTorch, a run, its checkpoints, resume."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.configs import MODEL, start_section
from helpers.resuming import keep_only, resumed, same_tensors
from helpers.speculation import run
from helpers.tiny import VOCAB, make_tiny
from helpers.training import VALIDATION, losses, read_log, train
from safetensors.torch import load_file, save_file

from layerskip_recipes.checkpoint.trained_exits import read_trained_exits
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.draft import Draft, weights_hash
from layerskip_recipes.model.head import capped
from layerskip_recipes.model.hf_folder import model_folder
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.draft.kept_states import KeptStates
from layerskip_recipes.training.draft.loss import DraftLoss, DraftSection
from layerskip_recipes.training.draft.own_text import OwnText
from layerskip_recipes.training.draft_statistics import DraftStatistics
from layerskip_recipes.training.model_setup import fresh_draft
from layerskip_recipes.training.parallel import Mesh
from layerskip_recipes.training.recipe import LayerSkipFinetune

SECTIONS = {
    "copy": {"kind": "copy", "exit_layer": 2},
    "adapter": {"kind": "adapter", "exit_layer": 2},
}


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


def same_tokens_as_plain_decoding(model, folder, **callbacks):
    """Whether greedy decoding with the draft of a checkpoint generates what the model generates; its settings."""
    section = SelfSpeculation(draft=str(folder), num_speculations=3).with_vocabulary(model, [[1, 2]])
    generation = run(model, [[1, 2, 3]], 12, speculation=section.build(model), **callbacks)
    assert generation.generated == run(model, [[1, 2, 3]], 12).generated
    return section


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_run_trains_the_draft_alone(kind, checkpoint, tmp_path, draft_config):
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
    assert (measured.on, measured.exits, len(measured.draft.greedy)) == ("dataset_val", {}, 8)
    assert measured.draft.greedy[5] - 1 == pytest.approx(log[12]["val_accepted_length_draft"], abs=1e-3)


def test_a_draft_beside_a_model_in_bf16_is_trained_in_fp32(tmp_path, draft_config):
    """Near 1, where an adapter begins, numbers in bf16 lie 78 steps of this learning rate apart."""
    recipe = train(draft_config("adapter", dtype="bf16", dataset_val=VALIDATION), "optimizer.lr=1e-4")
    assert next(recipe.model.parameters()).dtype is torch.bfloat16
    state = load_file(tmp_path / "out" / "epoch_0" / "draft.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    diagonal = state["layers.0.join.weight"].diagonal()
    assert ((diagonal - 1).abs() > 1e-6).float().mean() > 0.9 and (diagonal - 1).abs().max() < 1e-3
    same_tokens_as_plain_decoding(recipe.model, tmp_path / "out" / "epoch_0")


def test_validation_measures_a_draft_without_its_dropout(draft_config):
    recipe = train(draft_config(dataset_val=VALIDATION), "model.attn_dropout=0.9")
    one, two = (recipe.validation.measure(recipe.model, recipe.device, 2, recipe.draft) for _ in range(2))
    assert one == two and recipe.draft.training and not recipe.model.training


def test_a_draft_of_frequent_tokens(tmp_path, draft_config):
    """Those of the data; a generation drafts no others, and says what the model says."""
    recipe = train(draft_config(draft=SECTIONS["adapter"] | {"vocabulary": 40}))
    folder, drafts = tmp_path / "out" / "epoch_0", []
    counts = Counter(token for sample in recipe.data.dataset for token in sample["tokens"])
    described = json.loads((folder / "layerskip.json").read_text())["vocabulary"]
    assert described == sorted(described) and len(set(described)) == 40
    assert min(counts[token] for token in described) >= max(counts[t] for t in counts if t not in described)
    section = same_tokens_as_plain_decoding(recipe.model, folder, on_draft=drafts.append)
    assert (section.exit_layer, section.draft_vocabulary) == (2, described)
    assert {token for (row,) in drafts for token in row} <= set(described)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_resume_is_the_run_that_never_stopped(shards, tmp_path, draft_config):
    path = draft_config(epochs=2, save_every_n_steps=1, enable_async_checkpointing=shards, keep_last_n_checkpoints=4)
    train(path)
    whole, end = losses(tmp_path / "out"), load_file(tmp_path / "out" / "epoch_1" / "draft.safetensors")
    for checkpoint, done in (("step_1", 1), ("epoch_0", 2)):
        again = resumed(path, checkpoint)
        assert losses(again) == {step: whole[step] for step in range(done + 1, 5)}
        assert same_tensors(end, load_file(again / "epoch_1" / "draft.safetensors"))


def test_resume_goes_on_with_the_same_model(checkpoint, tmp_path, draft_config):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    path = draft_config(checkpointer=start_section(base), epochs=2)
    train(path)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"^resume_from_checkpoint: the hash of the model's weights was '.*' and is '.*' now"
    ):
        resumed(path, "epoch_0")


def test_own_text_fits_the_model_and_the_memory(tmp_path, tokenizer_folder, monkeypatch):
    """Texts begin with at most half of a sample, and are written a few at a time where memory is short."""
    model = make_tiny()
    texts = [
        {"tokens": [*range(1, 21)], "labels": [-100] * 16 + [17, 18, 19, 20]},
        {"tokens": [3] * 8, "labels": [3] * 8},
    ]
    data = SimpleNamespace(dataset=texts, num_samples=2, batch_size=2, seed=1, mesh=Mesh())
    written = []
    for name, memory in {"much": 2**40, "little": 1}.items():
        monkeypatch.setattr(
            "layerskip_recipes.training.draft.own_text.free_memory", lambda device, memory=memory: memory
        )
        section = DraftSection(exit_layer=1, own_text=1.0, own_text_temperature=0.0)
        own = OwnText(section, data, [], tmp_path / name, resumes=False)
        own.batch(0, layerskip_decoder(model))
        written.append(own.texts)
    assert {(text["prompt"], len(text["tokens"])) for text in own.texts} == {(10, 20), (2, 12)}
    assert written[0] == written[1]


def test_own_text_leaves_compiled_layers_alone(tmp_path):
    """Its growing masks would exhaust dynamo's recompilations, and training would then run eagerly."""
    model, compiled = layerskip_decoder(make_tiny()), []
    for layer in model.layers:
        layer.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    data = SimpleNamespace(
        dataset=[{"tokens": [3] * 8, "labels": [3] * 8}], num_samples=1, batch_size=2, seed=1, mesh=Mesh()
    )
    section = DraftSection(exit_layer=1, own_text=1.0)
    OwnText(section, data, [], tmp_path, resumes=False).batch(0, model)
    assert not compiled
    model(torch.tensor([[1, 2, 3]]))
    assert compiled


def test_own_text_is_the_models_and_kept(tmp_path, draft_config):
    """Every second batch is greedy text of the model after a quarter of a sample; a resumed run reads it again."""
    section = SECTIONS["copy"] | {"own_text": 0.5, "own_text_temperature": 0.0}
    path = draft_config(draft=section, epochs=2, save_every_n_steps=1)
    recipe, out = train(path), tmp_path / "out"
    lines = [json.loads(line) for line in (out / "own_text.jsonl").read_text().splitlines()]
    assert len(lines) == 64
    for line in lines[:2]:
        tokens, prompt = line["tokens"], line["prompt"]
        assert prompt == len(tokens) // 4
        with torch.no_grad():
            said = recipe.model(torch.tensor([tokens]))[0].argmax(-1).tolist()
        assert tokens[prompt:] == said[prompt - 1 : -1]
    batch = recipe.own_text.batch(1, recipe.model)
    assert batch["tokens"].tolist() == [line["tokens"] for line in lines[:2]]
    assert [row.index(next(t for t in row if t != -100)) for row in batch["labels"].tolist()] == [16, 16]
    assert recipe.own_text.batch(0, recipe.model) is None

    whole = losses(out)
    again = keep_only(out, "epoch_0", tmp_path / "again")
    (again / "own_text.jsonl").write_text((out / "own_text.jsonl").read_text()[:-9])  # as of a killed run
    train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert losses(again) == {step: whole[step] for step in (3, 4)}

    # It replaces whole micro-batches, so they must be as large as before.
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps was 1 and is 2 now"):
        train(path, "resume_from_checkpoint=true", "batch_size=1", "gradient_accumulation_steps=2")


def test_states_are_kept_by_text(tmp_path):
    """In bf16, and 0 behind the last counted label. Other batches and other padding find the same rows again."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9], [1, 2, 3, 4]])
    counted = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    packs = {"input_pos": torch.tensor([[0, 1, 0, 1]] * 3), "mask": "of the packs"}
    kept, calls = KeptStates(tmp_path / "new"), []

    def compute(rows):
        calls.append(rows)
        x = torch.stack([torch.stack([tokens[row] + i / 7 for i in range(4)], -1) for row in rows])
        return x, -x

    x, last = kept.states(tokens, counted, compute, packs)
    exact = torch.stack([tokens + i / 7 for i in range(4)], -1)
    there = torch.arange(4)[None, :, None] < torch.tensor([3, 2, 0])[:, None, None]
    torch.testing.assert_close(x, torch.where(there, exact, 0.0), rtol=2**-8, atol=0)
    torch.testing.assert_close(last, -x, rtol=0, atol=0)
    order = [1, 2, 0]
    wide, more, places = (F.pad(values[order], (0, 2)) for values in (tokens, counted, packs["input_pos"]))
    again, _ = kept.states(wide, more, compute, packs | {"input_pos": places})
    assert calls == [[0, 1, 2]] and torch.equal(again[:, :4], x[order])
    kept.states(tokens, counted, compute, packs | {"input_pos": torch.arange(4).expand(3, 4)})
    assert calls[1:] == [[0]]  # as one text, its tokens have other states
    with pytest.raises(ConfigError, match=r"^draft\.keep_states: True knows texts by tokens and positions"):
        kept.states(tokens, counted, compute, {"mask": "of somebody's own"})


@pytest.mark.parametrize("kind", SECTIONS)
def test_kept_states_spare_the_model_further_epochs(kind, tmp_path, draft_config, monkeypatch):
    """Later epochs run the draft only, and a resumed run computes the states anew. Losses differ by rounding."""
    path = draft_config(draft=SECTIONS[kind] | {"own_text": 0.5}, epochs=3, shuffle=True)
    train(path)
    plain = losses(tmp_path / "out")
    kept = tmp_path / "kept"
    rows = []
    monkeypatch.setattr(DraftStatistics, "measure", lambda *a, **k: None)  # which runs the model too
    forward = Draft.teacher_states
    monkeypatch.setattr(Draft, "teacher_states", lambda *a, **k: rows.append(len(a[2])) or forward(*a, **k))
    recipe = train(path, f"output_dir={kept}", "draft.keep_states=true")
    assert sum(rows) == len(recipe.loss.kept.places) <= recipe.data.num_samples + 2
    assert {step: pytest.approx(value, rel=2e-2) for step, value in losses(kept).items()} == plain
    names = [{file.name for file in folder.iterdir() if file.is_file()} for folder in (kept, tmp_path / "out")]
    assert names[0] == names[1]
    again = keep_only(kept, "epoch_1", tmp_path / "again")
    (again / "own_text.jsonl").write_text((kept / "own_text.jsonl").read_text())
    train(path, f"output_dir={again}", "draft.keep_states=true", "resume_from_checkpoint=true")
    whole = losses(kept)
    assert losses(again) == {step: pytest.approx(whole[step], rel=1e-4) for step in losses(again)}
    assert len(losses(again)) == len(whole) // 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("draft.exit_layer=4", "draft.exit_layer: 4 is not allowed. Allowed: an integer of 1 to 3; "),
        ("layer_dropout={prob: 0.1}", "layer_dropout: does not go with draft. "),
        (
            "loss={_component_: torch.nn.CrossEntropyLoss, label_smoothing: 0.1}",
            "loss.label_smoothing: 0.1 does nothing with draft, ",
        ),
        ("checkpointer.checkpoint_files=[]", "draft: copies layers of a trained model, and this one has no weights"),
        ("model.num_layers=1", "draft: needs a model of 2 layers or more, and this one has 1. Set draft=null"),
    ],
)
def test_mistakes(override, message, draft_config):
    with pytest.raises(ConfigError) as e:
        train(draft_config(), override)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_the_models_own_layer_dropout_is_refused_too(draft_config):
    model = {"_component_": "layerskip_recipes.layerskip_decoder", "base": MODEL, "layer_dropout": {"prob": 0.1}}
    with pytest.raises(ConfigError, match=r"^model\.layer_dropout: does not go with draft. "):
        train(draft_config(model=model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.keep_states=true"], "draft.keep_states: True works with one process. Set "),
        (["draft.own_text=0.5", "fsdp_cpu_offload=true"], "draft.own_text: does not go with fsdp_cpu_offload, "),
    ],
)
def test_settings_that_do_not_go_with_several_processes(overrides, message, draft_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    with pytest.raises(ConfigError) as e:
        LayerSkipFinetune(load_config(str(draft_config()), overrides))
    assert message in str(e.value)


def test_a_draft_is_found_beside_newer_shards(tmp_path):
    """Shards of a later epoch only serve to resume."""
    for time, name in enumerate(("epoch_0", "step_9"), start=1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "written").write_text(json.dumps({"time": time, "sizes": {}}))
        torch.save({}, tmp_path / name / "recipe_state.pt")
    save_file({}, tmp_path / "epoch_0" / "draft.safetensors")
    assert model_folder(str(tmp_path)) == tmp_path / "epoch_0"


def test_a_draft_is_a_part_of_the_model_at_first():
    model = layerskip_decoder(make_tiny())
    tokens = torch.randint(VOCAB, (2, 9))
    drafter = Draft(model, "copy", 2).decoder(model)
    assert torch.equal(drafter(tokens), model(tokens, exit_layer=2))


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


def test_a_draft_is_no_model(checkpoint, tmp_path, draft_config):
    """Its folder as that of a model: the message names its base."""
    train(draft_config(checkpointer=start_section(checkpoint)))
    message = rf"^model_dir: '{tmp_path}/out/epoch_0' holds a trained draft, .*model_dir={checkpoint}, "
    for cfg, config, own in ((GenerateConfig, "hf/generate", "prompt=x"), (FinetuneConfig, "hf/task", "device=cpu")):
        overrides = [f"model_dir={tmp_path}/out", own]
        with pytest.raises(ConfigError, match=message):
            cfg.load(load_config(config, overrides))
