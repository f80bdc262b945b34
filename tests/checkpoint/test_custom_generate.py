"""LayerSkip inside transformers' `generate`: the tokens, stops, processors and distributions of plain decoding."""

import copy
import functools
import itertools

import pytest
import torch
from helpers.hf_folders import DENSE_GRANITE4, MULTIPLIERS
from helpers.sampling import filtered, p_value
from helpers.tiny import slow_except

transformers = pytest.importorskip("transformers")
loop = pytest.importorskip("layerskip_recipes.custom_generate.generate")
NEW = 20
SYNTH_ID = transformers.SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=5)
FAMILIES = {
    "exaone4": {"sliding_window": 8},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3},
    "granite": MULTIPLIERS,
    "granitemoehybrid": DENSE_GRANITE4 | {"position_embedding_type": "rope"},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "smollm3": {},
}


@functools.cache
def tiny(family="llama", vocab_size=64, **settings):
    """Four layers; those above the first say little, so that some drafts stand and some do not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    tokens = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    settings = {"tie_word_embeddings": False} | FAMILIES[family] | settings
    config = transformers.AutoConfig.for_model(family, **sizes | heads | tokens | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weak = any(f"layers.{layer}." in name for layer in (1, 2, 3))
            torch.nn.init.normal_(weight, std=0.22 if weak else 0.4)
    # A copy of the first layers, a little different, that drafts five of six tokens.
    part = torch.nn.Module()
    part.layers, part.norm = copy.deepcopy(model.model.layers[:2]), copy.deepcopy(model.model.norm)
    for weight in part.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    vocabulary = [token for token in range(vocab_size) if token % 6]
    described = {"vocabulary": vocabulary, "num_speculations": 4, "min_confidence": 0.0}
    loop.COPIES[model] = described, part.requires_grad_(False)
    return model


def prompts(rows=3, vocab_size=64):
    """Left-padded prompts of 7, 4 and 1 tokens."""
    tokens = torch.randint(2, vocab_size - 1, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :3] = mask[2, :6] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0)[:rows], "attention_mask": mask[:rows]}


@pytest.fixture
def fixed_length(monkeypatch):
    """Each round drafts as many tokens as it may. Returns pairs of accepted and drafted tokens, one for a round."""
    rounds = []
    monkeypatch.setattr(loop.DraftLength, "next", lambda self: self.limit)
    monkeypatch.setattr(loop.DraftLength, "learn", lambda self, accepted, drafted: rounds.append((accepted, drafted)))
    return rounds


class Streamer:
    def __init__(self):
        self.columns, self.ended = [], False

    def put(self, tokens):
        assert not self.ended
        self.columns.append(tokens)

    def end(self):
        self.ended = True


EXITS = pytest.mark.parametrize("exit_layer", [2, None], ids=["exit", "copy"])


def both(model, inputs, exit_layer=2, num_speculations=4, min_confidence=None, **settings):
    """What plain decoding and LayerSkip return; no exit in the settings, so that plain decoding is plain.

    `exit_layer=None`: drafts from the model's copy.
    """
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    plain = model.generate(**inputs, **settings)
    exits = {"exit_layer": exit_layer, "num_speculations": num_speculations, "min_confidence": min_confidence}
    return plain, loop.generate(model=model, **inputs, **exits, **settings)


@pytest.mark.parametrize("family", slow_except(FAMILIES, "llama"))
def test_greedy_tokens_are_those_of_plain_decoding(family, fixed_length):
    assert tuple(FAMILIES) == loop.MODEL_TYPES
    for rows, exit_layer, num_speculations in ((1, 1, 5), (1, 3, 1), (3, 2, 1), (3, 3, 5), (1, None, 5), (3, None, 5)):
        plain, ours = both(tiny(family), prompts(rows), exit_layer, num_speculations)
        assert torch.equal(ours, plain), (rows, exit_layer, num_speculations)
    accepted, drafted = (sum(x) for x in zip(*((sum(a), d * len(a)) for a, d in fixed_length), strict=True))
    assert 0.05 * drafted < accepted < drafted


@pytest.mark.slow
@EXITS
@pytest.mark.parametrize("min_confidence", [0, 0.3, 0.9])
def test_the_draft_length_changes_no_token(exit_layer, min_confidence):
    """Also where the copy reads the tokens of several rounds at once, since it did not draft in them."""
    plain, ours = both(tiny(), prompts(), exit_layer, max_new_tokens=80, min_confidence=min_confidence)
    assert torch.equal(ours, plain)


def test_a_draft_ends_where_it_is_not_confident(fixed_length):
    both(tiny(), prompts(1), None, min_confidence=0.5)
    lengths = [drafted for _, drafted in fixed_length]
    assert {1} < {*lengths} and sum(a[0] for a, _ in fixed_length) > 0.6 * sum(lengths)


@pytest.mark.slow
@EXITS
@pytest.mark.parametrize("rows", [1, 3])
def test_it_stops_where_plain_decoding_stops(rows, exit_layer, fixed_length):
    plain = tiny().generate(**prompts(rows), max_new_tokens=NEW, do_sample=False)
    for end in plain[-1, [9, 12, 15]].tolist():
        stopped, ours = both(tiny(), prompts(rows), exit_layer, eos_token_id=end)
        assert torch.equal(ours, stopped)
    for length in (1, 2, 4, 7):
        stopped, ours = both(tiny(), prompts(rows), exit_layer, max_new_tokens=length)
        assert ours.shape[1] == 7 + length and torch.equal(ours, stopped)


class Even(transformers.StoppingCriteria):
    """Stops a row at its third even token behind the prompt."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 7:] % 2 == 0).sum(1) >= 3


def test_it_stops_at_stop_strings(tokenizer_folder, fixed_length):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    model, inputs = tiny(vocab_size=300), prompts(1, vocab_size=300)
    plain, _ = both(model, inputs)
    texts = [tokenizer.decode(token) for token in plain[0, 9:-2]]
    text = next(text for text in texts if text.isascii() and text.isprintable())
    stopped, ours = both(model, inputs, stop_strings=[text], tokenizer=tokenizer)
    assert stopped.shape[1] < plain.shape[1] and torch.equal(ours, stopped)


@EXITS
def test_token_healing_decodes_the_prompts_last_token_again(exit_layer, tokenizer_folder, monkeypatch):
    """The last token of the prompt is decoded again, by the model's own `generate`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, pad_token="!", bos_token="~")
    model = copy.copy(tiny(vocab_size=300))
    loop.COPIES[model] = loop.COPIES[tiny(vocab_size=300)]
    ours = functools.partial(loop.generate, model=model, exit_layer=exit_layer)
    prompt = tokenizer(["for s"], return_tensors="pt")
    settings = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": tokenizer}
    unhealed = model.generate(**prompt, **settings)
    plain = model.generate(**prompt, **settings, token_healing=True)
    assert not torch.equal(plain, unhealed)
    model.generate = ours  # as `from_pretrained` with `trust_remote_code` does
    calls = []
    monkeypatch.setattr(loop, "decode", lambda *args, decode=loop.decode, **kw: calls.append(1) or decode(*args, **kw))
    assert torch.equal(model.generate(**prompt, **settings, token_healing=True), plain) and len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit_layer", "settings"),
    [
        (None, {"repetition_penalty": 1.5}),
        (2, {"no_repeat_ngram_size": 2}),
        (None, {"min_new_tokens": 9, "eos_token_id": list(range(1, 40))}),
        (2, {"watermarking_config": transformers.WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")}),
        (None, {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": list(range(1, 20))}),
        (2, {"sequence_bias": [[[5], 3.0], [[6, 7], 9.0]], "bad_words_ids": [[9], [10, 11]]}),
        (2, {"guidance_scale": 1.0, "suppress_tokens": [8, 9, 12]}),
        (2, {"prefix_allowed_tokens_fn": lambda row, tokens: list(range(2 + row, 64, 1 + len(tokens) % 3))}),
        (None, {"prefix_allowed_tokens_fn": lambda row, tokens: [6, 12, 18]}),  # the copy drafts none of them
        *((exit_layer, {"stopping_criteria": [Even()], "eos_token_id": 63}) for exit_layer in (2, None)),
        *((exit_layer, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}) for exit_layer in (2, None)),
    ],
)
def test_processors_and_criteria_see_the_tokens_before_each_position(settings, exit_layer, fixed_length):
    plain, ours = both(tiny(), prompts(), exit_layer, **settings)
    assert torch.equal(ours, plain)
    without, _ = both(tiny(), prompts())
    assert ours.shape != without.shape or not torch.equal(ours, without)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_each_token_once(rows, fixed_length):
    for end in (None, int(both(tiny(), prompts(rows))[0][0, 14])):
        plain, ours = Streamer(), Streamer()
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end}
        tiny().generate(**prompts(rows), **settings, streamer=plain)
        loop.generate(model=tiny(), **prompts(rows), **settings, exit_layer=2, streamer=ours)
        assert ours.ended and len(ours.columns) == len(plain.columns)
        assert all(torch.equal(a, b) for a, b in zip(ours.columns, plain.columns, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("end", [None, 14])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@EXITS
def test_the_cache_in_a_dictionary_goes_on(exit_layer, family, end, fixed_length):
    """A conversation goes on from the cache, also after a stop in the middle of a draft, and behind the window."""
    model, inputs = tiny(family), prompts(1)
    settings = {"eos_token_id": None if end is None else int(both(model, inputs)[0][0, end])}
    plain, ours = both(model, inputs, exit_layer, return_dict_in_generate=True, **settings)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.cache.get_seq_length() == plain.cache.get_seq_length() == ours.sequences.shape[1] - 1
    tokens = torch.cat([ours.sequences, torch.tensor([[5, 6]])], 1)
    further = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW}
    expected = model.generate(**further, do_sample=False)
    assert torch.equal(loop.generate(model=model, **further, exit_layer=exit_layer, cache=ours.cache), expected)


@pytest.mark.slow
@EXITS
def test_embedded_prompts_give_the_tokens_of_plain_decoding(exit_layer, fixed_length):
    model, inputs = tiny(), prompts()
    embedded = {"inputs_embeds": model.model.embed_tokens(inputs["input_ids"])} | {
        "attention_mask": inputs["attention_mask"]
    }
    plain, ours = both(model, embedded, exit_layer)
    assert torch.equal(ours, plain)
    begun, _ = (both(model, prompts(1), return_dict_in_generate=True) for _ in range(2))
    caches = [copy.deepcopy(begun[0].cache) for _ in range(2)]
    tokens = torch.cat([begun[0].sequences[:, -1:], torch.tensor([[5, 6]])], 1)
    further = {"input_ids": tokens, "attention_mask": torch.ones(1, caches[0].get_seq_length() + 3).long()}
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**further, **settings, cache=caches[0])
    ours = loop.generate(model=model, **further, **settings, exit_layer=exit_layer, cache=caches[1])
    assert torch.equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}])
@EXITS
def test_sampling_has_the_distribution_of_plain_sampling(exit_layer, filters, fixed_length):
    """All texts of three tokens, against their probabilities by the model's logits, filtered with Python lists."""
    v, draws, model = 7, 6000, tiny(vocab_size=7)
    prompt = torch.tensor([[2, 5, 3]])
    texts = torch.tensor(list(itertools.product(range(v), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, 2:5]
    keep = {"temperature": 1.0} | filters
    chances = torch.tensor([[filtered(at, **keep) for at in row] for row in logits.tolist()], dtype=torch.double)
    expected = chances.gather(2, texts[..., None])[..., 0].prod(1)
    torch.manual_seed(0)
    settings = {"do_sample": True, "max_new_tokens": 3, "num_return_sequences": draws, "top_k": 0, "eos_token_id": None}
    exits = {"exit_layer": exit_layer and 1, "num_speculations": 2}
    out = loop.generate(prompt, model=model, **exits, **settings | filters)[:, 3:]
    drawn = (out * torch.tensor([v * v, v, 1])).sum(1)
    assert p_value(drawn, expected) > 1e-3
    accepted = torch.tensor(fixed_length[0][0], dtype=torch.float)
    assert 0.1 < (accepted > 0).float().mean() < 0.95


def test_the_settings_stay_as_they_were():
    model = tiny("qwen3")
    config = transformers.GenerationConfig(assistant_early_exit=2, max_new_tokens=5)
    expected = model.generate(**prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(loop.generate(model=model, **prompts(), generation_config=config), expected)
    assert config.assistant_early_exit == 2
    model.generation_config.assistant_early_exit = 3
    assert torch.equal(loop.generate(model=model, **prompts(), max_new_tokens=5), expected)
    assert model.generation_config.assistant_early_exit == 3
    model.generation_config.assistant_early_exit = None


def draft_lengths(length, count, right):
    """The lengths of `count` rounds, whose drafts are all right or all wrong."""
    lengths = []
    for _ in range(count):
        lengths.append(length.next())
        length.learn([lengths[-1] if right else 0], lengths[-1])
    return lengths


def test_the_draft_length_follows_acceptance():
    costly = draft_lengths(loop.DraftLength(limit=6, draft_cost=0.5, rows_cost=0.5), 20, right=True)
    assert costly[0] == 1 and costly[-1] == 6
    length = loop.DraftLength(limit=6, draft_cost=0.2, rows_cost=0.5)
    assert draft_lengths(length, 50, right=True)[-1] == 6
    lengths = draft_lengths(length, 160, right=False)
    *_, last, first, second, third = [number for number, drafted in enumerate(lengths) if drafted]
    assert lengths[first] == lengths[second] == lengths[third] == 1
    assert [first - last, second - first, third - second] == [16, 32, 64]


@pytest.mark.parametrize("draft_cost", [0.1, 0.2, 0.37])
def test_few_rounds_of_bad_drafts_end_them(draft_cost):
    """They cost 5% of a short answer of 48 tokens at most, even if a verification costs half a step more."""
    lengths = draft_lengths(loop.DraftLength(6, draft_cost, rows_cost=0.5), 48, right=False)
    assert 0 < sum(0.5 + drafted * draft_cost for drafted in lengths if drafted) <= 0.05 * 48 + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": 4}, "exit_layer: 4 is not one of 1 to 3"),
        ({"num_speculations": 0}, "num_speculations: 0"),
        ({"num_beams": 2}, "beam_search is not supported"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores is not supported"),
        ({"cache_implementation": "static"}, "needs a DynamicCache"),
        ({"stop_strings": ["a"]}, "stop_strings: needs"),
        ({"guidance_scale": 1.5}, "guidance_scale is not supported, its processor keeps a state"),
        ({"watermarking_config": SYNTH_ID, "do_sample": True}, "a SynthID watermark is not supported"),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loop.generate(model=tiny(), **prompts(), **{"exit_layer": 2, "max_new_tokens": 2} | settings)


def test_texts_do_not_reach_the_length_at_which_positions_change():
    config = copy.deepcopy(tiny("phi3").config)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0} | factors
    config.original_max_position_embeddings = 10
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="longrope positions change after 10 tokens"):
        loop.generate(model=model, **prompts(), exit_layer=2, max_new_tokens=4)
    loop.generate(model=model, **prompts(), exit_layer=2, max_new_tokens=3)


@pytest.mark.slow
def test_drafts_never_reach_the_limit_of_dynamic_positions(fixed_length):
    """One position beyond the limit would change the frequencies of all rows: neither drafts of the longer rows that
    are cut nor rows that have stopped reach it."""
    model = copy.deepcopy(tiny(max_position_embeddings=20))
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    tokens = torch.randint(2, 63, (8, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for stop in (None, *range(2, 20)):
        plain, ours = both(model, inputs, max_new_tokens=13, num_speculations=6, eos_token_id=stop)
        assert torch.equal(ours, plain)


def test_a_model_that_cannot_run_in_part_is_refused():
    config = transformers.AutoConfig.for_model("gpt2", n_layer=2, n_embd=8, n_head=1, vocab_size=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"cannot run gpt2 in part. Allowed: exaone4"):
        loop.generate(model=model, inputs=torch.ones(1, 2, dtype=torch.long), exit_layer=1)
