"""Tasks of the lm-evaluation-harness on our decoder: any exit, batched, generation by our engine.

The one module that imports lm_eval, and nothing imports it before a config asks for tasks.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from layerskip_recipes.config.settings import nearest
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.answers import Answers, speed
from layerskip_recipes.generation.drafting.section import FILTERS, spare_slots
from layerskip_recipes.generation.drafting.speculation import most_positions
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats

log = logging.getLogger(__name__)

HEAD_TOKENS = 512  # whose logits exist at a time
# lm-eval's names; the first that is there counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# ---- tasks ----


def load_tasks(
    names: Sequence[str],
    task_path: Sequence[str],
    num_fewshot: int | None,
    max_new_tokens: int,
    max_seq_len: int,
) -> dict[str, Any]:
    """Tasks with their data, ready to be run, after all checks that need no weights.

    Args:
        names: of tasks, groups or tags.
        task_path: folders with task files of one's own; they come before lm-eval's tasks of the same name.
        num_fewshot: examples before each question; None: what the task says, or none.
        max_new_tokens: of a task that does not say so itself.
        max_seq_len: of the model.

    Returns:
        What `TaskManager.load` returns: "tasks" and "groups" by name.

    Raises:
        ValueError: if there is no such task, it cannot be loaded, or asks for what we do not have.
    """
    manager = _index(names, task_path)
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f"tasks: {name!r} is no task, group or tag of lm-eval's. {_some(name, manager.all_tasks)}"
            )
    try:
        loaded = manager.load(list(names))
    except Exception as e:  # a task file is code and data of anyone
        raise ConfigError(f"tasks: {', '.join(names)} cannot be loaded: {type(e).__name__}: {e}") from e
    for name, task in loaded["tasks"].items():
        _check_task(name, task, max_new_tokens, max_seq_len)
        _set_fewshot(name, task, num_fewshot)
    return loaded


def _index(names: Sequence[str], task_path: Sequence[str]) -> TaskManager:
    """Of one's own tasks if they are all that is asked for: to read lm-eval's 14000 takes ten seconds."""
    own = TaskManager(include_path=list(task_path), include_defaults=False)
    alone = all(name in own.all_subtasks for name in names)
    return own if alone else TaskManager(include_path=list(task_path))


def _some(name: str, known: Sequence[str]) -> str:
    """The nearest name; all of them are too many to show."""
    found = nearest(name, known)
    return found if len(found) < 400 else "Their names: lm-eval ls tasks; for example tasks=[arc_easy]"


def _check_task(name: str, task: Task, max_new_tokens: int, max_seq_len: int) -> None:
    """Raises a ValueError for a task that this model or machine should not run."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"tasks: {name} runs what the model writes. For HumanEval there is the section human_eval")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"tasks: {name} has images or audio, and the model reads text only; take another task")
    if task.OUTPUT_TYPE == "generate_until":
        limit, _, _ = generation_settings(name, task.config.generation_kwargs or {}, max_new_tokens)
        if limit >= max_seq_len:
            raise ConfigError(
                f"tasks: {name} generates up to {limit} tokens, which leaves no room for a prompt in the model's "
                f"max_seq_len {max_seq_len}. Lower its max_gen_toks, or max_new_tokens where it has none"
            )


def _set_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    """As lm-eval does it, but what it would ignore is refused."""
    own = task.config.num_fewshot
    if num_fewshot and own == 0:
        raise ConfigError(
            f"num_fewshot: {num_fewshot} is not for {name}, whose file says 0: its prompt is complete. Leave it out"
        )
    task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def generation_settings(
    task: str, gen_kwargs: Mapping[str, Any], max_new_tokens: int
) -> tuple[int, list[str], Sampler]:
    """How a task wants to be answered: at most so many tokens, the strings that end an answer, and the sampler.

    Args:
        task: its name, for messages.
        gen_kwargs: its generation_kwargs. Without do_sample a temperature above 0 samples, as in lm-eval.
        max_new_tokens: if it does not say.

    Raises:
        ValueError: for an argument that we do not have, by name, or a value out of range.
    """
    given = dict(gen_kwargs)
    until = given.pop("until", None) or []
    limits = [value for key in LIMITS if (value := given.pop(key, None)) is not None]
    samples = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if samples else 0.0))
    filters = {key: given.pop(key) for key in FILTERS if key in given}
    for key in given:
        allowed = ", ".join(("until", *LIMITS[:1], "do_sample", "temperature", *FILTERS))
        raise ConfigError(f"tasks: {task} asks for generation_kwargs.{key}, which is not there. Allowed: {allowed}")
    try:
        sampler = Sampler(0.0 if samples is False else temperature, **filters)
    except ValueError as e:
        raise ConfigError(f"tasks: {task}, generation_kwargs.{e}") from e
    stops = [until] if isinstance(until, str) else until
    return int(limits[0] if limits else max_new_tokens), [stop for stop in stops if stop], sampler


def run_tasks(lm: "LayerSkipLM", loaded: Mapping[str, Any], limit: int | None, chat: bool = False) -> dict[str, Any]:
    """Run tasks and print lm-eval's table.

    Args:
        lm: the model.
        loaded: of `load_tasks`; can be run again, with another model.
        limit: documents of each task; None: all.
        chat: whether questions go through the tokenizer's chat template.

    Returns:
        {task or group: {metric: value, metric_stderr: value, ...}}, as in lm-eval with ",filter" behind the metric
        where a task has several; of tasks that generate also tokens, tokens_per_second and acceptance_rate.
    """
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples for each model, those of lm-eval
    results = evaluate(lm, loaded, limit=limit, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat)
    print(f"\n{make_table(results)}")
    if "groups" in results:
        print(make_table(results, "groups"))
    report = {name: _metrics(values) for name, values in results["results"].items()}
    for name, stats in lm.stats.items():
        report[name] |= speed(stats)
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in speed(stats).items() if value is not None)}")
    return report


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Plain numbers: "acc,none" becomes "acc"; names, and errors that cannot be told, are left out."""
    numbers = {key: value for key, value in values.items() if isinstance(value, Real) and not math.isnan(value)}
    documents = numbers.pop("sample_len", None)
    plain = {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
    return plain if documents is None else plain | {"documents": documents}


# ---- the model ----


class LayerSkipLM(TemplateLM):
    """A layer-skip decoder for lm-eval.

    Args:
        answers: the model, its tokenizer, the batch size, and how to generate. Its exit_layer is that of
            log-likelihoods too; self-speculation does not change what the model says, so these are the whole model's.
        max_new_tokens: of generation, where a task does not say.

    Attributes:
        stats: what generation took, by task.
    """

    def __init__(self, answers: Answers, max_new_tokens: int = 256) -> None:
        super().__init__()
        self.answers, self.max_new_tokens = answers, max_new_tokens
        self.model, self.tokenizer, self._device = answers.model, answers.tokenizer, answers.device
        self.max_length = self.model.max_seq_len
        self.stats: dict[str, GenerationStats] = defaultdict(GenerationStats)

    # ---- text and tokens ----

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; 0 if the tokenizer has none."""
        eos = getattr(self.tokenizer, "eos_id", None)
        return 0 if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: bos, or else eos."""
        bos = getattr(self.tokenizer, "bos_id", None)
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, bos first unless add_special_tokens is False, if the tokenizer has one."""
        return self.tokenizer.encode(string, add_bos=add_special_tokens is not False, add_eos=False)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return type(self.tokenizer).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation: up to where the reply begins, or to the end of a begun one."""
        return self.tokenizer.render_prompt(chat_history)

    # ---- log-likelihoods ----

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context tokens, continuation tokens) log p(continuation | context), and whether it is greedy.

        Raises:
            ValueError: if a continuation has no token of its own, or more than the model takes.
        """
        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"tasks: the answer {texts and texts[1]!r} has {len(continuation)} tokens. Allowed: 1 to the "
                    f"model's max_seq_len {self.max_length}"
                )
        self._warn_of_cuts([len(context) + len(answer) - 1 for _, context, answer in requests], self.max_length)
        # The last token predicts nothing, so answers of one token to the same question share a row. Too long a context
        # loses its beginning.
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, answer) in enumerate(requests):
            asked[tuple((context + answer)[:-1][-self.max_length :])].append(i)
        # Longest first: what does not fit into memory shows at once.
        rows = sorted(asked, key=len, reverse=True)
        size, found = self.answers.batch_size, {}
        for at in tqdm(range(0, len(rows), size), desc="loglikelihood", disable=disable_tqdm):
            batch = rows[at : at + size]
            of_batch = [i for row in batch for i in asked[row]]
            scores = self._score(batch, [[requests[i][2] for i in asked[row]] for row in batch])
            found |= zip(of_batch, scores, strict=True)
        return [found[i] for i in range(len(requests))]

    def _score(
        self, rows: Sequence[tuple[int, ...]], answers: Sequence[Sequence[list[int]]]
    ) -> list[tuple[float, bool]]:
        """One forward for a batch; the head runs once at each position that predicts a token of an answer.

        Args:
            rows: tokens that the model reads, an answer's last one left out.
            answers: those that end each row.

        Returns:
            A pair for each answer, in order.
        """
        width = max(map(len, rows))
        # Padded on the right, where causal attention never looks.
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)
        x = self.model(tokens, exit_layer=self.answers.exit_layer, unembed=False)
        lasts = [max(map(len, of_row)) for of_row in answers]
        states = torch.cat([h[len(row) - last : len(row)] for h, row, last in zip(x, rows, lasts, strict=True)])
        places, end = [], 0
        for of_row, last in zip(answers, lasts, strict=True):
            end += last
            places += [end - len(answer) + i for answer in of_row for i in range(len(answer))]
        place = torch.tensor(places, device=self._device)
        target = torch.tensor([t for of_row in answers for answer in of_row for t in answer], device=self._device)
        scores, greedy = torch.zeros_like(place, dtype=torch.float32), torch.zeros_like(place, dtype=torch.bool)
        for start in range(0, len(states), HEAD_TOKENS):
            h = states[start : start + HEAD_TOKENS]
            logits = self.model(hidden=h[None], start_layer=self.model.num_layers)[0].float()
            here = ((place >= start) & (place < start + len(h))).nonzero()[:, 0]
            scores[here] = logits.log_softmax(-1)[place[here] - start, target[here]]
            greedy[here] = logits.argmax(-1)[place[here] - start] == target[here]
        lengths = [len(answer) for of_row in answers for answer in of_row]
        of_answers = zip(scores.split(lengths), greedy.split(lengths), strict=True)
        return [(score.sum().item(), bool(right.all())) for score, right in of_answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token predicted once, from as much of what precedes it as the window holds."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)  # the prefix token stands for bos
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            of_text = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += of_text
            owners += [i] * len(of_text)
        sums = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += score
        return sums

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, gen_kwargs); those of one task with equal gen_kwargs are decoded together.

        Raises:
            ValueError: see `generation_settings`.
        """
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[request.task_name, json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        for (task, _), group in alike.items():
            limit, stops, sampler = generation_settings(task, requests[group[0]].args[1], self.max_new_tokens)
            draft = self.answers.draft
            room = most_positions(self.model, spare_slots(draft, sampler.greedy) if draft else 0)[0] - limit
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            self._warn_of_cuts(map(len, prompts), room)
            texts, stats = self.answers([prompt[-room:] for prompt in prompts], limit, stops, sampler, name=task)
            found |= zip(group, texts, strict=True)
            self.stats[task] += stats
        return [found[i] for i in range(len(requests))]

    def _warn_of_cuts(self, lengths: Iterable[int], room: int) -> None:
        """lm-eval's models all cut too long contexts at their beginning; whoever reads the score should know."""
        cut = sum(length > room for length in lengths)
        if cut:
            log.warning("%d contexts lose their beginning: they are longer than the model's %d tokens", cut, room)
