"""LLM: a few lines of Python that load, generate and print, from every kind of folder."""

import logging
import shutil
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.compiled import has_compiler
from helpers.configs import finetune_config, hf_sections
from helpers.tiny import make_tiny
from helpers.training import train
from safetensors.torch import load_file, save_file

from layerskip_recipes import LLM, generate, hf_tokenizer, layerskip_decoder
from layerskip_recipes.checkpoint.drafts import read_description
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.calls import CallSettings, question_tokens
from layerskip_recipes.generation.drafting.section import SelfSpeculation
from layerskip_recipes.generation.kernels import when_to_compile


def trained(folder, tokenizer, base, **changes):
    """The output folder of a training of the model."""
    train(finetune_config(folder, tokenizer, **hf_sections(base), **changes))
    return folder / "out"


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory, tokenizer_folder):
    """The folder of a run that trained the exits 2 and 4."""
    return trained(tmp_path_factory.mktemp("run"), tokenizer_folder, checkpoint)


@pytest.fixture(scope="module")
def draft(checkpoint, tmp_path_factory, tokenizer_folder):
    """The folder of a run that trained a draft for the base."""
    section = {"kind": "adapter", "exit_layer": 1, "vocabulary": 60}
    changes = {"layer_dropout": None, "early_exit_loss": None, "draft": section}
    return trained(tmp_path_factory.mktemp("draft"), tokenizer_folder, checkpoint, **changes)


PROMPT = "def read(path):"


def test_text_with_drafts_is_that_of_plain_decoding(run):
    """The text is that of plain decoding, at every temperature, at once or as a stream."""
    llm = LLM.load(str(run))
    for temperature in (0.0, 0.9):
        settings = {"temperature": temperature, "seed": 3}
        plain = llm.generate(PROMPT, 24, draft=None, **settings)
        assert plain.stats.drafted == 0 and plain.speedup is None and not llm.model.training
        assert temperature or not llm.state.drafts  # no draft is built that nobody wants
        out = llm.generate(PROMPT, 24, exit_layer=2, num_speculations=4, **settings)
        assert (out.text, out.tokens) == (plain.text, plain.tokens) and out.stats.drafted > 0 and out.speedup > 0
        for _ in range(2):
            pieces = list(llm.stream(PROMPT, 24, exit_layer=2, num_speculations=4, **settings))
            assert "".join(pieces) == plain.text and len(pieces) > 2


def test_a_list_of_prompts_gives_a_list_of_outputs(run):
    """Each has the text that it would have alone, whatever the number of rows."""
    llm, prompts = LLM.load(str(run)), [PROMPT, "import os", "class Reader:"]
    alone = [llm.generate(prompt, 16).text for prompt in prompts]
    for batch_size in (1, 2, 8):
        assert [out.text for out in llm.generate(prompts, 16, batch_size=batch_size)] == alone
    assert [out.text for out in llm.generate([PROMPT], 16)] == alone[:1]
    assert llm.generate([], 16) == []


def test_predictions_are_drafted_and_change_no_answer(checkpoint):
    """Of a model that nobody trained to draft, which without them does not draft at all."""
    llm, prompts = LLM.load(str(checkpoint)), [PROMPT, "import os", "class Reader:"]
    for settings in ({}, {"temperature": 0.9, "seed": 3}):
        plain = llm.generate(prompts, 24, **settings)
        texts = [out.text for out in plain]
        assert plain[0].stats.drafted == 0
        for prediction, batch_size in ((texts, 1), ([["no", texts[0]], None, ""], 2), (texts[::-1], 2)):
            outputs = llm.generate(prompts, 24, batch_size=batch_size, prediction=prediction, **settings)
            assert [out.text for out in outputs] == texts
            assert outputs[0].stats.accepted > 3 or prediction == texts[::-1]
        assert "".join(llm.stream(PROMPT, 24, prediction=["no", texts[0]], **settings)) == texts[0]
    assert llm.generate(PROMPT, 24, prediction=texts[0], draft=None).stats.drafted == 0
    assert llm.generate(PROMPT, 24, prediction="").stats.drafted == 0


@pytest.mark.parametrize(
    ("prompt", "prediction"),
    [(PROMPT, 3), (PROMPT, ["a", 3]), (PROMPT, [["a"]]), ([PROMPT], "a"), ([PROMPT], ["a", "b"]), ([PROMPT], [3])],
)
def test_predictions_that_are_no_texts_are_refused(checkpoint, prompt, prediction):
    llm = LLM.load(str(checkpoint))
    with pytest.raises(ConfigError, match=r"^prediction: .* is not allowed.* Allowed: "):
        llm.generate(prompt, 4, prediction=prediction)


def test_an_answer_ends_before_a_stop_text(run):
    llm = LLM.load(str(run))
    text = llm.generate(PROMPT, 24).text
    stop = text[len(text) // 2 :][:3]
    assert llm.generate(PROMPT, 24, stop=stop).text == text[: text.index(stop)]
    assert "".join(llm.stream(PROMPT, 24, stop=[stop])) == text[: text.index(stop)]


def test_another_thread_waits_for_a_stream_and_says_so(run, monkeypatch):
    """The log says why a call does not begin."""
    llm = LLM.load(str(run))
    text, answers, waits = llm.generate(PROMPT, 16).text, [], threading.Event()
    monkeypatch.setattr("layerskip_recipes.generation.llm.log.info", lambda line: waits.set())
    pieces = llm.stream(PROMPT, 16)
    first = next(pieces)
    thread = threading.Thread(target=lambda: answers.append(llm.generate(PROMPT, 16).text))
    thread.start()
    assert waits.wait(60) and not answers
    rest = "".join(pieces)
    thread.join(60)
    assert answers == [text] == [first + rest]


def test_a_closed_stream_makes_no_call_wait(run):
    """Before that, a call of its own thread is refused: it would wait for ever."""
    llm = LLM.load(str(run))
    pieces = llm.stream(PROMPT, 16)
    next(pieces)
    with pytest.raises(RuntimeError, match=r"close\(\)"):
        llm.generate(PROMPT, 2)
    pieces.close()
    assert not llm.lock.locked() and llm.generate(PROMPT, 2).tokens


def test_a_chat_model_takes_a_question_or_messages(run):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    llm = LLM.load(str(run))
    llm.tokenizer = hf_tokenizer(str(run / "epoch_0"), chat_template=template)
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief"}
    same = ["hi", {"user": "hi"}, [user]]
    assert len({out.text for out in llm.generate(same, 8)}) == 1
    assert llm.generate([user], 8).text == llm.generate("hi", 8).text == "".join(llm.stream([user], 8))
    with_system = llm.generate([[system, user], {"user": "hi", "system": "Be brief"}], 8)
    assert with_system[0].tokens == with_system[1].tokens
    turns = [user, {"role": "assistant", "content": "hello"}, user]
    rendered = llm.tokenizer.decode(question_tokens(turns, llm.tokenizer))
    assert rendered.endswith("<user>hi<assistant>hello<user>hi<assistant>")
    with pytest.raises(ConfigError, match=r"^prompt: .*'role'.* needs user"):
        llm.generate(user)


def test_two_objects_of_one_folder_share_nothing(run):
    one, other = LLM.load(str(run)), LLM.load(str(run))
    text = one.generate(PROMPT, 16, exit_layer=2, num_speculations=4).text
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.mul_(0.5)
    assert other.generate(PROMPT, 16, exit_layer=2, num_speculations=4).text == text
    assert not {*map(id, one.state.rules.values())} & {*map(id, other.state.rules.values())}


def test_a_call_has_the_keys_of_self_speculation():
    of_calls = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "prediction", "compile"}
    assert CallSettings.__annotations__.keys() - of_calls == SelfSpeculation.model_fields.keys()


def test_a_number_of_draft_tokens_without_a_stored_list_is_counted_in_each_calls_prompts(checkpoint):
    llm = LLM.load(str(checkpoint))
    for prompt in ("aaaaaaaa", "bbbbbbbb"):
        llm.generate(prompt, 4, exit_layer=2, draft_vocabulary=1, compile=False)
    (first, *_), (last, *_) = (key[1] for key in llm.state.drafts)
    assert first != last


def test_a_given_exit_drafts_before_the_chosen_one(run, checkpoint):
    """The one that the recipe chooses; an exit that is given counts first."""
    llm = LLM.load(str(run / "epoch_0"))
    first = llm.generate(PROMPT, 24, num_speculations=4, exit_layer=1)
    assert first.text == llm.generate(PROMPT, 24, draft=None).text
    assert LLM.load(str(checkpoint)).generate(PROMPT, 24).stats.drafted == 0
    with pytest.raises(ConfigError, match=r"exit_layer: None .*Allowed: "):
        generate(layerskip_decoder(make_tiny()), [1, 2], 4, num_speculations=4)
    for wrong, message in (
        ({"num_speculations": 0}, "num_speculations: 0"),
        ({"temperatures": 0.5}, "temperatures: unknown. Nearest: temperature"),
        ({"draft": "out"}, "draft: 'out'"),
        ({"stop": 3}, "stop: 3"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"exit_layer": 99}, "exit_layer: 99"),
        ({"num_speculations": 3, "draft": None}, "num_speculations: is for drafts"),
    ):
        with pytest.raises(ConfigError, match=message):
            llm.generate(PROMPT, 24, **wrong)


def test_compiling_is_announced_and_decided_once(run, monkeypatch, caplog):
    """Where ten calls gain more than it takes; the first one says so."""
    llm = LLM.load(str(run))
    monkeypatch.setattr(when_to_compile, "COMPILE_S", 0.0)
    monkeypatch.setattr(when_to_compile, "LOAD_S", 0.0)
    compiled, planned = [], []
    plan = llm.planner.plan
    monkeypatch.setattr(llm.planner, "plan", lambda *args, **kwargs: planned.append(1) or plan(*args, **kwargs))
    monkeypatch.setattr(
        "layerskip_recipes.generation.llm.Generation",
        lambda *args, compile, **kwargs: compiled.append(compile) or stop(),
    )
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(StopIteration):
                llm.generate(PROMPT, 24)
    assert compiled == [True, True] and caplog.text.count("Compiled: ") == 1
    # The steps are compiled now, and other lengths and equal drafts need no other plan.
    llm.state.compiled = SimpleNamespace(failed=False)
    for length in (24, 48):
        with pytest.raises(StopIteration):
            llm.generate(PROMPT, length)
    assert len(planned) == 3  # compiled and not, and now compiled


def test_a_model_without_a_planner_decodes_without_drafts(run):
    """As one that was built by hand, which has no layerskip.json."""
    loaded = LLM.load(str(run))
    llm = LLM(loaded.model, loaded.tokenizer)
    assert llm.generate(PROMPT, 8, draft=None).text == loaded.generate(PROMPT, 8).text
    with pytest.raises(ConfigError, match=r"^draft: .*draft=None"):
        llm.generate(PROMPT, 8)


@has_compiler
@pytest.mark.slow
def test_a_later_prompt_reuses_what_it_shares_with_the_one_before(run):
    llm, prompts = LLM.load(str(run)), ("def read(path):", "def reader(path):")
    for draft in ("auto", None):
        plain = [llm.generate(prompt, 12, draft=None, compile=False).text for prompt in prompts]
        outs = [llm.generate(prompt, 12, draft=draft, compile=True) for prompt in prompts]
        assert [out.text for out in outs] == plain
        assert 0 < outs[1].stats.reused_tokens < len(llm.tokenizer.prompt(prompts[1]))
    # Torch without compiled steps has a cache of its own.
    llm.generate(prompts[0], 12, draft=None, compile=False)
    again = partial(llm.generate, prompts[0], 12, draft=None, compile=True)
    assert again().stats.reused_tokens > 0
    # What torch has read is not reused, since it rounds differently; nor are numbers of another dtype.
    hook = llm.model.layers[0].register_forward_hook(lambda *_: None)  # C++ does not run a layer with a hook
    assert again().stats.reused_tokens == 0
    hook.remove()
    assert again().stats.reused_tokens == 0
    assert again().stats.reused_tokens > 0
    llm.model.to(torch.bfloat16)
    assert again().stats.reused_tokens == 0


def stop():
    raise StopIteration


def test_a_trained_draft_drafts_beside_its_model_or_by_its_folder(checkpoint, draft):
    """Beside its model, or by its own folder, which names the model. A named one drafts even if it is slow."""
    plain = LLM.load(str(checkpoint)).generate(PROMPT, 24).text
    assert LLM.load(str(draft)).state.trained_drafts
    for path in (checkpoint, draft):
        llm = LLM.load(str(path), draft=str(draft))
        out = llm.generate(PROMPT, 24)
        assert out.text == plain and out.stats.drafted > 0
        assert not any("join" in name for name in llm.model.state_dict())
        llm.generate(PROMPT, 24, num_speculations=2)  # with the same weights
        (built,) = llm.state.drafts.values()
        assert built.decoder.trained_layers.start == 1 and len(built.head.vocabulary) <= 60


def test_few_draft_weights_are_kept_of_calls_that_count_their_vocabulary(checkpoint):
    llm = LLM.load(str(checkpoint))
    for prompt in ("import os", "class Reader:", "def write(text):", "return 3"):
        llm.generate(prompt, 4, exit_layer=2, draft_vocabulary=3, compile=False)
    assert len(llm.state.drafts) == 2


def test_a_plan_drafts_with_the_draft_of_its_folder(checkpoint, draft, tmp_path):
    """Also if the draft of another folder has been read before. Each is read once."""
    other = shutil.copytree(draft / "epoch_0", tmp_path / "other")
    weights = load_file(other / "draft.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "draft.safetensors")
    llm = LLM.load(str(checkpoint), draft=str(draft))
    llm.generate(PROMPT, 4, compile=False)
    first = next(iter(llm.chosen.values())).plan
    second = replace(first, draft=read_description(str(other), "draft"))
    for plan in (second, first, second):
        llm.state.draft_weights(plan, llm.model)
    ours, others = (trained.state_dict() for trained in llm.state.trained_drafts.values())
    assert ours.keys() == others.keys() and not any(torch.equal(others[name], ours[name]) for name in weights)


def test_device_and_dtype_are_those_asked_for_or_refused(checkpoint):
    model = LLM.load(str(checkpoint), device="cpu", dtype="bf16").model
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    whole = LLM.load(str(checkpoint), device="cpu").model
    assert whole.tok_embeddings.weight.dtype == torch.float32
    for arguments, message in (({"dtype": "fp16"}, "dtype: 'fp16'"), ({"device": "gpu"}, "device: 'gpu'")):
        with pytest.raises(ConfigError, match=message):
            LLM.load(str(checkpoint), **arguments)


@pytest.mark.parametrize(
    ("quantizer", "compile"),
    [
        ("Int8WeightOnlyConfig", False),
        # Uncompiled, one row of x and several differ in attention's last bits, which rounding to int8 can make larger.
        pytest.param("Int8DynamicActivationInt8WeightConfig", True, marks=has_compiler),
    ],
)
def test_a_quantised_model_drafts_by_its_exits_and_by_a_trained_draft(run, checkpoint, draft, quantizer, compile):
    """The text is that of the quantised model. Drafts of its exits need no copy of its layers."""
    section, exits = {"_component_": f"torchao.quantization.{quantizer}"}, {"exit_layer": 2, "num_speculations": 3}
    for path, folder, settings in (
        (run, None, exits | {"draft_vocabulary": 60}),
        (checkpoint, draft, {}),
        (checkpoint, draft, {"draft_int8": True}),
    ):
        llm = LLM.load(str(path), draft=folder and str(folder), quantizer=section)
        out = llm.generate(PROMPT, 24, compile=compile, **settings)
        assert out.stats.drafted > 0
        assert out.tokens == llm.generate(PROMPT, 24, draft=None, compile=compile).tokens
        kinds = [type(weight).__name__ for weight in llm.model.parameters() if weight.dim() == 2]
        assert kinds.count("Int8Tensor") == 4 * 7 + 1 and kinds.count("Parameter") == 1  # the embedding


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ("torchao.quantization.Int9", r"^quantizer\._component_: .*Int9.* cannot be imported"),
        ({"path": "x"}, r"^quantizer: .*Allowed: a section with _component_"),
        ({"_component_": "torchao.quantization.Int8WeightOnlyConfig", "bits": 3}, r"^quantizer\.bits: "),
    ],
)
def test_a_quantizer_that_does_not_exist_is_refused(checkpoint, quantizer, message):
    with pytest.raises(ConfigError, match=message):
        LLM.load(str(checkpoint), quantizer=quantizer)


def test_changed_files_do_not_change_a_loaded_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    model = LLM.load(str(folder), device="cpu").model
    before = model.norm.scale.clone()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors")
    assert torch.equal(model.norm.scale, before)
