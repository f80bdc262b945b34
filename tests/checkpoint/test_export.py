"""`layerskip export`: what it writes opens in transformers and means what it should."""

import json
import shlex
import shutil
import sys

import pytest
import torch
from helpers.configs import hf_sections, make_checkpoint, start_section
from helpers.hf_folders import make_hf_folder
from helpers.json_lines import change_json
from helpers.training import VALIDATION, train
from safetensors.torch import load_file, save_file

from layerskip_recipes import Generation, Speculation, hf_decoder, layerskip_decoder
from layerskip_recipes.checkpoint.drafts import FORMAT
from layerskip_recipes.checkpoint.export import export, how_to_run
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.errors import ConfigError

transformers = pytest.importorskip("transformers")
load = transformers.AutoModelForCausalLM.from_pretrained
TOKENS = torch.arange(4, 20)[None]


@pytest.fixture
def checkpoint(tmp_path, tokenizer_folder):
    return make_checkpoint(tmp_path / "model", tokenizer_folder)


@pytest.fixture
def sharded(checkpoint):
    """The same weights in several files, as large models have them."""
    model = load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="40KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    return checkpoint


@pytest.mark.parametrize(("form", "draft"), [("checkpoint", 1), ("sharded", 2), ("checkpoint", 4)])
def test_a_draft_is_the_first_layers_with_norm_and_head(form, draft, tmp_path, request):
    whole = request.getfixturevalue(form)
    (whole / "layerskip.json").write_text('{"exits": [2, 4]}')
    out = export(str(whole), str(tmp_path / "draft"), draft=draft)
    model, full = load(out), load(whole)
    with torch.no_grad():
        hidden = full.model.embed_tokens(TOKENS)
        places = torch.arange(TOKENS.shape[1])[None]
        for layer in full.model.layers[:draft]:
            hidden = layer(hidden, position_embeddings=full.model.rotary_emb(hidden, places), attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected = full.lm_head(full.model.norm(hidden))
        # Without a mask attention is causal in both.
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.config.num_hidden_layers == draft and not (out / "layerskip.json").exists()
    files = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in files if any(f".layers.{layer}." in name for layer in range(draft, 4))]


@pytest.mark.parametrize("kind", ["gemma3", "granite", "granite4", "lfm2", "olmo2", "olmo3", "exaone4"])
def test_a_draft_of_a_family_says_what_its_exit_says(kind, tmp_path):
    make_hf_folder(kind, tmp_path / "model")
    model = layerskip_decoder(hf_decoder(str(tmp_path / "model"))).eval()
    model.load_state_dict(HFCheckpointer(str(tmp_path / "model")).load_checkpoint()["model"])
    draft = load(export(str(tmp_path / "model"), str(tmp_path / "draft"), draft=2))
    with torch.no_grad():
        torch.testing.assert_close(draft(TOKENS).logits, model(TOKENS, exit_layer=2), rtol=1e-3, atol=1e-3)


def test_an_exit_of_a_family_that_transformers_cannot_run_in_part_is_refused(tmp_path):
    make_hf_folder("lfm2", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--exit-layer: 2 .*Lfm2ForCausalLM.*--draft"):
        export(str(tmp_path / "model"), str(tmp_path / "out"), exit_layer=2)


@pytest.mark.parametrize("form", ["checkpoint", "sharded"])
def test_the_whole_model_carries_its_exit(form, tmp_path, request):
    whole = request.getfixturevalue(form)
    (whole / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    out = export(str(whole), str(tmp_path / "out"), exit_layer=2)
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings == {"temperature": 0.7, "do_sample": True, "assistant_early_exit": 2}
    ours, theirs = load(out).state_dict(), load(whole).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "tokenizer.json").read_text() == (whole / "tokenizer.json").read_text()


def test_an_end_token_ends_the_text_as_before(checkpoint, tmp_path):
    """transformers reads the token from config.json only where there is no generation_config.json."""
    assert not (checkpoint / "generation_config.json").exists()
    text = load(checkpoint).generate(TOKENS, max_new_tokens=12, do_sample=False)[0, TOKENS.shape[1] :].tolist()
    end = next(token for i, token in enumerate(text) if 2 <= i < 10 and token not in text[:i])
    change_json(checkpoint / "config.json", eos_token_id=end)
    out = load(export(str(checkpoint), str(tmp_path / "out"), exit_layer=2))
    ended = out.generate(TOKENS, max_new_tokens=12, do_sample=False)[0, TOKENS.shape[1] :].tolist()
    assert ended == text[: text.index(end) + 1]


def test_files_that_configs_name_come_along(checkpoint, tmp_path):
    """Llama's tokenizer for torchtune, and chat templates in a folder of their own."""
    for name in ("original/tokenizer.model", "additional_chat_templates/tool_use.jinja"):
        (checkpoint / name).parent.mkdir()
        (checkpoint / name).write_text(name)
    (checkpoint / "original" / "consolidated.00.pth").write_text("weights")
    out = export(str(checkpoint), str(tmp_path / "out"))
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and file.parent != out}
    assert files == {"original/tokenizer.model", "additional_chat_templates/tool_use.jinja"}


def test_an_index_of_other_weight_files_stays_behind(checkpoint, tmp_path):
    """It names files that neither an export nor a checkpoint has."""
    names = {f"{name}.index.json" for name in ("pytorch_model.bin", "consolidated.safetensors")}
    for name in names:
        (checkpoint / name).write_text(json.dumps({"weight_map": {"norm.weight": "absent"}}))
    checkpointer = HFCheckpointer(str(checkpoint), str(tmp_path / "run"))
    checkpointer.save_checkpoint(checkpointer.load_checkpoint())
    for folder in (export(str(checkpoint), str(tmp_path / "out")), tmp_path / "run" / "epoch_0"):
        assert (folder / "tokenizer.json").exists() and not names & {file.name for file in folder.iterdir()}


def test_without_a_number_the_trained_exit_is_taken(checkpoint, tmp_path):
    (checkpoint / "layerskip.json").write_text('{"exits": [2, 4]}')
    whole, first = (export(str(checkpoint), str(tmp_path / key), **{key: 0}) for key in ("exit_layer", "draft"))
    assert json.loads((whole / "generation_config.json").read_text())["assistant_early_exit"] == 2
    assert load(first).config.num_hidden_layers == 2


def test_the_lines_after_an_export_name_commands_for_it(checkpoint, tmp_path):
    model, out = str(checkpoint), tmp_path / "out"
    assert how_to_run(model, export(model, str(out))) == ""  # nothing to draft with
    exported = export(model, str(tmp_path / "exit"), exit_layer=2)
    said = how_to_run(model, exported, exit_layer=2)
    assert f"from_pretrained({str(exported)!r}, trust" in said and said.endswith(f" {exported}_draft --draft 2")
    *_, llama, _, vllm = how_to_run(model, tmp_path / "draft", draft=2).replace("\\\n", "").splitlines()
    assert "-m model.gguf -md draft.gguf" in llama and "--spec-draft-p-min 0.4" in llama
    *_, base, _, settings = shlex.split(vllm)
    assert base == model and json.loads(settings)["model"] == str(tmp_path / "draft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": 5}, r"--draft: 5 .*1 to 4"),
        ({"exit_layer": 4}, r"--exit-layer: 4 .*1 to 3"),
        ({"exit_layer": 1, "draft": 1}, "--exit-layer: 1 is for the whole model"),
        ({"exit_layer": 0}, "layerskip.json' names no early exit. .* 1 after --exit-layer"),
        ({"draft": 0}, "layerskip.json' names no early exit"),
        ({"out": "model"}, "'.*model' exists already"),
        ({"checkpoint": "nowhere"}, "^export: '.*nowhere' is no folder. "),
        ({"out": "model/config.json/out"}, "export: .*config.json' is in the way"),
    ],
)
def test_wrong_options_are_refused_and_write_nothing(options, message, checkpoint, tmp_path):
    paths = {"checkpoint": "model", "out": "out"} | {k: options.pop(k) for k in ("checkpoint", "out") if k in options}
    with pytest.raises(ValueError, match=message):
        export(*(str(tmp_path / paths[key]) for key in ("checkpoint", "out")), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "files", "message"),
    [
        ("weights.pt", {}, r"lacks model\.safetensors.*; there: weights.pt"),
        ("model.safetensors", {"tokenizer_config.json": "{"}, r"holds no readable tokenizer_config\.json"),
        ("model.safetensors", {"config.json": '{"n_layer": 2}'}, r"has no num_hidden_layers"),
    ],
)
def test_a_damaged_folder_is_refused_and_writes_nothing(weights, files, message, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / weights)
    for name, content in files.items():
        (checkpoint / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^export: '.*model.*' {message}"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_copy_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """So the same command works again, without being told that the folder exists."""

    def full(*_, **__):
        raise OSError("No space left on device")

    out = tmp_path / "exports" / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("layerskip_recipes.checkpoint.export.save_torch_state_dict", full)
        export(str(checkpoint), str(out))
    assert list(out.parent.iterdir()) == []
    assert load(export(str(checkpoint), str(out))).config.num_hidden_layers == 4
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torchtune", "hf"])
def test_a_trained_draft_is_a_model_of_its_own(form, checkpoint, tmp_path, finetune, monkeypatch):
    """Even if the config named the base from another folder. A base that has changed since is refused."""
    section = {"kind": "copy", "exit_layer": 2}
    changes = {"checkpointer": start_section(checkpoint), "layer_dropout": None, "early_exit_loss": None}
    if form == "hf":
        monkeypatch.chdir(checkpoint.parent)
        changes |= hf_sections(checkpoint.name)
    recipe = train(finetune(draft=section, **changes))
    folder = str(tmp_path / "out" / "epoch_0")
    monkeypatch.chdir(tmp_path)
    out = export(folder, str(tmp_path / "draft"), draft=0)
    model = load(out)
    assert model.config.num_hidden_layers == 2 and not (out / "custom_generate").exists()
    with torch.no_grad():
        expected = recipe.draft.decoder(recipe.model)(TOKENS)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    for arguments in ({"draft": 1}, {"exit_layer": 2}):
        with pytest.raises(ConfigError, match="a trained draft"):
            export(folder, str(tmp_path / "other"), **arguments)
    if form == "hf":  # without --draft: the model that it was trained for, and the draft beside it
        whole = export(folder, str(tmp_path / "whole"))
        assert load(whole).config.num_hidden_layers == 4
        kept = load_file(whole / "draft" / "model.safetensors")
        torch.testing.assert_close(kept["model.norm.weight"], model.model.norm.weight, rtol=0, atol=0)
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match="whose weights have changed since"):
        export(folder, str(tmp_path / "other"), draft=0)


@pytest.mark.slow
def test_a_draft_beside_its_model_is_exported_from_the_models_folder(checkpoint, tmp_path, finetune):
    """Of torchtune's checkpointer; that of a Hugging Face folder is in the next test."""
    changes = {"checkpointer": start_section(checkpoint), "layer_dropout": None, "early_exit_loss": None}
    recipe = train(finetune(draft={"kind": "copy", "exit_layer": 2, "finetune_model": True}, **changes))
    moved = shutil.move(tmp_path / "out" / "epoch_0", tmp_path / "moved")
    model = load(export(str(moved), str(tmp_path / "draft"), draft=0))
    with torch.no_grad():
        expected = recipe.draft.decoder(recipe.model)(TOKENS)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    assert load(export(str(moved), str(tmp_path / "whole"))).config.num_hidden_layers == 4
    with pytest.raises(ConfigError, match=r"^--exit-layer: "):
        export(str(moved), str(tmp_path / "other"), exit_layer=0)


def with_shared_direction(folder):
    """Hidden states with a large common part, as language models have them."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    scale = weights["model.embed_tokens.weight"].std()
    weights["model.embed_tokens.weight"] += 6 * scale * torch.linspace(-1, 1, weights["model.norm.weight"].numel())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] - weights["model.embed_tokens.weight"].mean(0)
    save_file(weights, file, metadata={"format": "pt"})
    change_json(folder / "config.json", tie_word_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shared"), [("llama", True), ("qwen3", False)])
def test_an_exported_draft_proposes_tokens_of_its_vocabulary_only(
    family, shared, tmp_path, finetune, caplog, monkeypatch
):
    """By transformers' assisted generation, which accepts as many of them as our engine; also if sampled, where hidden
    states share a direction."""
    base = tmp_path / "base"
    make_hf_folder(family, base, vocab_size=300, num_hidden_layers=4)
    if shared:
        with_shared_direction(base)
    section = {"kind": "copy", "exit_layer": 2, "vocabulary": 24, "finetune_model": True}
    recipe = train(
        finetune(
            draft=section, layer_dropout=None, early_exit_loss=None, dataset=VALIDATION | {"max_samples": 12},
            optimizer={"_component_": "torch.optim.AdamW", "lr": 3e-3}, max_steps_per_epoch=6,
            **hf_sections(base),
        )
    )  # fmt: skip
    folder, vocabulary = tmp_path / "out" / "epoch_0", recipe.draft.vocabulary
    model, draft = load(folder), load(export(str(folder), str(tmp_path / "draft"), draft=0))
    assert ("share no direction" in caplog.text) != shared
    with torch.no_grad():
        expected = recipe.draft.decoder(recipe.model.eval())(TOKENS)
        logits = draft(TOKENS).logits
    torch.testing.assert_close(logits[..., vocabulary], expected[..., vocabulary], atol=1e-4, rtol=1e-4)
    assert {*logits.argmax(-1).flatten().tolist()} <= {*vocabulary}
    assert not {*expected.argmax(-1).flatten().tolist()} <= {*vocabulary}
    if shared:
        assert logits.softmax(-1)[..., vocabulary].sum(-1).min() > 0.999

    # Drafts of four tokens in each round.
    for m in (model, draft):
        m.generation_config = transformers.GenerationConfig(pad_token_id=0, max_new_tokens=40)
    schedule = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}
    vars(draft.generation_config).update(schedule | {"assistant_confidence_threshold": 0.0})
    proposed, accepted = [], []

    class Counted(transformers.generation.AssistedCandidateGenerator):
        def get_candidates(self, input_ids, *args, **kwargs):
            found = super().get_candidates(input_ids, *args, **kwargs)
            proposed.extend(found[0][0, input_ids.shape[1] :].tolist())
            return found

        def update_candidate_strategy(self, input_ids, scores, num_matches):
            accepted.append(int(num_matches))

    prompt = TOKENS[:1, :5]
    mask = torch.ones_like(prompt)
    plain = model.generate(prompt, attention_mask=mask, do_sample=False)
    ours = Generation(
        recipe.model, prompt.tolist(), 40, speculation=Speculation(2, 4, vocabulary),
        draft_weights=(recipe.draft.decoder(recipe.model), None),
    )  # fmt: skip
    for _ in ours:
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.generation.utils.AssistedCandidateGenerator", Counted)
        assert model.generate(prompt, attention_mask=mask, assistant_model=draft, do_sample=False).equal(plain)
        rate = sum(accepted) / len(proposed)
        assert rate == pytest.approx(ours.stats.acceptance_rate, abs=0.1)
        if shared:
            torch.manual_seed(0)
            model.generate(prompt, attention_mask=mask, assistant_model=draft, do_sample=True)
    assert proposed and {*proposed} <= {*vocabulary}

    # The model itself, exported without options, drafts with the same copy in our decoding loop.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = export(str(folder), str(tmp_path / "exported"))
    whole = load(out, trust_remote_code=True)
    whole.generation_config = model.generation_config
    loop = sys.modules[whole.generate.func.__module__]
    learned, learn = [], loop.DraftLength.learn
    monkeypatch.setattr(loop.DraftLength, "next", lambda self: self.limit)
    monkeypatch.setattr(loop.DraftLength, "learn", lambda self, *a: (learned.append((a[0][0], a[1])), learn(self, *a)))
    settings = {"attention_mask": mask, "do_sample": False, "num_speculations": 4, "min_confidence": 0}
    assert whole.generate(prompt, **settings).equal(plain)
    accepted, drafted = (sum(x) for x in zip(*learned, strict=True))
    assert accepted / drafted == pytest.approx(ours.stats.acceptance_rate, abs=0.1)
    assert {file.name for file in (out / "draft").iterdir()} == {"draft.json", "model.safetensors"}


def test_an_adapter_is_no_model_of_its_own(tmp_path):
    (tmp_path / "draft.safetensors").touch()
    base = {"folder": "model", "hash": "0"}
    description = {"format": FORMAT, "kind": "adapter", "exit_layer": 1, "num_layers": 1, "base": base}
    (tmp_path / "layerskip.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="holds an adapter"):
        export(str(tmp_path), str(tmp_path / "other"), draft=0)
