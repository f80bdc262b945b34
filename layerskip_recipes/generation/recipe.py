"""`tune run layerskip_generate`: batches, streaming, chat, comparison and several processes around `Generation`."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config, training, utils
from torchtune.data import Message

from layerskip_recipes.checkpoint.checkpointer_checks import prepare_device
from layerskip_recipes.distributed.tensor_parallel import check_processes
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.choosing import choose_decoding
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.fitting_memory import check_memory
from layerskip_recipes.generation.llm import LLM
from layerskip_recipes.generation.prefill import common_start
from layerskip_recipes.generation.report import Totals, make_report, print_report
from layerskip_recipes.generation.sampling import copies_before
from layerskip_recipes.generation.text.prompts import (
    Example,
    encode,
    predicted_tokens,
    refuse_bad,
    to_tokens,
    try_examples,
)
from layerskip_recipes.generation.text.text_stream import AnswersInOrder, TextStream, follow
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.limits import check_prompt_lengths, check_vocabulary, most_positions
from layerskip_recipes.processes import init_processes, is_rank_zero, num_processes, same_on_all

log = utils.get_logger("INFO")

NEW = "/new"  # forgets the conversation
TURNS = 10  # expected number of turns in a conversation, to decide whether compiling pays


class LayerSkipGenerate:
    """Generates from each prompt and reports speed and acceptance. Mistakes are found before any weight is loaded."""

    def __init__(self, source: DictConfig) -> None:
        self.cfg = cfg = GenerateConfig.load(source)
        log.setLevel(cfg.log_level)
        self.device, self.dtype = prepare_device(cfg), cfg.torch_dtype
        self.max_new_tokens = cfg.max_new_tokens
        self.interactive = cfg.is_conversation
        self.compare = cfg.compares and not self.interactive
        if cfg.compares and self.interactive:
            log.info("benchmark.compare: ignored in a conversation")
        self.parallel = check_processes(cfg.meta_model, cfg.tensor_parallel_dim, cfg.tensor_parallel_plan)
        model = layerskip_decoder(cfg.meta_model)
        self.exit_layer = cfg.exit_layer
        self.tokenizer = cfg.tokenizer.build()
        check_vocabulary(self.tokenizer, model)
        self._read_prompts(model)
        self._choose_drafts()
        self.compile = bool(self.cfg.compile)
        below_exit = (self.exit_layer or 0) if self.plan is None else self.plan.model_layers
        self.kept_layers = below_exit if below_exit < model.num_layers else 0
        self.stop_strings = self.cfg.stop_strings or []
        # Join the other processes. This comes before the seed, which they share.
        init_processes(self.device.type)
        if self.device.type == "cuda" and num_processes() > 1:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if not same_on_all((self.good, self.prompt_tokens, self.predictions)):
            raise ConfigError(
                "prompts: differ between ranks. Allowed: the same on all of them, so none that each draws for itself; "
                "for example prompt_file=prompts.jsonl"
            )
        if not self.interactive:
            self._check_memory()  # only now, as each process has its own GPU
        self.interrupted = False
        self.seed = training.set_seed(seed=self.cfg.seed)
        self.shows = is_rank_zero()

    def _read_prompts(self, model: LayerSkipDecoder) -> None:
        """Read and tokenize the prompts."""
        self.examples: list[Example] = []
        self.prompt_tokens: list[list[int]] = []
        if self.interactive:
            self._tokens_of([], "?")  # a template that refuses the system prompt says so now
        else:
            examples = try_examples(self.cfg.prompt, self.cfg.prompts, self.cfg.prompt_file)
            self.examples, self.prompt_tokens = encode(examples, self.tokenizer, model, self.max_new_tokens)
        self.prompts = [example.prompt for example in self.examples]
        pairs = zip(self.examples, self.prompt_tokens, strict=True)
        self.predictions = [predicted_tokens(example.prediction, tokens, self.tokenizer) for example, tokens in pairs]
        self.numbers = copies_before(self.prompt_tokens)  # equal prompts get different samples
        self.good = [i for i, example in enumerate(self.examples) if example.error is None]
        bad = [example.error for example in self.examples if example.error is not None]
        if self.cfg.on_bad_prompt != "skip" or not self.good:
            refuse_bad(self.examples, hint=". on_bad_prompt=skip answers the rest")
        for error in bad:
            log.warning("skipped: %s", error)
        self.batch_size = min(self.cfg.batch_size, len(self.good) or 1)
        # The beginning that all prompts share is read once.
        self.common = common_start([self.prompt_tokens[i] for i in self.good]) if self.good else 0

    def _choose_drafts(self) -> None:
        batches = TURNS if self.interactive else -(-len(self.good) // self.batch_size)
        num_steps = batches * self.max_new_tokens * (2 if self.compare else 1)
        prompts = [self.prompt_tokens[i] for i in self.good]
        self.cfg, self.plan = choose_decoding(
            self.cfg,
            DraftPlanner.of_config(self.cfg, self.cfg.quantizer),
            num_steps,
            prompts,
            self.batch_size,
            any(self.predictions),
        )

    def _check_memory(self) -> None:
        rows, longest = self.batch_size, max(len(self.prompt_tokens[i]) for i in self.good)
        if self.device.type == "cuda" and self.compile and self.compare:
            rows += len(self.good) % rows  # CUDA graphs keep the cache of the last batch beside the others'
        slots = check_memory(
            self.cfg,
            self.device,
            [] if self.plan is None else [self.plan],
            rows=rows,
            prompt=longest,
            new_tokens=self.max_new_tokens,
            compares=self.compare,
            kept_layers=self.kept_layers,
            parallel=self.parallel,
        )
        # The same for all batches, so that steps are compiled for one size.
        self.reserve = slots if self.compile else None

    def setup(self) -> None:
        if self.shows and log.isEnabledFor(logging.INFO):
            config.log_config(recipe_name=type(self).__name__, cfg=self.cfg.source)
            log.setLevel(self.cfg.log_level)  # which torchtune has set to DEBUG
        if num_processes() > 1:
            self.llm = LLM.of_sharded_config(
                self.cfg, self.device, self.tokenizer, self.plan, self.kept_layers, self.parallel
            )
        else:
            self.llm = LLM.of_config(self.cfg, self.device, self.tokenizer, {SECTION_KEY: self.plan})

    def generate(self) -> dict[str, Any]:
        """Answer all prompts; prints the report as JSON in the last line.

        After Ctrl-C the report covers what is done, including the text in progress unless there is a comparison.
        """
        ours, plain = Totals(), Totals()
        try:
            if self.interactive:
                self._chat(ours)
            else:
                self._all_prompts(ours, plain)
        except KeyboardInterrupt:
            self.interrupted = True
            what = f"{len(ours.outputs)} of {len(self.prompts)} prompts"
            log.warning("interrupted: the report covers %s", "the answers so far" if self.interactive else what)
        report = {
            "self_speculation": self.cfg.self_speculation and self.cfg.self_speculation.given,
            "compile": self.compile,
            "exit_layer": self.exit_layer if self.plan is None else self.plan.exit_layer,
            "num_speculations": None if self.plan is None else self.plan.num_speculations,
            "temperature": self.cfg.temperature,
            "batch_size": self.batch_size,
            "prompts": len(ours.outputs),
            "skipped": len(self.examples) - len(self.good),
            **make_report(ours, plain if self.compare else None, self.device),
        }
        if (steps := self.llm.state.compiled) is not None:
            report["compile_s"] = steps.seconds  # including the warm-up
        if self.shows:
            has_chain = self.plan is not None and self.plan.exit_layer is not None
            if (share := ours.stats.plain_share or 0.0) > 0.5 and has_chain:
                log.info(f"drafts did not pay everywhere: {share:.0%} of the rounds went without one")
            print_report(report)
            print(json.dumps(report), flush=True)
        return report

    def _all_prompts(self, ours: Totals, plain: Totals) -> None:
        order = self.good
        if self.batch_size > 1:
            order = sorted(order, key=lambda i: len(self.prompt_tokens[i]))
        # A comparison decodes each batch twice. Otherwise one generation takes all prompts, unless batch_size is 1.
        size = self.batch_size if self.compare or self.batch_size == 1 else len(order)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if self.compare:
            # Warm-up: the first steps of a process allocate, tune and compile.
            for drafts in (False, True):
                self._run(batches[0], min(8, self.max_new_tokens), drafts=drafts)
            self.llm.restart_rules()  # which measure warm rounds only
            if self.interrupted:
                raise KeyboardInterrupt
        path = self.cfg.output_file if self.shows else None
        with AnswersInOrder(path, self.examples, self._show) as answers:
            for batch in batches:
                plain_run = self._run(batch, self.max_new_tokens, drafts=False) if self.compare else None
                our_run = self._run(batch, self.max_new_tokens, stream=self.batch_size == 1, answers=answers)
                if plain_run is None:
                    ours.add(batch, our_run)
                elif not self.interrupted:  # after Ctrl-C, neither side of a comparison counts
                    plain.add(batch, plain_run)
                    ours.add(batch, our_run)
                if self.interrupted:
                    raise KeyboardInterrupt

    def _run(
        self,
        batch: Sequence[int],
        limit: int,
        drafts: bool = True,
        stream: bool = False,
        answers: AnswersInOrder | None = None,
    ) -> Generation:
        """Decode a batch; `answers` gets each answer, after Ctrl-C also unfinished ones."""
        prompts = [self.prompt_tokens[i] for i in batch]
        texts = [self.text_of(i) for i in batch]
        shown = texts[0] if stream and self.shows else None
        if shown is not None:
            self._print_head(batch[0])
        generation = self._generation(
            prompts,
            limit,
            drafts,
            shown,
            reserve=self.reserve,
            rows=self.batch_size,
            numbers=[self.numbers[i] for i in batch],
            predictions=[self.predictions[i] for i in batch],
            reuse=self.common,
        )
        answered = set()

        def add(prompt: int) -> None:  # index within the batch
            if answers is not None and self.shows:
                tokens, cut = generation.generated[prompt], not generation.finished[prompt]
                answers.add(batch[prompt], texts[prompt].text(tokens), len(tokens), interrupted=cut)
            answered.add(prompt)

        try:
            follow(generation, texts, shown if self.cfg.stream else None, add, counts_text=not self.compare)
        except KeyboardInterrupt:
            if not drafts or not any(generation.generated):
                raise
            self.interrupted = True
            for prompt in sorted(set(range(len(batch))) - answered):
                if generation.generated[prompt]:
                    add(prompt)
        if shown is not None:
            print("" if self.cfg.stream else shown.text(generation.generated[0]), flush=True)
        return generation

    def _generation(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        drafts: bool = True,
        shown: TextStream | None = None,
        **arguments: Any,
    ) -> Generation:
        """A generation with the config's settings; without `drafts`, a plain one of the whole model."""
        dim_drafts = shown is not None and self.cfg.stream == "draft" and sys.stdout.isatty()
        return self.llm.start(
            prompts,
            limit,
            self.plan if drafts else None,
            exit_layer=self.exit_layer if drafts else None,
            sampler=self.cfg.sampler(self.cfg.temperature, self.seed),
            compile=self.compile,
            usual_new_tokens=self.max_new_tokens,
            on_draft=shown.show_draft if dim_drafts else None,
            **arguments,
        )

    def text_of(self, i: int) -> TextStream:
        """The text stream of an output; after a prompt of raw text it continues that text exactly."""
        continued = self.prompt_tokens[i] if isinstance(self.prompts[i], str) else ()
        return self.llm.text_stream(continued, self.stop_strings)

    def _show(self, i: int, answer: str) -> None:
        """Print an answer of a batch; with batch_size 1 it was printed as it grew."""
        if self.batch_size > 1:
            self._print_head(i)
            print(answer, flush=True)

    def _print_head(self, i: int) -> None:
        prompt = self.prompts[i]
        prompt = prompt if isinstance(prompt, str) else prompt["user"]
        print(f"\n--- prompt {i + 1} of {len(self.prompts)}\n{prompt}", end="\n>>> ", flush=True)

    # ---- chat ----

    def _chat(self, ours: Totals) -> None:
        """Answer questions from standard input; the cache keeps the conversation."""
        history: list[Message] = []
        cache, context = None, most_positions(self.llm.model)[0]
        for turn, question in enumerate(_questions()):
            if question == NEW:
                history.clear()
                continue
            tokens: list[int] = []
            try:
                tokens = self._tokens_of(history, question)
                # Shorter answers at the end of the model's context.
                limit = max(1, min(self.max_new_tokens, context - len(tokens)))
                check_prompt_lengths(self.llm.model, [len(tokens)], limit)
            except ValueError as e:
                is_full = len(tokens) >= context > len(self._tokens_of([], question)) if tokens and history else False
                full = f"the conversation is full. {NEW} starts another one; " if is_full else ""
                log.warning("%sthe question is left out: %s", full, e)
                continue
            answer = self.llm.text_stream(stop=self.stop_strings)
            reserve = self.llm.reserved_slots(len(tokens) + limit, self.plan)
            generation = self._generation([tokens], limit, shown=answer, cache=cache, reserve=reserve)
            try:
                follow(generation, [answer], answer if self.cfg.stream else None)
            except KeyboardInterrupt:
                log.warning("interrupted")
            cache = generation.cache
            if not generation.generated[0]:
                continue  # interrupted before the first token
            print("" if self.cfg.stream else answer.text(generation.generated[0]), flush=True)
            history.append(Message(role="user", content=question))
            history.append(Message(role="assistant", content=answer.text(generation.generated[0])))
            ours.add([turn], generation)

    def _tokens_of(self, history: Sequence[Message], question: str) -> list[int]:
        """System prompt, conversation and question as tokens; a ConfigError if the chat template refuses them."""
        system = [Message(role="system", content=self.cfg.system_prompt)] if self.cfg.system_prompt else []
        turn = [Message(role="user", content=question), Message(role="assistant", content="")]
        return to_tokens([*system, *history, *turn], self.tokenizer)


def _questions() -> Iterator[str]:
    """Lines of standard input until it ends, or /exit."""
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as e:
            log.warning("the question is left out: %s", e)
            continue
        if question == "/exit":
            return
        if question:
            yield question
