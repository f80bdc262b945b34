"""Answers requests with an `LLM`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtune import training
from torchtune.data import Message

from layerskip_recipes.checkpoint.checkpointer_checks import prepare_device
from layerskip_recipes.generation.choosing import choose_decoding
from layerskip_recipes.generation.drafting.planner import DraftPlanner
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY
from layerskip_recipes.generation.llm import LLM, pieces
from layerskip_recipes.generation.text.prompts import predicted_tokens, to_tokens
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.limits import check_prompt_lengths, check_vocabulary, most_positions
from layerskip_recipes.serving.config import ServeConfig
from layerskip_recipes.serving.requests import ChatRequest, CompletionRequest, Ending, messages_of, predictions_of

EXPECTED_REQUESTS = 1000  # to decide whether compiling pays
TOKENIZED_CHARACTERS = 2**14  # tokenized at once to see whether a prompt fits


class Answerer:
    """Answers requests by the settings of a config. Mistakes are found before any weight is loaded.

    Attributes:
        name: the model's name in requests.
        max_body_bytes: the longest body of a request that can fit the context.
        llm: after `load`.
    """

    def __init__(self, cfg: ServeConfig) -> None:
        self.device = prepare_device(cfg)
        self.tokenizer = cfg.tokenizer.build()
        model = layerskip_decoder(cfg.meta_model)
        check_vocabulary(self.tokenizer, model)
        system = [Message(role="system", content=cfg.system_prompt)] if cfg.system_prompt else []
        question = [Message(role="user", content="?"), Message(role="assistant", content="")]
        to_tokens([*system, *question], self.tokenizer)  # a template that refuses the system prompt says so now
        planner = DraftPlanner.of_config(cfg, cfg.quantizer)
        self.cfg, self.plan = choose_decoding(cfg, planner, EXPECTED_REQUESTS * cfg.max_new_tokens)
        # For requests with predictions.
        self.plan_with_predictions, _ = planner.plan(
            cfg.self_speculation, cfg.temperature, bool(self.cfg.compile), has_predictions=True
        )
        self.name = Path(cfg.model_dir or cfg.output_dir or cfg.given_folder or "model").name
        self.context = most_positions(model)[0]
        self.max_body_bytes = 2**16 + 32 * self.context  # few texts have so many bytes per token
        training.set_seed(seed=cfg.seed)

    def load(self) -> None:
        """Load and compile the model. Call it in the thread that will decode: torch's current device is its own."""
        self.cfg.find_device()
        self.llm = LLM.of_config(self.cfg, self.device, self.tokenizer, {SECTION_KEY: self.plan})
        short = CompletionRequest.parse({"prompt": "?", "max_tokens": min(24, self.cfg.max_new_tokens)})
        list(self.answer(short, threading.Event()))
        self.llm.restart_rules()  # which measure warm rounds only

    def answer(self, request: ChatRequest | CompletionRequest, gone: threading.Event) -> Iterator[str | Ending]:
        """Pieces of text as they become final, then the `Ending`. Fails with ConnectionAbortedError after `gone`."""

        def check(*_: Any) -> None:
            if gone.is_set():
                raise ConnectionAbortedError

        cfg, prompt = self.cfg, self._tokens(request, check)
        # Without a wish of the client, the answer is shorter at the end of the model's context.
        room = self.context - len(prompt)
        limit = request.max_completion_tokens or request.max_tokens or max(1, min(cfg.max_new_tokens, room))
        check_prompt_lengths(self.llm.model, [len(prompt)], limit, "max_tokens")
        sampler = cfg.sampler(cfg.temperature if request.temperature is None else request.temperature, request.seed)
        sampler = sampler if request.top_p is None else replace(sampler, top_p=request.top_p)
        stop = [*(cfg.stop_strings or []), *([request.stop] if isinstance(request.stop, str) else request.stop)]
        text = self.llm.text_stream(prompt if isinstance(request, CompletionRequest) else (), stop)
        predictions = predicted_tokens(predictions_of(request), prompt, self.tokenizer)
        plan = self.plan_with_predictions if predictions else self.plan
        generation = self.llm.start(
            [prompt],
            limit,
            plan,
            exit_layer=cfg.exit_layer,
            sampler=sampler,
            compile=bool(cfg.compile),
            usual_new_tokens=cfg.max_new_tokens,
            reserve=self.llm.reserved_slots(len(prompt) + limit, plan),
            reuse=len(prompt),
            predictions=[predictions],
        )
        with closing(pieces(generation, text)) as rounds, ExitStack() as hooks:
            generation.context.before_chunk = check
            for layer in self.llm.model.layers:  # torch may read a long chunk for seconds
                hooks.callback(layer.register_forward_pre_hook(check).remove)
            for piece in rounds:
                hooks.close()
                check()
                yield piece
        tokens, stats = generation.generated[0], generation.stats
        usage: dict[str, Any] = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
            "drafted_tokens": stats.drafted,
            "accepted_tokens": stats.accepted,
            "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        }
        yield Ending("stop" if text.stopped or tokens[-1] in self.llm.stop_tokens else "length", usage)

    def _tokens(self, request: ChatRequest | CompletionRequest, check: Callable[[], None]) -> list[int]:
        """The tokens of the request's prompt; calls `check` now and then."""
        if isinstance(request, CompletionRequest):
            self._check_size(request.prompt, check)
            return to_tokens(request.prompt, self.tokenizer)
        messages, system = messages_of(request), self.cfg.system_prompt
        if system and messages[0].role != "system":
            messages.insert(0, Message(role="system", content=system))
        self._check_size("".join(message.text_content for message in messages), check)
        # Clients write the assistant's messages, too: no text of theirs may hold a special token.
        guarded = getattr(self.tokenizer, "guarded", str)
        messages = [Message(role=m.role, content=guarded(m.text_content)) for m in messages]
        return to_tokens([*messages, Message(role="assistant", content="")], self.tokenizer)

    def _check_size(self, text: str, check: Callable[[], None]) -> None:
        """Refuse a text that cannot fit, before all of it is tokenized and before the template adds more tokens."""
        num_tokens = 0
        for start in range(0, len(text), TOKENIZED_CHARACTERS):
            check()
            num_tokens += len(to_tokens(text[start : start + TOKENIZED_CHARACTERS], self.tokenizer))
            if num_tokens > self.context + self.context // 8:  # cut into pieces, a text may have more tokens
                check_prompt_lengths(self.llm.model, [num_tokens], 1)
