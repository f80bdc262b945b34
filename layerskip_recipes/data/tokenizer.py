"""A torchtune tokenizer for any Hugging Face folder with a tokenizer.json, with its chat template.

It gives the tokens of transformers' `apply_chat_template`, except where a conversation would show a reply without the
prompt that asks for it, and torchtune's loss mask.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tokenizers import Encoding, Tokenizer
from torchtune import utils
from torchtune.data import Message, truncate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.config.schema import PositiveInt, Text, checked_arguments
from layerskip_recipes.data.chat_template import PLAIN_TEMPLATE, ChatTemplate, Turn, default_template
from layerskip_recipes.data.reply_places import ConversationRenderer, Rendered, reasons
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.model_folder import base_folder, model_folder

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Inside a special token of a user's text, where it keeps the token from being one. A private character, as `MARK`.
GUARD = "\U0010fa58"
SampleLength = Annotated[PositiveInt, Field(examples=[2048])] | None  # in tokens; None: not limited

log = utils.get_logger("INFO")


# Not a subclass of torchtune's HuggingFaceBaseTokenizer: it needs a bos token, may add one despite add_bos=False,
# cannot show special tokens, and does not read special_tokens_map.json.
class HFTokenizer(ModelTokenizer, Transform):
    """Encodes texts, and messages with a chat template; for torchtune's datasets, collators and generation recipes.

    `bos_id` and `eos_id` may be None. `pad_id` is eos_id or 0 if the model has no padding token. `stop_tokens` has eos,
    other stop tokens of the model, and the end of an assistant's turn. `vocab_size` is the largest id + 1.

    Args:
        path: a folder with a tokenizer.json, a run of layerskip_finetune, or a name on the hub.
        max_seq_len: truncate messages to this number of tokens. None: never.
        chat_template: Jinja text. None: the folder's default template or, without one, the plain texts.
        truncation_type: "right" drops the end (and keeps eos last), "left" drops the beginning.
        enable_thinking: let a reasoning model think when it answers. In training the replies decide: one with </think>
            follows a prompt that lets the model think.
    """

    @checked_arguments("tokenizer.")
    def __init__(
        self,
        path: Annotated[Text, Field(examples=["/tmp/SmolLM2-135M-Instruct"])],
        max_seq_len: SampleLength = None,
        chat_template: str | None = None,
        truncation_type: Literal["right", "left"] = "right",
        enable_thinking: bool = False,
    ) -> None:
        self.max_seq_len, self.truncation_type, self.enable_thinking = max_seq_len, truncation_type, enable_thinking
        self.path = path
        self._warned = self._told = False
        folder, config, generation_config = _read_settings(path)
        self._tokenizer = _read_tokenizer(folder)
        # A token is written as text, or as a mapping with its flags.
        in_config = {key: config[key] for key in NAMED_TOKENS if config.get(key)}
        named = {key: token if isinstance(token, str) else token["content"] for key, token in in_config.items()}
        self._find_special_tokens(named.values())
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        # Choose bos, eos and pad.
        stop_ids = generation_config.get("eos_token_id")
        stop_ids = stop_ids if isinstance(stop_ids, list) else [] if stop_ids is None else [stop_ids]
        bos_id, eos_id, pad_id = (
            self._tokenizer.token_to_id(named.get(f"{name}_token", "")) for name in ("bos", "eos", "pad")
        )
        if bos_id is None:
            bos_id = generation_config.get("bos_token_id")
        # Ignore a bos token that is never added to texts, as in GPT-2 and SmolLM2.
        adds_bos = bos_id in self._tokenizer.encode("").ids or config.get("add_bos_token") is True
        self.bos_id = bos_id if adds_bos else None
        self.eos_id = next((i for i in (eos_id, *stop_ids) if i is not None), None)
        self.pad_id = next(i for i in (pad_id, self.eos_id, 0) if i is not None)
        # Choose the chat template.
        source = chat_template or default_template(folder, config)
        if source is None:
            source = PLAIN_TEMPLATE
            ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            named = {key: "" if i is None else self._tokenizer.id_to_token(i) or "" for key, i in ends.items()}
        self.template = ChatTemplate(source, named, [*self.special_tokens])
        stops = [self.eos_id, *stop_ids, self.special_tokens.get(self.template.end_of_turn() or "")]
        self.stop_tokens = list(dict.fromkeys(i for i in stops if i is not None))

    def _find_special_tokens(self, named: Iterable[str]) -> None:
        """Find special tokens, and the tokens at which a text may be cut. `named`: those that the settings name."""
        tokenizer = self._tokenizer
        # Register special tokens that are only in the base vocabulary: they would be split up in a text.
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([t for t in named if t not in known and tokenizer.token_to_id(t) is not None])
        # A text may be cut before tokens that are found in any text, whatever comes before them.
        added = [t for t in tokenizer.get_added_tokens_decoder().values() if not t.normalized]
        self._cut_tokens = {t.content for t in added if not (t.lstrip or t.single_word)}
        by_length = sorted((t.content for t in added), key=len, reverse=True)
        self._cuts = re.compile("|".join(map(re.escape, [GUARD, *by_length])))
        self.special_tokens = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}

    @property
    def has_chat_template(self) -> bool:
        return self.template.source != PLAIN_TEMPLATE

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode a text; adds bos and eos if the tokenizer has them, but never twice."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=skip_special_tokens)

    def prompt(self, text: str) -> list[int]:
        """Encode a user's message up to the start of the reply; without a chat template, only the text."""
        if not self.has_chat_template:
            return self.encode(text, add_eos=False)
        return self.tokenize_messages([Message(role="user", content=text)], add_end_tokens=False)[0]

    def tokenize_messages(
        self,
        messages: Sequence[Message],
        *,
        add_end_tokens: bool = True,
        enable_thinking: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation.

        Args:
            messages: text messages; of a `ChatMessage` the template reads the other keys too.
            add_end_tokens: True renders the whole conversation. False renders a prompt: up to the start of the
                assistant's reply or, if the last message is an unfinished reply, up to the end of its content.
            enable_thinking: let a reasoning model think when it answers a prompt. A conversation's replies decide.
            tools: the functions that the template offers to the model, as JSON schemas.

        Returns:
            Token ids, and a mask of the same length that is True where there is no loss: in `masked` messages, in
            prompts, and at an eos that replaces a truncated end. Of an assistant's message only its content and its end
            token count, which the model writes; the tokens before them are those of the prompt. Other messages include
            their headers.
        """
        if not messages:
            raise ConfigError("messages: there are none")
        if any(message.contains_media for message in messages):
            raise ConfigError("messages: this tokenizer takes text only, and one of them has an image")
        self._warn_of_template()
        template, turns = self.conversation(messages, tools)
        renderer = ConversationRenderer(template)
        if not add_end_tokens:
            rendered = renderer.prompt(turns, enable_thinking or self.enable_thinking)
            tokens, _ = self._encode(rendered)
            return self._truncate(tokens, [True] * len(tokens), None)

        if not (self._told or self.enable_thinking) and reasons(turns) and "enable_thinking" in self.template.source:
            self._told = True
            log.info("tokenizer: replies have reasoning, so ask the trained model with tokenizer.enable_thinking=true")
        rendered = renderer.conversation(turns)
        tokens, last_chars = self._encode(rendered)
        ends, indices = zip(*rendered.message_ends, strict=True)
        replies = sorted(rendered.replies.items(), key=lambda reply: reply[1].start)
        starts = [reply.start for _, reply in replies]

        def is_masked(char: int) -> bool:
            at = bisect_right(starts, char) - 1
            if at >= 0 and char < replies[at][1].end:
                return messages[replies[at][0]].masked
            message = messages[indices[min(bisect_right(ends, char), len(ends) - 1)]]
            return message.masked or message.role == "assistant"

        return self._truncate(tokens, [is_masked(char) for char in last_chars], self.eos_id)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[ChatTemplate, list[Turn]]:
        """The template with its tools, and what it reads of each message.

        All texts that the model does not write have a guard inside their special tokens.
        """
        turns: list[Turn] = []
        for message in messages:
            turn = {"role": message.role, "content": message.text_content, **getattr(message, "others", {})}
            turns.append(turn if message.role == "assistant" else _with_texts(turn, self.guarded))
        lacks_tools = bool(tools) and "tools" not in self.template.source
        if lacks_tools or (any("tool_calls" in turn for turn in turns) and not self.template.writes_calls):
            raise ConfigError(
                f"tokenizer.chat_template: leaves out {'tools' if lacks_tools else 'tool_calls'} of a conversation. "
                "Give one that writes them, or write them into the contents"
            )
        if tools is None:
            return self.template, turns
        return replace(self.template, tools=_with_texts(tools, self.guarded)), turns

    def guarded(self, text: str) -> str:
        """A text whose special tokens are only text in a chat template, like those of users."""
        if not self.special_tokens:
            return text
        return self.template.special_pattern.sub(lambda match: match[0][:1] + GUARD + match[0][1:], text)

    def _encode(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """The tokens of a conversation, and the position of each token's last character in its text.

        No token reaches across a guard, or from a prompt into its reply.
        """
        text = rendered.text
        starts = sorted(reply.start for reply in rendered.replies.values())
        ids: list[int] = []
        last_chars: list[int] = []

        def encode(start: int, stop: int) -> Encoding:
            return self._tokenizer.encode(text[start:stop], add_special_tokens=False)

        def add(start: int, encoding: Encoding) -> None:
            ids.extend(encoding.ids)
            # The last character: some tokenizers' offsets leave out a leading space.
            last_chars.extend(start + max(end - 1, 0) for _, end in encoding.offsets)

        for start, stop in self._pieces(text):
            encoding = encode(start, stop)
            for reply_start in starts[bisect_right(starts, start) : bisect_left(starts, stop)]:
                prompt = encode(start, reply_start)
                if encoding.ids[: len(prompt.ids)] != prompt.ids:
                    add(start, prompt)
                    start, encoding = reply_start, encode(reply_start, stop)
            add(start, encoding)
        return ids, last_chars

    def _pieces(self, text: str) -> Iterator[tuple[int, int]]:
        """Cut a text at its guards, and before special tokens, where it has the same tokens in pieces as in one.

        Otherwise each reply would be compared with all of the text before it.
        """
        start = 0
        for match in self._cuts.finditer(text):
            if match[0] == GUARD:
                yield start, match.start()
                start = match.end()
            elif match[0] in self._cut_tokens and match.start() > start:
                yield start, match.start()
                start = match.start()
        yield start, len(text)

    def _warn_of_template(self) -> None:
        """Warn once of a conversation that the model can hardly learn."""
        if self._warned:
            return
        self._warned = True
        if not self.has_chat_template:
            log.warning(
                f"tokenizer.path: {self.path} has no chat template, so question and answer are joined without a "
                "separator. Use an instruct model, or give tokenizer.chat_template"
            )
        if self.template.end_of_turn() is None:
            log.warning(
                "tokenizer: nothing ends a reply, neither a special token in the chat template nor an eos token. The "
                "model does not learn to stop, and generates up to max_new_tokens. Give tokenizer.chat_template"
            )

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace "messages" and "tools" in a sample by "tokens" and "mask".

        `inference` renders a prompt; a true "enable_thinking" in the sample then lets a reasoning model think.
        """
        rest = {key: sample[key] for key in sample if key not in ("messages", "tools", "enable_thinking")}
        thinking = sample.get("enable_thinking", False)
        tokens, mask = self.tokenize_messages(
            sample["messages"], add_end_tokens=not inference, enable_thinking=thinking, tools=sample.get("tools")
        )
        return {**rest, "tokens": tokens, "mask": mask}

    def _truncate(self, tokens: list[int], mask: list[bool], eos_id: int | None) -> tuple[list[int], list[bool]]:
        limit = self.max_seq_len
        if limit is None or len(tokens) <= limit:
            return tokens, mask
        if self.truncation_type == "left":  # keeps the end tokens of the text
            return tokens[-limit:], mask[-limit:]
        return truncate(tokens, limit, eos_id), truncate(mask, limit, None if eos_id is None else True)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list) else value


hf_tokenizer = HFTokenizer  # its name in configs


def _read_settings(path: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of tokenizer.json, its settings of the tokenizer, and the model's settings of generation."""
    folder = model_folder(path, "tokenizer.path")
    base = base_folder(folder, "tokenizer.path")
    if not (folder / "tokenizer.json").is_file():
        folder = base  # adapters without a tokenizer of their own
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer.path: {folder} has no tokenizer.json; only fast tokenizers are supported. "
            "Convert it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    config = read_json(folder / "tokenizer_config.json", "tokenizer.path", {})
    if "added_tokens_decoder" not in config:  # else transformers ignores the map, too
        config |= read_json(folder / "special_tokens_map.json", "tokenizer.path", {})
    return folder, config, read_json(base / "generation_config.json", "tokenizer.path", {})


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # tokenizers raises nothing more specific
        raise ConfigError(f"tokenizer.path: {folder}/tokenizer.json cannot be read: {e}") from e
    tokenizer.no_padding()  # some folders contain settings of the run that saved them
    tokenizer.no_truncation()
    return tokenizer
