"""The scripts that write questions and answers of tasks, on a few lines of made-up data."""

import json
import re
import zlib
from pathlib import Path

import pytest
from helpers.tools import load
from omegaconf import OmegaConf
from torchtune.datasets import instruct_dataset

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.data.tokenizer import hf_tokenizer

COMMANDS, INDEX, TOPV2, CSHARP, STATES = (
    load(name, "examples") for name in ("spoken_commands", "code_index", "topv2", "java_to_csharp", "dialogue_states")
)


def write(script, monkeypatch, folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """The lines of both files that a script writes to a folder."""
    monkeypatch.setattr("sys.argv", ["script", *arguments, str(folder)])
    script.main()
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }


# ---- spoken_commands.py ----


def slot_values(pairs: list[dict]) -> set[str]:
    return {value for pair in pairs for value in re.findall(r"\[SL:\w+ ([^\[\]]+?) \]", pair["output"])}


def test_a_parse_brackets_the_words_of_its_command():
    for pair in COMMANDS.pairs("test", 300):
        parse = pair["output"]
        assert re.sub(r"\[(IN|SL):[A-Z_]+ | \]", "", parse) == pair["input"]
        assert parse.count("[") == parse.count("]") >= 2 and not set("{}()|") & set(parse)


@pytest.mark.slow
def test_commands_are_distinct_and_the_test_values_are_held_out(tmp_path, monkeypatch):
    written = write(COMMANDS, monkeypatch, tmp_path / "commands")
    train, test = written["train"], written["test"]
    assert len({pair["input"] for pair in train}) == 40_000 and len(test) == 500
    assert COMMANDS.pairs("train", 10) == train[:10] and COMMANDS.pairs("test", 10) == test[:10]
    checksums = {name: zlib.crc32((tmp_path / "commands" / f"{name}.jsonl").read_bytes()) for name in written}
    assert checksums == {"train": 1557953512, "test": 1034754039}  # the commands of the figures in results.md
    # Every test command has a slot value that no training command has.
    split = [values for values in COMMANDS.VALUES.values() if isinstance(values, dict)]
    shown, held_out = ({value for values in split for value in values[name]} for name in ("train", "test"))
    assert not shown & held_out and min(len(values["test"]) for values in split) >= 14
    seen = slot_values(train)
    assert all(slot_values([pair]) - seen for pair in test)
    assert len({pair["output"].split()[0] for pair in test}) >= 20  # intents


# ---- code_index.py ----


def test_an_index_entry_says_what_a_function_takes_and_calls(tmp_path, monkeypatch):
    texts = {
        "train": "def f(a, *, b=1):\n    g(a)\n    return g(b.c(a))\n",
        "heldout": "class A:\n    @staticmethod\n    def h():\n        'Doc.'\n\n    def long(self):\n"
        + "        pass\n" * 40,
    }
    monkeypatch.setattr(INDEX, "stdlib_texts", lambda split: {"module.py": texts[split]})
    written = write(INDEX, monkeypatch, tmp_path)
    (train,), (test,) = written["train"], written["test"]
    assert train["input"].endswith("\n" + texts["train"].rstrip())
    entry = {"function": "f", "parameters": ["a", "b"], "returns": True, "calls": ["g", "b.c"]}
    assert json.loads(train["output"]) == entry
    assert test["input"].endswith("\ndef h():\n    'Doc.'")
    assert json.loads(test["output"]) == {"function": "h", "parameters": [], "returns": False, "calls": []}


# ---- topv2.py ----


def table(*rows: str) -> str:
    return "".join(row + "\n" for row in ("domain\tutterance\tsemantic_parse", *rows))


def test_topv2_becomes_lines_of_all_domains(tmp_path, monkeypatch):
    """Words that a CSV reader takes for something else stay as they are."""
    (tmp_path / "alarm_train.tsv").write_text(table("alarm\tNA\t[IN:X 7 ]", 'alarm\t"hi" twice\t[IN:Y ]'))
    (tmp_path / "music_train.tsv").write_text(table("music\tplay ü\t[IN:Z ü ]"))
    (tmp_path / "alarm_test.tsv").write_text(table("alarm\tstop\t[IN:X ]"))
    (tmp_path / "alarm_eval.tsv").write_text(table("alarm\tnot this\t[IN:X ]"))
    assert write(TOPV2, monkeypatch, tmp_path) == {
        "train": [
            {"input": "NA", "output": "[IN:X 7 ]"},
            {"input": '"hi" twice', "output": "[IN:Y ]"},
            {"input": "play ü", "output": "[IN:Z ü ]"},
        ],
        "test": [{"input": "stop", "output": "[IN:X ]"}],
    }


def test_the_papers_config_learns_the_parses_of_topv2(tmp_path, monkeypatch, tokenizer_folder):
    """Its samples are those that torchtune reads from the data set's own files."""
    (tmp_path / "alarm_train.tsv").write_text(table("alarm\twake me\t[IN:X me ]", "alarm\tstop\t[IN:Y ]"))
    write(TOPV2, monkeypatch, tmp_path)
    cfg = load_config("paper/topv2_1_5B", [f"dataset.path={tmp_path}/train.jsonl"])
    tokenizer = hf_tokenizer(str(tokenizer_folder), chat_template=cfg.tokenizer.chat_template)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    theirs = instruct_dataset(
        tokenizer,
        source="csv",
        data_files=str(tmp_path / "*_train.tsv"),
        delimiter="\t",
        column_map={"input": "utterance", "output": "semantic_parse"},
        train_on_input=False,
        split="train",
    )
    ours = Component(OmegaConf.to_container(cfg.dataset)).build(tokenizer)
    for sample, expected in zip(ours, theirs, strict=True):
        assert sample == {key: list(expected[key]) for key in ("tokens", "labels")}


# ---- java_to_csharp.py ----


def test_java_methods_stand_beside_their_translations(tmp_path, monkeypatch):
    """A line separator in a string ends no method."""
    data = tmp_path / CSHARP.DATA
    data.mkdir(parents=True)
    java = {"train": ["public int size() {return n;}", 'String s() {return "a\u2028b";} '], "test": ["void f() {}"]}
    csharp = {"train": ["public int Size(){return n;}", 'string S(){return "a\u2028b";}'], "test": ["void F(){}"]}
    for split in java:
        for language, methods in (("java", java), ("cs", csharp)):
            text = "".join(method + "\n" for method in methods[split])
            (data / f"{split}.java-cs.txt.{language}").write_text(text, encoding="utf-8")
    assert write(CSHARP, monkeypatch, tmp_path / "out", str(tmp_path)) == {
        "train": [
            {"input": "Translate to C#: public int size() {return n;}", "output": csharp["train"][0]},
            {"input": 'Translate to C#: String s() {return "a\u2028b";}', "output": csharp["train"][1]},
        ],
        "test": [{"input": "Translate to C#: void f() {}", "output": "void F(){}"}],
    }


# ---- dialogue_states.py ----


def spoken(speaker: str, utterance: str, **slots: list[str]) -> dict:
    state = {"active_intent": "Book", "slot_values": slots, "requested_slots": ["phone"]}
    frame = {"service": "Tables_1"} | ({"state": state} if speaker == "USER" else {})
    return {"speaker": speaker, "utterance": utterance, "frames": [frame]}


def test_a_dialogue_up_to_a_turn_of_the_user_has_the_state_of_that_turn(tmp_path, monkeypatch):
    slots = [
        {"name": "city", "is_categorical": False, "possible_values": ["Oslo"]},
        {"name": "seats", "is_categorical": True, "possible_values": ["1", "2"]},
    ]
    schema = [{"service_name": "Tables_1", "slots": slots, "intents": [{"name": "Book"}, {"name": "Find"}]}]
    schema.append({"service_name": "Unused_1", "slots": [], "intents": []})
    turns = [
        spoken("USER", "A table in Tromsø.", city=["Tromsø"]),
        spoken("SYSTEM", "For how many?"),
        spoken("USER", "Two.", city=["Tromsø", "there"], seats=["2"]),
    ]
    long = [spoken("USER", "a" * STATES.MAX_CHARACTERS)]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "schema.json").write_text(json.dumps(schema))
        dialogues = [{"dialogue_id": f"{split}_{i}", "turns": turns} for i in range(10)]
        dialogues += [{"dialogue_id": f"{split}_10", "turns": long}]
        (tmp_path / split / "dialogues_001.json").write_text(json.dumps(dialogues))
    written = write(STATES, monkeypatch, tmp_path / "out", str(tmp_path))
    service = '{"Tables_1":{"intents":["Book","Find"],"slots":{"city":[],"seats":["1","2"]}}}'
    first = "User: A table in Tromsø."
    expected = {
        first: '{"Tables_1":{"intent":"Book","slots":{"city":"Tromsø"},"requested":["phone"]}}',
        f"{first}\nAssistant: For how many?\nUser: Two.": (
            '{"Tables_1":{"intent":"Book","slots":{"city":"Tromsø","seats":"2"},"requested":["phone"]}}'
        ),
    }
    for lines in written.values():
        assert len(lines) == 10 and {line["input"]["user"]: line["output"] for line in lines} == expected
        assert {line["input"]["system"] for line in lines} == {f"{STATES.INSTRUCTION}\n{service}"}
