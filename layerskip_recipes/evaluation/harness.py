"""Runs lm-eval's tasks on a LayerSkipDecoder: at any exit, batched, with this package's generation engine.

Only this module imports lm_eval, and it is imported only for a config with `tasks`.
"""

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from layerskip_recipes.config.schema import nearest
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.evaluation.config import EvalConfig
from layerskip_recipes.generation.drafting.auto_drafts import DraftChoice
from layerskip_recipes.generation.drafting.draft_model import DraftModels
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.text.text_stream import TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.limits import most_positions

log = logging.getLogger(__name__)

HEAD_TOKENS = 512  # compute logits for at most this many positions at once


# ---- tasks ----


def load_tasks(cfg: EvalConfig, tokenizer: Any, max_new_tokens: int, positions: int) -> dict[str, Any]:
    """Load the config's tasks with `TaskManager.load`, after the checks that need no weights. A prompt and its answer
    have at most `positions` tokens."""
    if cfg.apply_chat_template and not getattr(tokenizer, "has_chat_template", False):
        raise ConfigError(
            f"apply_chat_template: this {type(tokenizer).__name__} has no chat template. Allowed: "
            "tokenizer={_component_: layerskip_recipes.hf_tokenizer, path: FOLDER} with a chat model's folder, or "
            "apply_chat_template=false"
        )
    # Listing lm-eval's own 14,000 tasks takes over ten seconds, so try the user's task files first.
    names, folders = list(dict.fromkeys(cfg.tasks or [])), cfg.task_path
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.task_index:
            near = nearest(name, manager.all_tasks)
            hint = near if len(near) < 400 else "Their names: lm-eval ls tasks; for example tasks=[arc_easy]"
            raise ConfigError(f"tasks: {name!r} is no task, group or tag of lm-eval's. {hint}")
        # Check before loading, because loading would fetch the metric that runs programs.
        if (manager.task_index[name].cfg or {}).get("unsafe_code"):
            _check_confirmed(name, cfg)
    if cfg.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric `code_eval` reads this
    try:
        loaded = manager.load(names)
    except Exception as e:  # task files can contain any code
        raise ConfigError(f"tasks: {', '.join(names)} cannot be loaded: {type(e).__name__}: {e}") from e
    # The tasks of groups and tags are known only now.
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            _check_confirmed(name, cfg)
        _prepare_task(name, task, cfg.num_fewshot, max_new_tokens, positions)
    return loaded


def _check_confirmed(name: str, cfg: EvalConfig) -> None:
    if not cfg.confirm_run_unsafe_code:
        raise ConfigError(
            f"tasks: {name} runs programs that the model writes, without a sandbox. To allow it, preferably in a "
            "container or a virtual machine: confirm_run_unsafe_code=true"
        )


def _prepare_task(name: str, task: Task, num_fewshot: int | None, max_new_tokens: int, positions: int) -> None:
    """Refuse a task that this model cannot run, and set its number of examples. (lm-eval refuses multimodal tasks.)"""
    if task.OUTPUT_TYPE == "generate_until":
        limit, _, _ = generation_settings(name, task.config.generation_kwargs or {}, max_new_tokens)
        if limit >= positions:
            raise ConfigError(
                f"tasks: {name} generates up to {limit} tokens, which leaves no room for a prompt in the model's "
                f"max_seq_len {positions}. Lower its max_gen_toks, or max_new_tokens if it has none"
            )
    own = task.config.num_fewshot
    if num_fewshot and own == 0:  # lm-eval would silently ignore num_fewshot
        raise ConfigError(
            f"num_fewshot: {num_fewshot} is not for {name}, whose file says 0: its prompt is complete. Leave it out"
        )
    task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def generation_settings(
    task: str, gen_kwargs: Mapping[str, Any], max_new_tokens: int
) -> tuple[int, list[str], Sampler]:
    """The maximum length, stop strings and sampler that a task asks for.

    As in lm-eval, a temperature above 0 samples even without do_sample. do_sample without a temperature samples at 1.
    """
    default = {"temperature": 1.0 if gen_kwargs.get("do_sample") else 0.0}
    given: dict[str, Any] = {**normalize_gen_kwargs(default | dict(gen_kwargs), max_new_tokens)}
    until, limit, _, temperature = (given.pop(key) for key in ("until", "max_gen_toks", "do_sample", "temperature"))
    try:
        sampler = Sampler(float(temperature), **given)
    except (TypeError, ValueError) as e:  # an unknown key, or a wrong value
        raise ConfigError(f"tasks: {task}, generation_kwargs: {e}") from e
    return limit, [stop for stop in until if stop], sampler


def run_tasks(lm: "LayerSkipLM", loaded: Mapping[str, Any], limit: int | None, chat: bool = False) -> dict[str, Any]:
    """Run the tasks from `load_tasks`, print lm-eval's table, and return the metrics by task or group; generation tasks
    also have tokens, tokens_per_second and acceptance_rate."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same few-shot examples for every model, as in lm-eval
    results = evaluate(
        lm,
        loaded,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=True,  # load_tasks refused every unconfirmed task
    )
    print(f"\n{make_table(results)}")
    if "groups" in results:
        print(make_table(results, "groups"))
    report = {name: _metrics(values) for name, values in results["results"].items()}
    for name, stats in lm.stats.items():
        speed = {"tokens": stats.tokens, "tokens_per_second": stats.tokens_per_second}
        speed |= {"acceptance_rate": stats.acceptance_rate} if stats.drafted else {}
        report[name] |= speed
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in speed.items() if value is not None)}")
    return report


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numeric values of a task without NaN standard errors; "acc,none" becomes "acc"."""
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, Real) and not math.isnan(value)}
    count = {"documents": values["sample_len"]} if numbers.pop("sample_len", None) is not None else {}
    return {key.removesuffix(",none"): value for key, value in numbers.items()} | count


# ---- the model ----


class LayerSkipLM(TemplateLM):
    """The decoder as a model of lm-eval. `stats` has the generation statistics by task."""

    def __init__(
        self,
        model: LayerSkipDecoder,
        tokenizer: Any,
        *,
        batch_size: int = 1,
        exit_layer: int | None = None,
        drafts: DraftChoice | None = None,
        seed: int = 0,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self._device = model, tokenizer, model.tok_embeddings.weight.device
        self.batch_size, self.exit_layer, self.drafts = batch_size, exit_layer, drafts
        self.draft_models = DraftModels()
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.max_length = model.max_seq_len
        self.stats: dict[str, GenerationStats] = defaultdict(GenerationStats)

    # ---- text and tokens ----

    @property
    def eot_token_id(self) -> int:
        """eos, or 0 if the tokenizer has none."""
        eos = getattr(self.tokenizer, "eos_id", None)
        return 0 if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: bos, or eos if the tokenizer has no bos."""
        bos = getattr(self.tokenizer, "bos_id", None)
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, with bos if the tokenizer has one, unless add_special_tokens is False."""
        return self.tokenizer.encode(string, add_bos=add_special_tokens is not False, add_eos=False)

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation up to the start of the reply, or to the end of a partial reply."""
        try:
            return self.tokenizer.template.prompt(chat_history, self.tokenizer.enable_thinking).text
        except TemplateError as e:
            raise ConfigError(
                f"apply_chat_template: the chat template rejects a task's prompt ({e}). Set apply_chat_template=false"
            ) from e

    # ---- log-likelihoods ----

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether greedy decoding gives the continuation."""
        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"tasks: the answer {texts and texts[1]!r} has {len(continuation)} tokens. Allowed: 1 to the "
                    f"model's max_seq_len {self.max_length}"
                )
        self._warn_of_cuts([len(context) + len(answer) - 1 for _, context, answer in requests], self.max_length)
        # The last token predicts nothing, so one-token answers to the same question share a row. Contexts that are too
        # long lose their beginning.
        requests_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, answer) in enumerate(requests):
            requests_of[tuple((context + answer)[:-1][-self.max_length :])].append(i)
        # Longest first, so that a lack of memory shows at the start.
        rows = sorted(requests_of, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(rows), self.batch_size), desc="loglikelihood", disable=disable_tqdm):
            batch = rows[start : start + self.batch_size]
            # Pad on the right: causal attention never sees the padding.
            tokens = torch.tensor([[*row, *[0] * (len(batch[0]) - len(row))] for row in batch], device=self._device)
            for row, states in zip(batch, self.model(tokens, exit_layer=self.exit_layer, unembed=False), strict=True):
                found |= {i: self._score(states[: len(row)], requests[i][2]) for i in requests_of[row]}
        return [found[i] for i in range(len(requests))]

    def _score(self, states: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
        """log p of an answer, and whether greedy decoding gives it, for states [s, d] up to its last token but one."""
        targets = torch.tensor(answer, device=self._device).split(HEAD_TOKENS)
        log_p, is_greedy = 0.0, True
        for h, target in zip(states[-len(answer) :].split(HEAD_TOKENS), targets, strict=True):
            logits = self.model(hidden=h[None], start_layer=self.model.num_layers)[0].float()
            log_p -= F.cross_entropy(logits, target, reduction="sum").item()
            is_greedy = is_greedy and bool((logits.argmax(-1) == target).all())
        return log_p, is_greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts. Each token is predicted once, from all earlier tokens that fit in its window."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)  # the prefix token replaces bos
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            new = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += new
            owners += [i] * len(new)
        sums = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += score
        return sums

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer each (context, gen_kwargs). Requests of one task with equal gen_kwargs are decoded together."""
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[request.task_name, json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        for (task, _), group in groups.items():
            limit, stops, sampler = generation_settings(task, requests[group[0]].args[1], self.max_new_tokens)
            room = most_positions(self.model)[0] - limit
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            self._warn_of_cuts(map(len, prompts), room)
            answers = self._answers(task, [prompt[-room:] for prompt in prompts], limit, stops, sampler)
            found |= zip(group, answers, strict=True)
        return [found[i] for i in range(len(requests))]

    def _answers(
        self, task: str, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[str], sampler: Sampler
    ) -> list[str]:
        """The text after each prompt, up to a stop token or string, with at most `limit` tokens."""
        # Only a draft vocabulary that is counted in the prompts differs between tasks.
        speculation = None if self.drafts is None else self.drafts.speculation(prompts)
        # Batch prompts of similar length: attention covers as many KV-cache slots as the longest text needs.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        generation = Generation(
            self.model,
            [prompts[i] for i in order],
            limit,
            exit_layer=self.exit_layer,
            speculation=speculation,
            draft_model=self.draft_models.of(speculation, self.model),
            sampler=replace(sampler, seed=self.seed),
            stop_tokens=getattr(self.tokenizer, "stop_tokens", ()),
            rows=self.batch_size,
        )
        streams = [TextStream(self.tokenizer, sorted(generation.rows.stop_tokens), stops, prompts[i]) for i in order]
        with tqdm(total=len(order), desc=task) as progress:
            follow(generation, streams, on_end=lambda prompt: progress.update())
        self.stats[task] += generation.stats
        texts = zip(order, streams, generation.generated, strict=True)
        return [text for _, text in sorted((i, stream.text(tokens)) for i, stream, tokens in texts)]

    def _warn_of_cuts(self, lengths: Iterable[int], room: int) -> None:
        """Warn of contexts that lose their beginning, which also happens with lm-eval's other models."""
        if cut := sum(length > room for length in lengths):
            log.warning("%d contexts lose their beginning: only %d tokens fit", cut, room)
