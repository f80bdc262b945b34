"""Conversations in OpenAI's form, with tools and weights of replies, or in ShareGPT's, as training data."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from datasets import LargeList, List
from torchtune.data import Message, OpenAIToMessages, ShareGPTToMessages
from torchtune.datasets import PackedDataset, SFTDataset
from torchtune.datasets._sft import SFTTransform

from layerskip_recipes.data.chat_template import END_OF_THINKING, THINK, ChatTemplate

Sample = dict[str, Any]  # {"messages": messages}, and {"tools": functions} if the model is offered any
TOOL_ROLES = ("tool", "ipython")  # of a tool's result


class ChatMessage(Message):
    """A message with the other keys that a chat template reads, such as tool_calls, name and tool_call_id.

    Its content is None in a reply of calls alone: templates tell it from an empty text.
    """

    def __init__(self, role: str, content: str | None, masked: bool, others: Mapping[str, Any]) -> None:
        super().__init__(role, content or "", masked)  # type: ignore[arg-type]  # torchtune lists no role "tool"
        self.others = {**others, "content": None} if content is None else dict(others)


class OpenAIMessages(OpenAIToMessages):
    """torchtune's transform, with tools, their calls and results. A reply of weight 0 is not learned."""

    def __call__(self, sample: Mapping[str, Any]) -> Sample:
        column, new_system = self._column_map["messages"], self.new_system_prompt
        messages = [self._message(part, f"{column}[{i}]") for i, part in enumerate(sample[column])]
        if new_system is not None:
            system = ChatMessage("system", new_system, not self.train_on_input, {})
            messages = [system, *(message for message in messages if message.role != "system")]
        tools = sample.get("tools")
        if isinstance(tools, str):
            tools = json.loads(tools)
        if not isinstance(tools, list | None):
            raise ValueError(f"tools: {tools!r:.60} is not allowed. Allowed: a list of functions as JSON schemas")
        return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}

    def _message(self, message: Any, place: str) -> ChatMessage:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise ValueError(
                f'{place}: {message!r:.60} has no role; for example {{"role": "user", "content": "Hello"}}'
            )
        role, text, weight = message["role"], _text(message.get("content"), place), message.get("weight")
        is_reply = role == "assistant"
        if weight not in (None, 0, 1):
            raise ValueError(f"{place}.weight: {weight!r} is not allowed. Allowed: 1, or 0 to not learn the reply")
        used = ("role", "content", "weight", "reasoning_content")
        others = {key: value for key, value in message.items() if value is not None and key not in used}
        reasoning = message.get("reasoning_content")
        if is_reply and reasoning and END_OF_THINKING not in (text or ""):
            text = f"{THINK}\n{reasoning}\n{END_OF_THINKING}\n\n{text or ''}"
        if text is None and not (is_reply and others.get("tool_calls")):
            raise ValueError(f"{place}.content: is missing. Allowed: text; null only in a reply with tool_calls")
        masked = weight == 0 if is_reply else not self.train_on_input
        return ChatMessage(role, text, masked, others)


def _text(content: Any, place: str) -> str | None:
    if isinstance(content, str | None):
        return content
    for part in content if isinstance(content, Sequence) else [content]:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"{place}.content: {part!r:.60} is not allowed. Allowed: text, or parts of type text")
    return "".join(part["text"] for part in content)


class ChatDataset(SFTDataset):
    """torchtune's dataset, which also takes tools, and several replies in a row."""

    def __init__(self, tokenizer: Any, to_messages: Any, **arguments: Any) -> None:
        super().__init__(message_transform=self._conversation, model_transform=tokenizer, **arguments)
        self._to_messages = to_messages
        self._has_template = isinstance(getattr(tokenizer, "template", None), ChatTemplate)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # torchtune's rules, which know only questions and answers, come with its message transform.
        return SFTTransform(model_transform=self._model_transform)(self._conversation(self._data[index]))

    def _conversation(self, row: Mapping[str, Any]) -> Sample:
        features = self._data.features
        sample = self._to_messages({key: _without_missing(value, features[key]) for key, value in row.items()})
        messages = sample["messages"]
        _check_order(messages)
        calls = [m for m in messages if m.role in TOOL_ROLES or "tool_calls" in getattr(m, "others", {})]
        if not self._has_template and (calls or sample.get("tools")):
            raise ValueError("tools need a chat template. Set tokenizer._component_=layerskip_recipes.hf_tokenizer")
        return sample


def _without_missing(value: Any, feature: Any) -> Any:
    """A value without the nulls of absent keys: in an Arrow table, all structs of a column have all keys."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _without_missing(value[key], feature[key]) for key in value if value[key] is not None}
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        return [_without_missing(item, feature.feature) for item in value]
    return value


def _check_order(messages: Sequence[Message]) -> None:
    """Refuse an order in which a reply answers nothing, or a question has no reply."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"a conversation of {', '.join(roles) or 'no messages'} has no reply of the assistant")
    for i, role in enumerate(roles):
        if role not in ("system", "user", "assistant", *TOOL_ROLES):
            raise ValueError(f"message {i} has the role {role!r}. Allowed: system, user, assistant, tool")
    if roles[0] != "user" and roles[:2] != ["system", "user"]:
        raise ValueError(f"a conversation starts with {roles[0]}. Allowed: user, or system and then user")
    for i, (before, role) in enumerate(pairwise(roles), 1):
        if role == "system":
            raise ValueError(f"message {i} is a system message. Allowed: only as the first message")
        if role == before == "user":
            raise ValueError(f"messages {i - 1} and {i} are consecutive user messages. Join them")
        if role in TOOL_ROLES and before not in ("assistant", *TOOL_ROLES):
            raise ValueError(
                f"message {i} is a tool's result after the {before}'s message, and nothing called the tool"
            )


def chat_dataset(
    tokenizer: Any,
    *,
    source: str,
    conversation_column: str,
    conversation_style: str,
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    packed: bool = False,
    **arguments: Any,
) -> ChatDataset | PackedDataset:
    """`torchtune.datasets.chat_dataset`, with what the classes above add. `load_data` takes it in its place."""
    transforms = {"openai": (OpenAIMessages, "messages"), "sharegpt": (ShareGPTToMessages, "conversations")}
    if conversation_style not in transforms:
        raise ValueError(f"conversation_style: {conversation_style!r} is not allowed. Allowed: {', '.join(transforms)}")
    transform, column = transforms[conversation_style]
    to_messages = transform(train_on_input, {column: conversation_column}, new_system_prompt)
    arguments = {"split": "train", **arguments, "source": source}
    dataset = ChatDataset(tokenizer, to_messages, **arguments)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise ValueError("packed data needs tokenizer.max_seq_len")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len)
