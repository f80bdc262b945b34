"""Decoding with a trained draft: the text is the model's, and the draft reads all of the text with its own layers."""

import json
import re
import shutil

import pytest
import torch
from helpers.compiled import SHORT, compiles, make_small
from helpers.configs import benchmark_config, generate_config, make_checkpoint
from helpers.decoding import make_model, model_of
from helpers.recipes import ready, run_generate
from helpers.speculation import (
    KINDS,
    PROMPTS,
    AlwaysLookUp,
    PlainBetween,
    draft_of,
    drafting,
    noisy,
    plain,
    run,
    search,
)

from layerskip_recipes.benchmark.recipe import LayerSkipBenchmark
from layerskip_recipes.checkpoint.drafts import describe, read_description, write_draft
from layerskip_recipes.checkpoint.weights import load_decoder, quantise_decoder
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.draft_weights import DraftHead
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.model.draft import Draft, weights_hash
from layerskip_recipes.model.head import capped


def said_by_draft(model, draft, tokens, count):
    """The draft's most likely tokens after a text, without a cache.

    An adapter reads x_E of a token beside the state of the token before: the model's within the text, its own behind.
    """
    tokens = list(tokens)
    states = torch.zeros(1, 1, model.tok_embeddings.embedding_dim)
    with torch.no_grad():
        if draft.kind == "adapter":  # the last token of a text is the root, which the model has not read
            read = model(torch.tensor([tokens[:-1]]), unembed=False)
            states = torch.cat([states, model.norm(read)], 1)
        for _ in range(count):
            x = model.tok_embeddings(torch.tensor([tokens]))
            if draft.kind == "adapter":
                x = torch.cat([model(torch.tensor([tokens]), exit_layer=draft.exit_layer, unembed=False), states], -1)
            h = draft(x)[:, -1:]
            tokens.append(capped(model.output(h), model.logit_cap)[0, -1].argmax().item())
            states = torch.cat([states, h], 1)
    return tokens[-count:]


def with_draft(exit_layer, num_speculations, draft, model):
    draft_weights = (draft.decoder(model), None)
    return {"speculation": Speculation(exit_layer, num_speculations), "draft_weights": draft_weights}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [AlwaysLookUp, PlainBetween])
@pytest.mark.parametrize("variant", ["chain", "look-up"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_draft_reads_all_of_the_text(kind, variant, rule):
    """Each drafted token is the one that the draft says without a cache, also after drafts of others and none, and in
    rows that have taken another prompt."""
    model, prompts, seen, own = model_of("llama3_2"), PROMPTS[:4], [], 0

    def on_draft(drafts):
        for drafted, prompt in zip(drafts, generation.in_row, strict=True):
            if drafted and not generation.finished[prompt]:
                seen.append(([*prompts[prompt], *generation.generated[prompt]], drafted))

    arguments = {"rule": rule(), "on_draft": on_draft} | drafting(f"{kind}, {variant}", model)
    generation = Generation(model, prompts, 18, rows=2, **arguments)
    assert list(generation) and generation.generated == [plain(model, prompt, 18) for prompt in prompts]
    for text, drafted in seen:
        looked_up = search(text, 1, len(drafted))
        # A row without a match goes along with a look-up of another row.
        if variant == "chain" or drafted != looked_up + [0] * (len(drafted) - len(looked_up)):
            own += 1
            assert drafted == said_by_draft(model, draft_of(model, kind), text, len(drafted))
    assert own > 4


def test_a_long_text_is_read_in_parts(monkeypatch):
    """An adapter takes the state before a part from the part before."""
    monkeypatch.setattr("layerskip_recipes.generation.backends.CHUNK", 4)
    model = model_of("gemma2")
    draft, drafts, text = draft_of(model, "adapter"), [], list(range(3, 21))
    generation = run(model, [text], 9, on_draft=drafts.append, **with_draft(2, 4, draft, model))
    assert generation.generated == [plain(model, tuple(text), 9)]
    assert drafts[0] == [said_by_draft(model, draft, [*text, generation.generated[0][0]], 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_from_the_drafts_cache_too(kind):
    model, drafts = model_of("llama3_2"), []
    draft = draft_of(model, kind)
    way = with_draft(2, 4, draft, model)
    first = run(model, PROMPTS[2:3], 10, reserve=64, **way)
    text = [*PROMPTS[2], *first.generated[0], 7, 9]
    generation = run(model, [text], 12, cache=first.cache, on_draft=drafts.append, **way)
    # The last token of the answer was never an input, and the draft's layers may not have read the one before.
    assert generation.stats.reused_tokens in (len(text) - 4, len(text) - 3)
    assert generation.generated == [plain(model, tuple(text), 12)]
    if kind == "copy":  # the state before the first new token is gone, which an adapter would read
        assert drafts[0] == [said_by_draft(model, draft, [*text, generation.generated[0][0]], 4)]


@compiles
@pytest.mark.parametrize(("kind", "width"), [("copy", 32), ("adapter", 32), ("adapter", 16)])
def test_compiled_text_is_the_models(kind, width, traced):
    model, drafts = make_small(width=width), []
    draft = noisy(Draft(model, kind, 1))
    generation = run(model, SHORT, 12, compile=True, on_draft=drafts.append, **with_draft(1, 2, draft, model))
    assert generation.generated == [plain(model, prompt, 12) for prompt in SHORT]
    assert generation.stats.compile_s > 0
    said = said_by_draft(model, draft, [*SHORT[0], generation.generated[0][0]], 2)
    assert drafts[0][0] == said[: len(drafts[0][0])]


# ---- a draft's folder in configs ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder):
    """A model, and a draft of each kind for it."""
    folder = tmp_path_factory.mktemp("drafts")
    make_checkpoint(folder / "base", tokenizer_folder)
    cfg = GenerateConfig.load(load_config(str(generate_config(folder, folder / "base"))))
    model = load_decoder(cfg, torch.device("cpu"))
    base = {"folder": str(folder / "base"), "hash": weights_hash(model.state_dict())}
    for kind, shape in KINDS.items():
        draft = Draft(model, *shape)
        write_draft(folder / kind, draft.state_dict(), describe(draft, base, steps=3))
    return folder


INT8 = {"_component_": "torchao.quantization.Int8WeightOnlyConfig"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "of_draft", "of_model"),
    [
        ("copy", "fp32", False, None),
        ("copy", "fp32", True, INT8),
        ("adapter", "bf16", False, None),
        ("adapter", "fp32", True, None),
        ("adapter", "fp32", False, INT8),
    ],
    ids=["copy", "copy, int8", "adapter, bf16", "adapter, int8 draft", "adapter, int8 model"],
)
def test_the_text_with_a_trained_draft_is_the_one_without(kind, dtype, of_draft, of_model, folders, tmp_path):
    """The text is the one without drafts; the report has the draft's exit."""
    section = {"draft": str(folders / kind), "num_speculations": 3, "draft_int8": of_draft}
    changes = {"self_speculation": section, "quantizer": of_model, "dtype": dtype, "benchmark": {"compare": True}}
    _, report = run_generate(generate_config(tmp_path, folders / "base", **changes))
    assert report["exit_layer"] == 2 and report["num_speculations"] == 3
    assert report["identical"] is True and report["drafted"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_takes_the_memory_of_its_own_weights(kind, folders, tmp_path):
    """In fp32 its layers; quantised, beside them a byte for each weight of copies, and of the head if that drafts."""
    cfg = GenerateConfig.load(load_config(str(generate_config(tmp_path, folders / "base"))))
    model = load_decoder(cfg, torch.device("cpu"))
    own, head = 2 if kind == "copy" else 1, model.tok_embeddings.weight.numel()
    layers = sum(p.numel() for p in model.layers[:own].parameters())
    for changes, expected in (
        ({}, 4 * layers),
        ({"draft_int8": True}, 5 * layers + head),
        ({"draft_int8": True, "draft_vocabulary": [3, 5]}, 5 * layers + 4 * 2 * 32),
    ):
        draft = read_description(str(folders / kind), "draft")
        speculation = Speculation(draft.exit_layer, 2, draft=draft, **changes)
        assert speculation.draft_layers == own
        assert speculation.own_bytes(model, torch.float32) == expected


@pytest.mark.slow
def test_the_tuner_chooses_the_length_of_a_draft(folders, tmp_path, monkeypatch):
    """It writes the draft with the fastest length, here by times that favour the longest, and without look-ups, which
    are no faster. The draft's folder is relative to where the command was given."""
    monkeypatch.chdir(folders)
    section = {"draft": "adapter", "prompt_lookup": 3}
    user = generate_config(tmp_path / "user", folders / "base", self_speculation=None)
    path = benchmark_config(
        tmp_path, folders / "base", self_speculation=section, temperatures=[0.0], repeats=1, tune=True,
        tune_extends=str(user), max_new_tokens=12,
    )  # fmt: skip
    recipe = ready(LayerSkipBenchmark, path)
    tried = [plan for plan in recipe.methods.values() if plan]
    longest = max(tried, key=lambda speculation: speculation.num_speculations)
    assert len({one.num_speculations for one in tried}) >= 2 and all(one.draft.folder == "adapter" for one in tried)
    # Its rounds also run the model's layers below it, and verification goes on above them.
    assert all((plan.model_layers, plan.draft_layers) == (2, 1) for plan in tried)

    def timed(method, *args, decode=recipe.turns.decode):
        rows, stats = decode(method, *args)
        stats.decode_s = 20.0 if method is None else 13 - method.num_speculations
        return rows, stats

    monkeypatch.setattr(recipe.turns, "decode", timed)
    recipe.benchmark()
    cfg = GenerateConfig.load(load_config(str(tmp_path / "report" / "tuned.yaml")))
    expected = {"draft": str(folders / "adapter"), "num_speculations": longest.num_speculations, "prompt_lookup": None}
    expected |= {"answers": None}
    assert cfg.self_speculation == SelfSpeculation(**expected, draft_int8=False, min_confidence=longest.min_confidence)


def test_a_missing_damaged_or_foreign_draft_is_refused(folders, tmp_path, tokenizer_folder):
    """A folder without a draft, another model's draft, what does not go together: one line each."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)
    section = {"draft": str(folders / "copy"), "num_speculations": 3}
    name, base, copy = "self_speculation.draft", folders / "base", folders / "copy"
    for model, overrides, message in (
        (other, [], f"{name}: '{copy}' drafts for '{base}', whose weights are not"),
        (base, [f"{name}={tmp_path}"], f"{name}: '{tmp_path}' holds no draft"),
        (base, ["self_speculation.exit_layer=2"], "self_speculation.exit_layer: 2 is set, but draft has its own exit"),
    ):
        path = generate_config(tmp_path, model, self_speculation=section)
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}[^\n]*$"):
            run_generate(path, *overrides)
    shutil.copytree(copy, tmp_path / "damaged")
    (tmp_path / "damaged" / "layerskip.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^draft: '.*damaged' .*layerskip\.json"):
        read_description(str(tmp_path / "damaged"), "draft")
    shutil.copy(copy / "layerskip.json", tmp_path / "damaged")
    (tmp_path / "damaged" / "draft.safetensors").write_bytes((copy / "draft.safetensors").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"^self_speculation\.draft: '.*damaged/draft\.safetensors' "):
        run_generate(generate_config(tmp_path, base, self_speculation={"draft": str(tmp_path / "damaged")}))
    described = json.loads((copy / "layerskip.json").read_text())
    write_draft(tmp_path / "new", {"norm.scale": torch.ones(2)}, described | {"format": 1})
    with pytest.raises(ConfigError, match=r"format: 1 is not allowed\. Allowed: 3"):
        read_description(str(tmp_path / "new"), "draft")
    write_draft(tmp_path / "deep", {"norm.scale": torch.ones(2)}, described | {"exit_layer": 99})
    with pytest.raises(ConfigError, match=r"draft\.safetensors in '.*deep' .*layerskip\.json"):
        run_generate(generate_config(tmp_path, base, self_speculation={"draft": str(tmp_path / "deep")}))


@pytest.mark.parametrize(
    "quantizer",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationInt4WeightConfig"],
)
@pytest.mark.parametrize("family", ["llama3", "llama3_2"])
def test_a_draft_vocabulary_has_the_logits_of_a_quantised_head(family, quantizer):
    """Llama 3's head is a matrix of its own; Llama 3.2's is the embedding, of which quantising makes a copy."""
    component = Component({"_component_": f"torchao.quantization.{quantizer}"}, "quantizer")
    model = quantise_decoder(make_model(family), component)
    hidden, vocabulary = torch.randn(2, 3, model.tok_embeddings.embedding_dim), [3, 9, 4]
    with torch.no_grad():
        torch.testing.assert_close(DraftHead(model, vocabulary)(hidden), model.unembed(hidden)[..., sorted(vocabulary)])


def test_rows_that_torchao_cannot_take_are_unpacked():
    section = {"_component_": "torchao.quantization.IntxWeightOnlyConfig"}
    model = quantise_decoder(make_model("llama3"), Component(section, "quantizer"))
    with pytest.raises(NotImplementedError):
        model.output.weight[[3, 9]]
    hidden = torch.randn(2, 3, model.tok_embeddings.embedding_dim)
    with torch.no_grad():
        torch.testing.assert_close(DraftHead(model, [3, 9])(hidden), model.unembed(hidden)[..., [3, 9]])


def test_tensor_parallelism_refuses_settings_of_drafts():
    model = model_of("llama3_2")
    with pytest.raises(ConfigError, match=r"^self_speculation\.draft: .*tensor parallelism"):
        SelfSpeculation(draft="any").check_against(model, parallel=2)
    with pytest.raises(ConfigError, match=r"^self_speculation\.draft_vocabulary: .*tensor parallelism"):
        SelfSpeculation(exit_layer=1, draft_vocabulary=[1, 2]).check_against(model, parallel=2)
