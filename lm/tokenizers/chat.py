"""Chat templates: messages to the text a model was tuned on, and the assistant's part of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from lm.tokenizers.base import Tokenizer
from lm.tokenizers.sandbox import Span, TemplateError, make_environment, metered, spend

Message = Mapping[str, Any]
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a message that goes on


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Text, and the characters [start, end) of it that the assistant wrote.

    `located` is False if the template has generation blocks whose position is not known.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    located: bool = True


class ChatTemplate:
    """A Jinja template in the dialect of Hugging Face's `apply_chat_template`, sandboxed.

    Args:
      source: the template.
      bos, eos: values of `bos_token` and `eos_token` in it; undefined if empty.
      ends: names of further tokens that end a turn, as `<|im_end|>`.
      tokens: values of further names in it, as `pad_token`.
      tool_use: the template for conversations with tools, if that is another.

    Raises:
      TemplateError: `source` is not a template.
    """

    def __init__(
        self,
        source: str,
        bos: str = "",
        eos: str = "",
        ends: Sequence[str] = (),
        tokens: Mapping[str, Any] = {},
        tool_use: str | None = None,
    ):
        self.source = source
        own = {"bos_token": bos, "eos_token": eos}
        self._tokens = {**tokens, **{name: token for name, token in own.items() if token}}
        others = ends, tokens
        self._tool_use = None if tool_use is None else ChatTemplate(tool_use, bos, eos, *others)
        self._ends = tuple(dict.fromkeys(end for end in (eos, *ends) if end))
        try:
            environment = make_environment()
            self._template = environment.from_string(source)
        except TemplateError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except (Exception, RecursionError) as error:
            raise TemplateError(f"the chat template does not compile: {error!r:.200}") from error
        self._has_generation = environment.has_generation

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str | None = None) -> "ChatTemplate":
        """The tokenizer's own template.

        Args:
          name: of several; None for "default", and "tool_use" for conversations with tools.

        Raises:
          TemplateError: it has none of that name.
        """
        sources = tokenizer.chat_templates
        if (name or "default") not in sources:
            known = ", ".join(sorted(sources)) or "none at all"
            raise TemplateError(
                f"the tokenizer has no chat template '{name or 'default'}' ({known}); "
                + ("choose one of these" if sources else "a base model has none: give one")
            )
        return cls.with_tokens(
            tokenizer, sources[name or "default"], None if name else sources.get("tool_use")
        )

    @classmethod
    def with_tokens(
        cls, tokenizer: Tokenizer, source: str, tool_use: str | None = None
    ) -> "ChatTemplate":
        """A template of any origin, which knows the tokenizer's tokens by their names.

        Raises:
          TemplateError: as the constructor.
        """
        names = {i: token for token, i in tokenizer.special_tokens.items()}
        ends = [names[i] for i in tokenizer.eos_ids if i in names]
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        own = {name: names[i] for name, i in ids.items() if i in names}
        named = {**own, **tokenizer.named_tokens}
        bos, eos = named.pop("bos_token", ""), named.pop("eos_token", "")
        return cls(source, bos, eos, ends, named, tool_use)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Text of a conversation.

        Args:
          messages: `role`, `content` and any other keys that the template reads; keys whose value
            is None count as missing.
          add_generation_prompt: end with the beginning of the assistant's turn.
          continue_final_message: end within the last message, right after its content.
          tools: JSON schemas of functions.
          variables: further names that the template may read, as `enable_thinking`.

        Raises:
          TemplateError: the template refuses the messages, lacks something in them, tries to leave
            its sandbox, or does too much work.
        """
        prompt = add_generation_prompt and not continue_final_message
        variables |= {"add_generation_prompt": prompt, "tools": tools}
        if not continue_final_message:
            return self._render(messages, variables).text
        text = self._render([*messages[:-1], _tagged(messages[-1])], variables).text
        content, tag, _ = text.rpartition(_TAG.strip())
        if not tag:
            raise TemplateError("the template leaves out the last message, which was to go on")
        # A template that trims a message takes the white space before its end as well.
        return content if text[len(content) :].startswith(_TAG) else content.rstrip()

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Rendered:
        if self._tool_use is not None and variables["tools"] is not None:
            return self._tool_use._render(messages, variables)
        given = {"documents": None, **self._tokens, **variables}
        given["messages"] = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        chunks: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        try:
            with metered() as meter:
                for chunk in self._template.generate(given):
                    spend(len(chunk))
                    if isinstance(chunk, Span):
                        spans.append((length, length + len(chunk)))
                    length += len(chunk)
                    chunks.append(chunk)
        except TemplateError:
            raise
        except jinja2.UndefinedError as error:
            raise TemplateError(f"the template needs a missing value: {error.message}") from error
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the template breaks out of its sandbox: {error}") from error
        except (Exception, RecursionError) as error:
            raise TemplateError(f"the template fails: {type(error).__name__}: {error}") from error
        located = len(spans) == meter.num_generations
        return Rendered("".join(chunks), tuple(spans), located)

    def spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> Rendered:
        """A conversation, and the parts of it that the assistant wrote.

        From `{% generation %}` blocks, or else by rendering the conversation up to each turn of
        the assistant: a turn is what it adds to its prompt, end token included. (The time grows
        with the square of the number of turns: 0.4 s for 200 short messages.)

        Raises:
          TemplateError: as `render`; also if the text of earlier turns depends on later ones.
        """
        if self._tool_use is not None and tools is not None:
            return self._tool_use.spans(messages, tools, **variables)
        whole = self._render(messages, {"add_generation_prompt": False, "tools": tools} | variables)
        if self._has_generation:
            if not whole.located:
                raise TemplateError(
                    "the template has a {% generation %} block inside a macro, a call or a set "
                    "block, where its place in the text is not known; move it out"
                )
            return whole
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], True, tools, **variables) if i else ""
            turn = self.render(messages[: i + 1], False, tools, **variables)
            _check_prefix(prompt, turn, f"the prompt for message {i}", "the message")
            _check_prefix(turn, whole.text, f"message {i}", "the whole conversation")
            spans.append((len(prompt), len(prompt) + self._content(turn[len(prompt) :])))
        return Rendered(whole.text, tuple(spans))

    def _content(self, turn: str) -> int:
        """Length of a turn without white space after its end token."""
        content = turn.rstrip()
        return len(content) if content.endswith(self._ends) else len(turn)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and whether the assistant wrote any of each.

        Raises:
          TemplateError: as `spans`.
        """
        rendered = self.spans(messages, tools, **variables)
        ids, offsets = tokenizer.encode_with_offsets(rendered.text)
        written = bytearray(len(rendered.text))
        for start, end in rendered.spans:
            written[start:end] = b"\1" * (end - start)
        mask = [1 in written[start:end] for start, end in offsets]
        if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids], [False, *mask]
        return ids, mask


def _tagged(message: Message) -> Message:
    """The message with a tag at the end of its content: a text, or parts of which one is text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _TAG}
    parts = list(content) if isinstance(content, list | tuple) else []
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and isinstance(parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": parts[i]["text"] + _TAG}
            return {**message, "content": parts}
    raise TemplateError("the last message has no text that could go on; give it some, or none")


def _check_prefix(start: str, text: str, start_name: str, name: str) -> None:
    if not text.startswith(start):
        pairs = enumerate(zip(start, text, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(start), len(text)))
        raise TemplateError(
            f"the template writes {start_name} differently once more follows: character {same} of "
            f"{name} is not {start[same : same + 20]!r} but {text[same : same + 20]!r}; put "
            "{% generation %} blocks around the assistant's text in the template"
        )
