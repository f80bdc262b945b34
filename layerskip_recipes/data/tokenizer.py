"""A torchtune model tokenizer made of any Hugging Face tokenizer folder, with its chat template.

torchtune has one tokenizer class per model family, and for other models only a bare encoder that neither pads nor
knows messages. Here the folder says it all: tokenizer.json the encoding; tokenizer_config.json, special_tokens_map.json
and generation_config.json the special tokens; chat_template.jinja or tokenizer_config.json the template.
Tokens are those of transformers' `apply_chat_template`, the loss mask is torchtune's. In a config:

    tokenizer:
      _component_: layerskip_recipes.hf_tokenizer
      path: /tmp/SmolLM2-135M-Instruct
      max_seq_len: 2048
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torchtune.data import Message, truncate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from layerskip_recipes.config.checks import check_number, check_text
from layerskip_recipes.errors import ConfigError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a folder without a chat template gets: bos, then the contents as they stand, eos after each assistant message.
# Separators are the dataset's business (`prompt_template`), as for torchtune's tokenizers of base models.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Stands in for a message's content, to see where the template puts it. From Unicode's private use area: no text has it.
MARK = "\U0010fa57"


def hf_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    chat_template: str | None = None,
    truncation_type: str = "right",
) -> "HFTokenizer":
    """The model tokenizer of a Hugging Face folder.

    Args:
        path: the folder; it must have a tokenizer.json.
        max_seq_len: length in tokens that messages are truncated to. None: never.
        chat_template: Jinja text, or the name of one of the folder's templates. None: the folder's default template;
            if it has none, `PLAIN_TEMPLATE`.
        truncation_type: "right" drops the end (and keeps eos last), "left" drops the beginning.

    Returns:
        A tokenizer for torchtune's datasets, collators and generation recipes.

    Raises:
        ValueError: if the folder, its tokenizer.json or the template is missing, or another argument is out of range.
    """
    check_text("tokenizer.path", path, example="/tmp/SmolLM2-135M-Instruct")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"tokenizer.path: there is no folder {folder}")
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer.path: {folder} has no tokenizer.json; only fast tokenizers are supported. "
            "transformers writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # else the map is a left-over that transformers does not read either
        config |= _read_json(folder / "special_tokens_map.json")
    generation_config = _read_json(folder / "generation_config.json")

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the library raises nothing more special
        raise ConfigError(f"tokenizer.path: {folder}/tokenizer.json cannot be read: {e}") from e
    tokenizer.no_padding()  # some folders carry the settings of the run that saved them
    tokenizer.no_truncation()
    named = {key: _content(config[key]) for key in NAMED_TOKENS if config.get(key)}
    # A special token that is only in the base vocabulary would be split up when it stands in a text.
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([t for t in named.values() if t not in known and tokenizer.token_to_id(t) is not None])

    stop_ids = _as_list(generation_config.get("eos_token_id"))
    bos_id, eos_id, pad_id = (tokenizer.token_to_id(named.get(f"{name}_token", "")) for name in ("bos", "eos", "pad"))
    if eos_id is None and stop_ids:
        eos_id = stop_ids[0]
    if bos_id is None:
        bos_id = generation_config.get("bos_token_id")
    # Many models name a bos token that their texts never start with (GPT-2, SmolLM2): what counts is that it is added.
    if bos_id not in tokenizer.encode("").ids and config.get("add_bos_token") is not True:
        bos_id = None

    template = _pick_template(folder, config, chat_template)
    if template is None:
        template = PLAIN_TEMPLATE
        ends = {"bos_token": bos_id, "eos_token": eos_id}
        named = {key: "" if token_id is None else tokenizer.id_to_token(token_id) for key, token_id in ends.items()}
    return HFTokenizer(
        tokenizer,
        chat_template=template,
        template_tokens=named,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        stop_tokens=stop_ids,
        max_seq_len=max_seq_len,
        truncation_type=truncation_type,
    )


class HFTokenizer(ModelTokenizer, Transform):
    """Encodes texts, and messages through a chat template; made by `hf_tokenizer`.

    Args:
        tokenizer: the encoder.
        chat_template: Jinja text.
        template_tokens: the named special tokens that the template may write, such as {"eos_token": "</s>"}.
        bos_id: id of the token that every text starts with, None if the model was trained without.
        eos_id: id of the token that ends a text, None if there is none.
        pad_id: id of the padding token. None: eos, or else 0.
        stop_tokens: ids that end generation, besides eos and the token that ends the template's assistant turn.
        max_seq_len: see `hf_tokenizer`.
        truncation_type: see `hf_tokenizer`.

    Raises:
        ValueError: if max_seq_len or truncation_type is out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str,
        template_tokens: Mapping[str, str],
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        stop_tokens: Sequence[int] = (),
        max_seq_len: int | None = None,
        truncation_type: str = "right",
    ) -> None:
        check_number("tokenizer.max_seq_len", max_seq_len, minimum=1, optional=True, example=2048)
        if truncation_type not in ("right", "left"):
            raise ConfigError(f"tokenizer.truncation_type: {truncation_type!r} is unknown. Allowed: right, left")
        self.max_seq_len = max_seq_len
        self.truncation_type = truncation_type
        self.chat_template = chat_template
        try:
            _compile(chat_template)
        except TemplateError as e:
            raise ConfigError(f"tokenizer.chat_template: it is no Jinja template: {e}") from e
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = next(i for i in (pad_id, eos_id, 0) if i is not None)
        self.special_tokens = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        # One more than the largest id, which is what an embedding must have, even where ids have holes.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokenizer = tokenizer
        self._template_tokens = dict(template_tokens)
        # Longest first, so that no token hides one that it starts.
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = "|".join(map(re.escape, by_length)) or r"(?!)"
        stops = [eos_id, *stop_tokens, self._end_of_turn_id()]
        self.stop_tokens = list(dict.fromkeys(i for i in stops if i is not None))

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """The token ids of a text; bos and eos are added where the tokenizer has them, and never twice."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them stay out of the loss.

        Args:
            messages: text messages; roles go to the template as they are.
            add_end_tokens: True renders the conversation as the template closes it. False renders a prompt: up to where
                the assistant's reply begins, or, if the last message is a begun reply, up to the end of its content.

        Returns:
            Token ids, and a mask of the same length, True where there is no loss: for the tokens of messages with
            `masked`, for an eos put in place of a truncated end, and for all of a prompt. A message's header and its
            end token are its own; what the template puts before the first message goes with it.

        Raises:
            ValueError: if there are no messages, one is not text, or the template mixes them so that a token's message
                cannot be told.
            jinja2.TemplateError: if the template refuses the conversation, such as roles that do not alternate.
        """
        if not messages:
            raise ConfigError("messages: there are none to tokenize")
        if any(message.contains_media for message in messages):
            raise ConfigError("messages: this tokenizer takes text only, and one of them has an image")
        turns = [{"role": message.role, "content": message.text_content} for message in messages]
        if not add_end_tokens:
            tokens = self.encode(self.render_prompt(turns), add_bos=False, add_eos=False)
            return self._truncate(tokens, [True] * len(tokens), None)

        text = self._render(turns)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends, masked = self._message_ends(turns, [message.masked for message in messages], text)
        # A token's message is that of its last character: the offsets of some tokenizers leave out a leading space.
        last_chars = [max(end - 1, 0) for _, end in encoding.offsets]
        mask = [masked[min(bisect_right(ends, char), len(masked) - 1)] for char in last_chars]
        return self._truncate(encoding.ids, mask, self.eos_id)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """The sample with "tokens" and "mask" in place of "messages"; a prompt if inference (see above)."""
        tokens, mask = self.tokenize_messages(sample["messages"], add_end_tokens=not inference)
        return {**{key: sample[key] for key in sample if key != "messages"}, "tokens": tokens, "mask": mask}

    def _truncate(self, tokens: list[int], mask: list[bool], eos_id: int | None) -> tuple[list[int], list[bool]]:
        limit = self.max_seq_len
        if limit is None or len(tokens) <= limit:
            return tokens, mask
        if self.truncation_type == "left":  # the end, with its own end tokens, is still there
            return tokens[-limit:], mask[-limit:]
        return truncate(tokens, limit, eos_id), truncate(mask, limit, None if eos_id is None else True)

    def _render(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        # tools and documents are always there for a template to ask about, as in transformers.
        return _compile(self.chat_template).render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._template_tokens,
        )

    def render_prompt(self, turns: list[dict]) -> str:
        """The text of a conversation up to where the reply begins: behind the last turn, or in an assistant's."""
        if turns[-1]["role"] != "assistant":
            return self._render(turns, add_generation_prompt=True)
        if not turns[-1]["content"]:  # torchtune's way to ask for a reply
            return self._render(turns[:-1], add_generation_prompt=True)
        text = self._render(turns)
        span = self._content_span(turns, len(turns) - 1, text)
        return text[: span[1]] if span else text

    def _end_of_turn_id(self) -> int | None:
        """The special token right after an assistant's content, if the template has one."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            after = self._render(turns).partition(MARK)[2]
        except TemplateError:
            return None
        found = re.match(rf"\s*({self._special_pattern})", after)
        return self.special_tokens[found[1]] if found else None

    def _message_ends(self, turns: list[dict], masked: list[bool], text: str) -> tuple[list[int], list[bool]]:
        """Where each message ends in the text, in the order of the text, and whether it is masked.

        The first i messages, rendered alone, are the beginning of the text: their length is where message i ends.
        """
        ends = [0]
        try:
            for count in range(1, len(turns)):
                prefix = self._render(turns[:count])
                if not text.startswith(prefix) or len(prefix) < ends[-1]:
                    return self._message_ends_by_content(turns, masked, text)
                ends.append(len(prefix))
        except TemplateError:  # some templates refuse a conversation that stops early
            return self._message_ends_by_content(turns, masked, text)
        return [*ends[1:], len(text)], masked

    def _message_ends_by_content(
        self, turns: list[dict], masked: list[bool], text: str
    ) -> tuple[list[int], list[bool]]:
        """The same for templates that treat the last turns unlike earlier ones (drop their reasoning, move the system
        prompt): a message goes from its content to the special token after it; what follows is the next one's header.
        """
        spans = [(self._content_span(turns, i, text), masked[i]) for i in range(len(turns))]
        spans = sorted((span, mask) for span, mask in spans if span is not None)
        ends = []
        for ((_, end), _), ((start, _), _) in pairwise(spans):
            footer = re.match(rf".*?(?:{self._special_pattern})\n*", text[end:start], flags=re.DOTALL)
            ends.append(end + footer.end() if footer else end)
        return [*ends, len(text)], [mask for _, mask in spans] or masked[:1]

    def _content_span(self, turns: list[dict], index: int, text: str) -> tuple[int, int] | None:
        """Where the text shows the content of one message; None if it does not."""
        marked = self._render([{**turn, "content": MARK} if i == index else turn for i, turn in enumerate(turns)])
        if marked == text:
            return None
        before, _, after = marked.partition(MARK)
        if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
            raise ConfigError(
                f"messages: the chat template changes more than the content of message {index} "
                f"({turns[index]['role']}), so its tokens cannot be told from the others"
            )
        return len(before), len(text) - len(after)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; its body is rendered as it stands."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# Cached here and not kept in the tokenizer: a compiled template cannot be pickled, which data loader workers may need.
@lru_cache
def _compile(chat_template: str) -> Template:
    """The template in the sandbox and with the functions that transformers gives it."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # Jinja's own filter escapes HTML characters.
    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return env.from_string(chat_template)


def _pick_template(folder: Path, config: Mapping[str, Any], wanted: str | None) -> str | None:
    """The Jinja text of the wanted template, or of the folder's default; None if the folder has no template."""
    if wanted is not None and "{" in wanted:
        return wanted
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    # Files go before the entries of tokenizer_config.json.
    files = [*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    if files:
        templates = {("default" if f.parent == folder else f.stem): f.read_text(encoding="utf-8") for f in files}
    if wanted is None and not templates:
        return None
    if (wanted or "default") not in templates:
        raise ConfigError(
            f"tokenizer.chat_template: {folder} has no template {wanted or 'default'!r}. "
            f"Allowed: {', '.join(sorted(templates)) or 'no name, it has no template'}; or the Jinja text itself"
        )
    return templates[wanted or "default"]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _content(token: str | Mapping[str, Any]) -> str:
    """A token is written as text, or as a mapping with its flags."""
    return token if isinstance(token, str) else token["content"]
