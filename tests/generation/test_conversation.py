"""Conversations and chat prompts: the cache between turns, questions left out, drafts shown on a terminal."""

import importlib
import io
import json
import re

import pytest
import torch
from helpers.recipes import run_generate as run
from torchtune.data import Message

from layerskip_recipes import generate
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.generation.text.prompts import to_tokens
from layerskip_recipes.generation.text.text_stream import TextStream

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)


@pytest.fixture
def talk(path, monkeypatch):
    """Asks questions by standard input: the recipe, its report, and each turn's prompt and generation."""

    def talk(questions, *overrides, template=CHAT, tokens=8):
        monkeypatch.setattr("sys.stdin", io.StringIO(questions))
        settings = [f"tokenizer.chat_template={json.dumps(template)}", "prompt=interactive", f"max_new_tokens={tokens}"]
        recipe, turns = LayerSkipGenerate(load_config(str(path), [*settings, *overrides])), []
        recipe.setup()
        begin = recipe._generation

        def noted(prompts, *args, **kwargs):
            turns.append((prompts[0], begin(prompts, *args, **kwargs)))
            return turns[-1][1]

        monkeypatch.setattr(recipe, "_generation", noted)
        return recipe, recipe.generate(), turns

    return talk


def test_interactive_keeps_the_conversation_and_its_cache(talk):
    """Two questions: the second prompt holds the first answer, whose cache is not computed again."""
    recipe, report, turns = talk("hello\n\nand now\n/exit\n", "system_prompt=be")
    assert report["prompts"] == 2
    (first, one), (second, two) = turns
    decode = recipe.tokenizer.decode
    assert decode(first) == "<system>be<user>hello<reply>"
    answer = TextStream(recipe.tokenizer, recipe.llm.stop_tokens).text(one.generated[0])
    assert decode(second) == f"<system>be<user>hello<assistant>{answer}<user>and now<reply>"
    common = next(i for i, (a, b) in enumerate(zip(first + one.generated[0], second, strict=False)) if a != b)
    assert two.stats.reused_tokens == min(common, len(first) + len(one.generated[0]) - 1) > 4
    assert two.stats.prefill_tokens == len(second) - two.stats.reused_tokens
    alone = generate(recipe.llm.model, torch.tensor(second), 8, stop_tokens=recipe.llm.stop_tokens)
    assert two.generated[0] == alone.tokens[0, len(second) :].tolist()


def test_a_question_in_another_encoding_is_left_out(talk, monkeypatch, caplog):
    lines = iter(["hi", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "and now"])

    def read(prompt):
        line = next(lines, "/exit")
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert talk("")[1]["prompts"] == 2
    assert sum("the question is left out: 'utf-8'" in message for message in caplog.messages) == 1


def test_an_answer_that_was_interrupted_before_its_first_token_is_none(talk, monkeypatch):
    """It counts in no figure, and the conversation goes on without it."""
    asked = []

    def prefill(self, whole=Generation._prefill):
        asked.append(self.rows.prompts[0])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Generation, "_prefill", prefill)
    recipe, report, _ = talk("hi\nand now\n", tokens=4)
    assert report["prompts"] == 1 and report["tokens"] <= 4
    assert "hi" not in recipe.tokenizer.decode(asked[1])


def test_a_question_that_does_not_fit_is_left_out(talk, caplog):
    recipe, report, turns = talk(f"hi\n{'x' * 150}\nand now\n")
    text = recipe.tokenizer.decode(turns[1][0])
    assert report["prompts"] == 2 and "x" * 5 not in text and text.endswith("and now<reply>")
    (message,) = [message for message in caplog.messages if "left out" in message]
    assert "the model's 128" in message


@pytest.mark.slow
@pytest.mark.parametrize("speculation", ["null", "{exit_layer: 2, num_speculations: 4}"])
def test_a_shorter_answer_keeps_the_cache(talk, speculation):
    recipe, _, turns = talk(f"{'x' * 40}\nand now\n", f"self_speculation={speculation}", tokens=36)
    (_, one), (second, two) = turns
    assert 0 < 128 - len(second) < 36 and two.cache is one.cache
    assert two.stats.reused_tokens > 40
    alone = generate(recipe.llm.model, torch.tensor(second), 128 - len(second), stop_tokens=recipe.llm.stop_tokens)
    assert two.generated[0] == alone.tokens[0, len(second) :].tolist()


@pytest.mark.slow
def test_a_full_conversation_says_so_and_how_to_start_again(talk, caplog):
    recipe, report, turns = talk(f"{'x' * 60}\n{'y' * 50}\nand now\n/new\nand now\n", tokens=30)
    assert report["prompts"] == len(turns) == 2
    assert recipe.tokenizer.decode(turns[1][0]) == "<user>and now<reply>"
    left_out = [message for message in caplog.messages if "left out" in message]
    assert left_out and all(m.startswith("the conversation is full. /new starts another one; ") for m in left_out)


def test_what_a_template_refuses_ends_no_conversation(talk, caplog):
    """The question is left out, and the report comes as ever. What it refuses from the start is refused before."""
    refused = "messages[-1].content == 'bad' or messages[0].role == 'system'"
    template = f"{{% if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}" + CHAT
    assert talk("hi\nbad\nand now\n", template=template)[1]["prompts"] == 2
    assert sum("left out" in message for message in caplog.messages) == 1
    with pytest.raises(ValueError, match=r"the tokenizer refuses .*: no$"):
        talk("", "system_prompt=be", template=template)


@pytest.mark.parametrize(
    ("tokenizer", "leaves_it_open"),
    [
        *((name, True) for name in ("llama2.Llama2Tokenizer", "llama3.Llama3Tokenizer")),
        *((name, False) for name in ("mistral.MistralTokenizer", "gemma.GemmaTokenizer", "phi3.Phi3MiniTokenizer")),
        *((name, False) for name in ("qwen2.Qwen2Tokenizer", "qwen2_5.Qwen2_5Tokenizer", "phi4.Phi4Tokenizer")),
    ],
)
def test_a_chat_needs_a_tokenizer_that_leaves_the_last_turn_open(tokenizer, leaves_it_open):
    """Without files an instance can do nothing else, so one that may try ends in another error."""
    module, name = tokenizer.split(".")
    kind = getattr(importlib.import_module(f"torchtune.models.{module}._tokenizer"), name)
    refused = rf"^tokenizer: {name} closes .*hf_tokenizer, path:"
    message = "^prompt: the tokenizer refuses" if leaves_it_open else refused
    for prompt in ({"user": "hi"}, [Message(role="user", content="hi"), Message(role="assistant", content="")]):
        with pytest.raises(ValueError, match=message):
            to_tokens(prompt, kind.__new__(kind))


# ---- what is shown ----


@pytest.mark.slow
def test_drafts_are_shown_dim_and_replaced(path, capsys, monkeypatch):
    """On a terminal: without what is between saving and restoring the cursor, the text is the accepted text."""
    run(path)
    plain = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(path, "stream=draft")
    shown = capsys.readouterr().out.split(">>> ")[1].split("\n\n---")[0]
    assert "\x1b[2m" in shown
    assert re.sub(r" \x08\x1b7.*?\x1b8\x1b\[J", "", shown) == plain


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(("draft", "seen"), [("cdefgh", "cdefgh"), ("c\rd", "c"), ("c\nd", "c"), ("", "")])
def test_a_draft_stays_in_its_line(draft, seen, capsys):
    """Wrapping is off while it is printed, and the next text takes its place."""
    stream = TextStream(Letters())
    stream.extend(list(map(ord, "ab")))
    stream.show(last=False)
    stream.show_draft([list(map(ord, draft))])
    stream.extend([ord("x")])
    stream.show(last=False)
    assert capsys.readouterr().out == f"ab \b\x1b7\x1b[?7l\x1b[2m{seen}\x1b[0m\x1b[?7h\x1b[0m\x1b[?7h\x1b8\x1b[Jx"
