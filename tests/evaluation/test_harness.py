"""lm-eval's tasks through `layerskip_eval`: log-likelihoods and answers against plain PyTorch, offline, tiny models."""

import builtins
import json
import re

import pytest
import torch
import yaml
from helpers.configs import MODEL, eval_config, make_checkpoint
from helpers.tiny import make_tiny
from helpers.training import few_texts  # noqa: F401
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes import layerskip_decoder
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.answers import Answers
from layerskip_recipes.evaluation.config import OF
from layerskip_recipes.evaluation.recipe import LayerSkipEval

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from layerskip_recipes.evaluation import harness

QUESTIONS = [
    {"question": "import os", "choices": ["path", "sys.argv", "return self"], "answer": 0},
    {"question": "def main(args):", "choices": ["pass", "yield None", "x"], "answer": 1},
    {"question": "class Queue:", "choices": ["def get(self)", "raise"], "answer": 1},
    {"question": "for i in range(10):", "choices": ["print(i)", "break", "continue", "if i:"], "answer": 2},
]


class Letters:
    """A token for each character below 97; 0 is bos and eos."""

    bos_id = eos_id = 0
    stop_tokens = (0,)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return [0] * add_bos + [ord(letter) % 97 for letter in text] + [0] * add_eos

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def request(kind: str, *args) -> Instance:
    return Instance(kind, {}, args, 0, metadata=("task", 0, 1))


def plain_logits(model, tokens: list[int], exit_layer: int | None = None) -> torch.Tensor:
    """[s, v] of one text, by the layers one after the other."""
    with torch.no_grad():
        h = model.tok_embeddings(torch.tensor([tokens]))
        for layer in list(model.layers)[:exit_layer]:
            h = layer(h)
        return model.output(model.norm(h))[0].float()


def plain_score(model, context: list[int], answer: list[int], exit_layer: int | None = None) -> tuple[float, bool]:
    """log p(answer | context), and whether each of its tokens is the likeliest, token by token."""
    total, greedy = 0.0, True
    for i, token in enumerate(answer):
        logits = plain_logits(model, context + answer[:i], exit_layer)[-1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("exit_layer", [None, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_is_that_of_each_text_alone(exit_layer, batch_size):
    """Batches of different lengths; one continuation is what the model itself would say."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer, batch_size=batch_size, exit_layer=exit_layer))
    context, own = tokenizer.encode("AB", add_eos=False), []
    for _ in range(3):
        own.append(int(plain_logits(model, context + own, exit_layer)[-1].argmax()))
    half = [own[0], own[1] + 1]  # greedy at first
    pairs = [("AB", tokenizer.decode(own)), ("AB", tokenizer.decode(half)), ("", "XYZ"), ("A longer one", " Z")]
    pairs += [("ab", "+"), ("B", "CDEF")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, answer), (score, greedy) in zip(pairs, found, strict=True):
        tokens = tokenizer.encode(context, add_eos=False), tokenizer.encode(answer, False, False)
        expected, right = plain_score(model, *tokens, exit_layer)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy is right
    assert [greedy for _, greedy in found][:2] == [True, False]


def test_choices_of_one_token_share_a_forward(monkeypatch):
    """As in MMLU; the head takes two positions at a time, so that an answer lies in two pieces."""
    model, tokenizer, rows = make_tiny(), Letters(), []
    lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer, batch_size=2))
    model.tok_embeddings.register_forward_hook(lambda _, args, __: rows.extend(args[0].tolist()))
    monkeypatch.setattr(harness, "HEAD_TOKENS", 2)
    pairs = [("Which?", letter) for letter in "ABCD"] + [("Which", "?D"), ("Which", "?DE"), ("What", "A"), ("W", "h")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert len(rows) == 4  # "Which?" with five answers, "Which?D", "What", "W"
    for (context, answer), (score, greedy) in zip(pairs, found, strict=True):
        tokens = tokenizer.encode(context, add_eos=False), tokenizer.encode(answer, False, False)
        expected, right = plain_score(model, *tokens)
        assert score == pytest.approx(expected, abs=1e-4) and greedy is right


def test_a_context_longer_than_the_model_loses_its_beginning(caplog):
    """128 positions: the last 128 of the tokens that predict something."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer))
    context, answer = "ABCDE" * 40, "FGH"
    ((score, _),) = lm.loglikelihood([request("loglikelihood", context, answer)], disable_tqdm=True)
    tokens = tokenizer.encode(context + answer, add_eos=False)[:-1][-128:]
    targets = torch.tensor(tokenizer.encode(answer, False, False))
    logits = plain_logits(model, tokens)[-3:].log_softmax(-1)
    assert score == pytest.approx(logits.gather(1, targets[:, None]).sum().item(), abs=1e-4)
    assert "lose their beginning" in caplog.text


@pytest.mark.parametrize("exit_layer", [None, 3])
def test_a_whole_text_in_windows(exit_layer):
    """300 tokens, 128 positions: bos and 127, the next 128, then the last 44 after as many as the window holds."""
    model, tokenizer = make_tiny(), Letters()
    lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer, batch_size=2, exit_layer=exit_layer))
    text = "".join(chr(1 + (7 * i * i + i) % 90) for i in range(300))
    tokens = [0, *tokenizer.encode(text, False, False)]
    expected = 0.0
    for first, last in ((1, 128), (129, 256), (257, 300)):  # the tokens predicted by each window
        seen = tokens[max(last - 128, 0) : last]
        logits = plain_logits(model, seen, exit_layer).log_softmax(-1)[-(last - first + 1) :]
        expected += logits.gather(1, torch.tensor(tokens[first : last + 1])[:, None]).sum().item()
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)] * 2, disable_tqdm=True)
    assert found == pytest.approx([expected, expected], abs=1e-3)


def plain_answer(model, context: list[int], limit: int, until: list[str], exit_layer=None) -> str:
    text = ""
    for _ in range(limit):
        token = int(plain_logits(model, context, exit_layer)[-1].argmax())
        if token == 0:
            break
        context, text = [*context, token], text + chr(token)
        if any(stop in text for stop in until):
            return text[: min(text.find(stop) for stop in until if stop in text)]
    return text


@pytest.mark.parametrize("way", ["plain", "exit", "speculation"])
def test_answers_are_those_of_plain_greedy_decoding(way):
    """Up to a stop string, for two kinds of gen_kwargs in one call, in batches."""
    model, tokenizer = make_tiny(), Letters()
    ways = {"plain": {}, "exit": {"exit_layer": 3}, "speculation": {"draft": {"exit_layer": 2, "num_speculations": 3}}}
    if way == "speculation":
        from layerskip_recipes.generation.drafting.section import check_speculation

        section = OmegaConf.create(ways[way]["draft"])
        ways[way] = {"draft": check_speculation(section, layerskip_decoder(model))}
    lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer, batch_size=2, **ways[way]), max_new_tokens=9)
    exit_layer = ways[way].get("exit_layer")
    contexts = ["A", "ABC", "hello", "X+Y"]
    whole = [plain_answer(model, tokenizer.encode(c, add_eos=False), 9, [], exit_layer) for c in contexts]
    stop = whole[0][3:5]
    kinds = [{"until": [stop, "\n\n"]}, {"until": stop, "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}]
    asked = [(context, kind) for context in contexts for kind in kinds]
    found = lm.generate_until([request("generate_until", *args) for args in asked], disable_tqdm=True)
    for (context, kind), text in zip(asked, found, strict=True):
        tokens = tokenizer.encode(context, add_eos=False)
        until = [kind["until"]] if isinstance(kind["until"], str) else kind["until"]
        assert text == plain_answer(model, tokens, kind.get("max_gen_toks", 9), until, exit_layer)
    assert len(found[0]) == 3 and lm.stats["task"].tokens > 0
    assert (lm.stats["task"].drafted > 0) == (way == "speculation")


def test_a_context_longer_than_the_sliding_window_loses_its_beginning():
    """Of gemma2, whose cached attention is right up to its window of 64 tokens; the model itself takes 128."""
    answers = Answers(layerskip_decoder(make_tiny("gemma2")), Letters())
    lm = harness.LayerSkipLM(answers, max_new_tokens=9)
    text = "ABCDEFGHIJ" * 10
    found = lm.generate_until([request("generate_until", text, {"until": []})], disable_tqdm=True)
    (expected,), _ = answers([Letters().encode(text, add_eos=False)[-(64 - 9) :]], 9, [])
    assert found == [expected]


def test_sampling_as_a_task_asks_for_it():
    """do_sample without a temperature is temperature 1; top_k=1 leaves nothing to chance; equal seeds, equal texts."""
    model, tokenizer = make_tiny(), Letters()

    def sample(seed, **kwargs):
        lm = harness.LayerSkipLM(Answers(layerskip_decoder(model), tokenizer, seed=seed), max_new_tokens=12)
        return lm.generate_until([request("generate_until", "AB", {"until": [], **kwargs})], disable_tqdm=True)[0]

    greedy = plain_answer(model, tokenizer.encode("AB", add_eos=False), 12, [])
    assert sample(0, do_sample=True, top_k=1) == greedy == sample(0, temperature=0.0)
    assert sample(0, temperature=1.0) == sample(0, do_sample=True) != sample(1, do_sample=True)


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    return make_checkpoint(tmp_path_factory.mktemp("harness") / "checkpoint", tokenizer_folder)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a multiple-choice task and one that generates, over a small JSONL; the hub is out of reach."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(data | task))
    return folder


def evaluate(path, *overrides: str):
    recipe = LayerSkipEval(load_config(str(path), overrides))
    recipe.setup()
    return recipe, recipe.evaluate()


def config(tmp_path, checkpoint, folder, **changes):
    changes = {"dataset": None, "task_path": str(folder), "max_new_tokens": 8} | changes
    return eval_config(tmp_path, checkpoint, **changes)


@pytest.mark.parametrize("exit_layer", [None, 2])
def test_a_multiple_choice_task_by_hand(exit_layer, tmp_path, checkpoint, tasks, tokenizer_folder, capsys):
    """The accuracy is that of the likeliest choices by plain PyTorch; of each checkpoint its own."""
    other = make_checkpoint(tmp_path / "other", tokenizer_folder, seed=1)
    compare = {"other": {"checkpoint_dir": str(other)}}
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_choice"], compare=compare, limit=3)
    recipe, report = evaluate(path, f"exit_layer={'null' if exit_layer is None else exit_layer}", "report=report.json")
    model = tune_config.instantiate(OmegaConf.create(MODEL))

    def accuracy(state) -> float:
        model.load_state_dict(state)
        right = 0
        for doc in QUESTIONS[:3]:
            scores = []
            for choice in doc["choices"]:
                context = recipe.tokenizer.encode(doc["question"], add_eos=False)
                whole = recipe.tokenizer.encode(f"{doc['question']} {choice}", add_eos=False)
                scores.append(plain_score(model, context, whole[len(context) :], exit_layer)[0])
            right += scores.index(max(scores)) == doc["answer"]
        return right / 3

    assert report["compare_tasks"]["other"]["tiny_choice"]["acc"] == pytest.approx(accuracy(recipe.model.state_dict()))
    own = FullModelHFCheckpointer(str(checkpoint), ["model.safetensors"], "LLAMA3_2", str(tmp_path / "unused"))
    acc = accuracy(own.load_checkpoint()["model"])
    # The standard error of a mean of 0s and 1s, with n - 1.
    expected = {"acc": acc, "acc_stderr": (acc * (1 - acc) / 2) ** 0.5, "documents": 3}
    assert report["tasks"] == {"tiny_choice": pytest.approx(expected)}
    out = capsys.readouterr().out
    assert "|tiny_choice|" in out and json.loads(out.splitlines()[-1]) == report
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "exits" not in report and "batches" not in report


def test_a_generating_task_is_the_same_with_drafts(tmp_path, checkpoint, tasks, monkeypatch):
    """Texts by plain greedy decoding, alike with and without self-speculation; the report says what it took."""
    found = {}
    generate = harness.LayerSkipLM.generate_until

    def keep(lm, requests, *args):
        found[lm.answers.draft is None] = [r.args[0] for r in requests], generate(lm, requests, *args)
        return found[lm.answers.draft is None][1]

    monkeypatch.setattr(harness.LayerSkipLM, "generate_until", keep)
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text", "tiny_choice"], num_fewshot=1)
    drafting = "self_speculation={exit_layer: 2, num_speculations: 3}"
    (recipe, ours), (_, plain) = evaluate(path, drafting), evaluate(path)
    assert found[True] == found[False]
    contexts, texts = found[True]
    model = tune_config.instantiate(OmegaConf.create(MODEL))
    model.load_state_dict(recipe.model.state_dict())
    for context, text in zip(contexts, texts, strict=True):
        assert context.count("\n\n") == 1  # the example and the question
        tokens = recipe.tokenizer.encode(context, add_eos=False)
        room = len(tokens) + 8
        while len(tokens) < room and tokens[-1] not in recipe.tokenizer.stop_tokens:
            tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
        written = recipe.tokenizer.decode(tokens[room - 8 :])
        assert text == written.split("\n")[0]
    report = ours["tasks"]["tiny_text"]
    assert report["exact_match"] == plain["tasks"]["tiny_text"]["exact_match"]
    assert 0 <= report["acceptance_rate"] <= 1 and report["tokens_per_second"] > 0
    assert report["tokens"] == plain["tasks"]["tiny_text"]["tokens"] > 4
    assert "acceptance_rate" not in plain["tasks"]["tiny_text"]
    assert ours["tasks"]["tiny_choice"] == plain["tasks"]["tiny_choice"]


def test_tasks_beside_a_dataset_and_through_the_chat_template(tmp_path, checkpoint, tasks, monkeypatch):
    """The exits are measured too; the template wraps each question."""
    contexts = []
    score = harness.LayerSkipLM.loglikelihood

    def keep(lm, requests, *args):
        contexts.extend(r.args[0] for r in requests)
        return score(lm, requests, *args)

    monkeypatch.setattr(harness.LayerSkipLM, "loglikelihood", keep)
    path = eval_config(tmp_path, checkpoint, tasks=["tiny_choice"], task_path=[str(tasks)], limit=1)
    template = (
        "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    _, report = evaluate(path, "apply_chat_template=true", f"tokenizer.chat_template='{template}'", "max_batches=1")
    assert list(report["exits"]) == [1, 2, 3, 4] and report["batches"] == 1
    assert report["tasks"]["tiny_choice"]["documents"] == 1
    assert set(contexts) == {"<user>import os<me>"}


# ----------------------------------------------------------------------------------------------------- bad input


def change(tasks, **keys) -> None:
    path = tasks / "tiny_text.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tasks=[tiny_chioce]", r"tasks: 'tiny_chioce' is no task.*Nearest: tiny_choice"),
        ("tasks=[qqqqqqqqqqqq]", r"tasks: 'qqqqqqqqqqqq' is no task.*(Allowed|for example)"),
        ("tasks=tiny_choice", r"tasks: 'tiny_choice' is not allowed.*tasks=\[arc_easy\]"),
        ("tasks=[]", r"tasks: \[\] is not allowed"),
        ("tasks=[tiny_text,tiny_text]", r"tasks: .* twice"),
        ("task_path=nowhere", r"task_path: 'nowhere' is no folder.*task_path=tasks"),
        ("task_path=[nowhere]", r"task_path: 'nowhere' is no folder"),
        ("exit_layer=5", r"exit_layer: 5 is not an exit of this model. Allowed: 1\.\.4"),
        ("self_speculation={exit_layer: 5, num_speculations: 2}", r"self_speculation.exit_layer: 5 .*1\.\.4"),
        ("exit_layer=2; self_speculation={exit_layer: 2, num_speculations: 2}", r"exit_layer: 2 is set beside"),
        ("num_fewshot=-1", r"num_fewshot: -1 is not allowed.*0 or more"),
        ("limit=0", r"limit: 0 is not allowed.*1 or more"),
        ("max_new_tokens=128", r"tasks: tiny_text generates up to 128 tokens.*max_seq_len 128"),
        ("tasks=null", r"dataset: None, and neither tasks nor human_eval.*_component_.*tasks=.*human_eval="),
    ],
)
def test_mistakes_are_found_before_the_weights(overrides, message, tmp_path, checkpoint, tasks, monkeypatch):
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda *_: pytest.fail("weights are loaded"))
    index = harness.TaskManager  # lm-eval's own tasks take ten seconds to list
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: index(None, include_path, False))
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"])
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path), overrides.split("; "))).setup()


VALUES = {  # one for each key that means nothing without something to measure
    "collate_fn": "torchtune.data.padded_collate_sft",
    "max_batches": 1,
    "layers": "1::2",
    "num_speculations": 3,
    "picture": "exits.png",
    "task_path": "tasks",
    "num_fewshot": 1,
    "limit": 1,
    "apply_chat_template": True,
    "exit_layer": 2,
    "self_speculation": "{exit_layer: 2, num_speculations: 3}",
    "max_new_tokens": 8,
}


@pytest.mark.parametrize(("needed", "key"), [(needed, key) for needed, keys in OF.items() for key in keys])
def test_what_means_nothing_alone_is_refused_and_its_advice_works(needed, key, tmp_path, checkpoint, tasks):
    absent = {"dataset": None, "task_path": None, "max_new_tokens": None}
    changes = absent | {"tasks": ["tiny_text"]} if needed == ("dataset",) else {}
    path = str(eval_config(tmp_path, checkpoint, **changes))
    with pytest.raises(ValueError, match=rf"^{key}: .* needs {' or '.join(needed)}, .* Set {key}=null$") as error:
        LayerSkipEval(load_config(path, [f"{key}={VALUES[key]}"]))
    LayerSkipEval(load_config(path, [f"{key}={VALUES[key]}", str(error.value).rpartition("Set ")[2]]))


def test_null_means_what_no_key_means(tmp_path, checkpoint):
    """All exits, and the accepted length of 6."""
    path = eval_config(tmp_path, checkpoint)
    assert evaluate(path, "layers=null", "num_speculations=null")[1] == evaluate(path)[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"generation_kwargs": {"until": ["."], "num_beams": 4}}, r"tiny_text asks for generation_kwargs.num_beams"),
        ({"generation_kwargs": {"until": ["."], "top_k": 0}}, r"tiny_text, generation_kwargs.top_k: 0"),
        ({"num_fewshot": 0}, r"num_fewshot: 2 is not for tiny_text"),
        ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, r"tasks: tiny_text cannot be loaded: FileNotFoundError"),
        ({"unsafe_code": True}, r"tasks: tiny_text runs what the model writes"),
    ],
)
def test_what_a_task_file_asks_for(keys, message, tmp_path, checkpoint, tasks, monkeypatch):
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda *_: pytest.fail("weights are loaded"))
    change(tasks, **keys)
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"], num_fewshot=2)
    with pytest.raises(ValueError, match=message):
        LayerSkipEval(load_config(str(path))).setup()


def test_without_lm_eval(tmp_path, checkpoint, tasks, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "layerskip_recipes.evaluation" and "harness" in (args[2] or ()):
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = config(tmp_path, checkpoint, tasks, tasks=["tiny_text"])
    with pytest.raises(ValueError, match=re.escape('pip install "lm-eval>=0.4.12,<0.5"')):
        LayerSkipEval(load_config(str(path))).setup()
