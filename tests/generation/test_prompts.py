"""Prompts from configs, files and standard input, bad ones among them, and the file of answers."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from helpers.generating import run

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.recipe import LayerSkipGenerate

LINES = [
    '{"prompt": "a = 1"}',
    '{"prompt: "b"}',
    "",
    '{"prompt": ""}',
    '{"prompt": "x = 2"}',
    json.dumps({"prompt": "long " * 99}),
]


def test_half_a_character_is_a_bad_prompt(path, tmp_path):
    """JSON can have it, UTF-8 cannot."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a = 1"}\n{"prompt": "\\ud83d hi"}\n{"prompt": {"user": "x", "system": "\\ud83d"}}\n')
    with pytest.raises(ValueError, match=r"^prompt_file line 2: .* half of a character.*also lines 3"):
        run(path, f"prompt_file={file}")
    _, report = run(path, f"prompt_file={file}", "on_bad_prompt=skip", f"output_file={out}")
    assert (report["prompts"], report["skipped"]) == (1, 2) and len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_bad_prompts_are_skipped_and_have_their_place(path, tmp_path, capsys, caplog, size):
    """Broken, empty and too long, after a byte order mark; the answers to the others are those that they have alone."""
    file, out, good = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "good.jsonl"))
    file.write_text("\n".join(LINES), encoding="utf-8-sig")
    _, report = run(path, f"prompt_file={file}", "on_bad_prompt=skip", f"output_file={out}", f"batch_size={size}")
    run(path, "prompt=[a = 1, x = 2]", f"output_file={good}", f"batch_size={size}")
    alone = [
        json.loads(line) | {"index": index} for line, index in zip(good.read_text().splitlines(), (0, 3), strict=True)
    ]
    first, broken, empty, last, long = map(json.loads, out.read_text().splitlines())
    assert [first, last] == alone and (report["prompts"], report["skipped"]) == (2, 3)
    for at, (line, number, what) in enumerate(
        [(broken, 2, "no JSON"), (empty, 4, "empty"), (long, 6, "128 (max_seq_len)")], 1
    ):
        assert line == {"index": at + (at == 3), "line": number, "error": line["error"]}
        assert what in line["error"] and f"line {number}" in line["error"]
        assert [record.getMessage() for record in caplog.records].count(f"skipped: {line['error']}") == 1


def test_a_bad_prompt_is_an_error_that_names_its_line(path, tmp_path):
    """Of several that of the longest prompt, since what is allowed for it is enough for all."""
    file = tmp_path / "prompts.jsonl"

    def refused(lines, *overrides):
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError) as caught:
            LayerSkipGenerate(load_config(str(path), [f"prompt_file={file}", *overrides]))
        return str(caught.value)

    message = refused([*LINES, '{"prompt": "' + "a" * 110 + '"}'], "max_new_tokens=120")
    assert message.startswith("prompt: its ") and message.endswith(
        "(prompt_file line 6) (also lines 2, 4, 7). on_bad_prompt=skip answers the rest"
    )
    message = refused(LINES[:2])
    assert message.startswith('prompt_file line 2: \'{"prompt: "b"}\' is no JSON object')
    assert message.endswith(". on_bad_prompt=skip answers the rest")
    assert "on_bad_prompt" not in refused(LINES[1:2], "on_bad_prompt=skip")  # nothing else to answer
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"
    asked = [{"user": "a"}, {"user": "a", "system": "b"}]
    message = refused(
        [json.dumps({"prompt": chat}) for chat in asked], f"tokenizer.chat_template={json.dumps(template)}"
    )
    assert "no system (prompt_file line 2)." in message


def test_bytes_that_are_no_utf8_break_their_line_only(path, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a\xff"}\n{"prompt": "\xc3\xa9"}\n')
    recipe = LayerSkipGenerate(load_config(str(path), [f"prompt_file={file}", "on_bad_prompt=skip"]))
    assert recipe.prompts == ["", "é"] and "prompt_file line 1: " in recipe.examples[0].error


def test_a_byte_order_mark_is_no_part_of_a_prompt(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("a", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa"))
    for name in (tmp_path / "one.txt", "-"):
        assert LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts == ["a"]


def test_the_output_file_is_none_that_the_run_reads(path, tmp_path):
    """By whatever name: a link to it, or the same file by another path."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    vocabulary = [
        "self_speculation.draft_vocabulary=9",
        f"self_speculation.draft_vocabulary_file={tmp_path / 'a.jsonl'}",
    ]
    path_, source = (f"prompts.{key}={tmp_path / 'a.jsonl'}" for key in ("path", "source"))
    file, table = (
        ["prompt=null", f"prompts._component_=layerskip_recipes.tasks.{name}"] for name in ("jsonl", "topv2")
    )
    for overrides, key in (
        ([f"prompt_file={tmp_path / 'a.jsonl'}"], "prompt_file"),
        (vocabulary, vocabulary[1].split("=")[0]),
        ([*file, path_], "prompts.path"),
        ([*table, source], "prompts.source"),
    ):
        for name in ("a.jsonl", "link.jsonl", f"../{tmp_path.name}/a.jsonl"):
            with pytest.raises(
                ValueError, match=rf"^output_file: .* would overwrite {re.escape(key)}\. .*=answers\.jsonl"
            ):
                LayerSkipGenerate(load_config(str(path), [*overrides, f"output_file={tmp_path / name}"]))
    assert (tmp_path / "a.jsonl").read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize("there", [False, True])
def test_an_output_file_that_cannot_be_written(path, tmp_path, monkeypatch, there):
    """A folder or a file without permission, which root, who may run this, would have."""
    protected = tmp_path / "folder"
    protected.mkdir()
    if there:
        (protected / "a.jsonl").touch()
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: not Path(name).is_relative_to(protected) and access(name, mode))
    with pytest.raises(ValueError, match=r"^output_file: .* cannot be written"):
        LayerSkipGenerate(load_config(str(path), [f"output_file={protected / 'a.jsonl'}"]))


def test_an_existing_output_file_needs_no_folder(path, monkeypatch):
    access = os.access
    monkeypatch.setattr("os.access", lambda name, mode: Path(name) != Path("/dev") and access(name, mode))
    GenerateConfig.load(load_config(str(path), ["output_file=/dev/null"]))


def test_prompt_files_and_standard_input(path, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("import sys\n")
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "import sys\\n"}\n\n{"prompt": {"user": "hi", "system": "be brief"}}\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("import sys\n"))

    def prompts(name):
        return LayerSkipGenerate(load_config(str(path), [f"prompt_file={name}"])).prompts

    assert prompts(tmp_path / "one.txt") == prompts("-") == ["import sys\n"]
    assert prompts(tmp_path / "two.jsonl") == ["import sys\n", {"user": "hi", "system": "be brief"}]


def test_what_a_prompt_takes_from_other_keys_is_filled_in(path):
    cfg = load_config(str(path), ["prompt=null", 'prompt.user="Tell me about ${max_new_tokens} ${tokenizer.path}"'])
    assert LayerSkipGenerate(cfg).prompts == [{"user": f"Tell me about {cfg.max_new_tokens} {cfg.tokenizer.path}"}]


def test_the_tokenizers_limit_of_a_training_cuts_no_prompt(path):
    limited = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'", "tokenizer.max_seq_len=4"]))
    free = LayerSkipGenerate(load_config(str(path), ["prompt='x = 1 + 2 + 3 + 4'"]))
    assert limited.prompt_tokens == free.prompt_tokens and len(free.prompt_tokens[0]) > 4
    assert limited.tokenizer.max_seq_len == 4
