"""Prompts of text and messages for a sampler that reads token ids. Without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lm.infer.requests import Messages, Prompt, Request, Sample, Sampler, expand
from lm.infer.text import StoppedText
from lm.tokenizers import ChatTemplate, Tokenizer


class Tokenized:
    """A Sampler that renders and encodes prompts, and fills in missing texts of samples."""

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, template: ChatTemplate | None = None
    ) -> None:
        """`template` renders `Messages`; None for the tokenizer's own."""
        self.sampler, self.tokenizer, self.template = sampler, tokenizer, template

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`. A prompt that cannot be rendered or encoded is a failed sample."""
        requests = expand(requests)
        samples: dict[int, Sample] = {}
        encoded: dict[int, Request] = {}
        for i, request in enumerate(requests):
            try:
                prompt = encode_prompt(self.tokenizer, request.prompt, self.template)
                encoded[i] = dataclasses.replace(request, prompt=prompt)
            except ValueError as error:
                samples[i] = Sample.failed(error)
        for i, sample in zip(encoded, self.sampler.sample(list(encoded.values())), strict=True):
            if sample.text is None and sample.token_ids is not None:
                sample = dataclasses.replace(sample, text=self._text(requests[i], sample.token_ids))
            samples[i] = sample
        return [samples[i] for i in range(len(requests))]

    def _text(self, request: Request, ids: Sequence[int]) -> str:
        stream, special = self.tokenizer.stream(continuation=True), self.tokenizer.special_tokens
        text = StoppedText(stream, request.stop, special)
        ends = {*self.tokenizer.eos_ids, *request.stop_ids}
        for token in ids:
            if token not in ends:
                text.push(token)
        text.finish()
        return text.text


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, template: ChatTemplate | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt, by the model's own rule for BOS; special tokens in text are parsed.

    A text ends with EOS if the model's rule says so, messages never: the assistant's turn is open.

    Args:
      tokenizer: the model's.
      prompt: token ids, which stay as they are; a text; or messages.
      template: renders messages; None for the tokenizer's own.

    Raises:
      ValueError: there is no template, it refuses the messages, or nothing is left to read.
    """
    chat = isinstance(prompt, Messages)
    if isinstance(prompt, Messages):
        template = template or ChatTemplate.of(tokenizer)
        tools: Any = prompt.tools or None
        goes_on, variables = prompt.continue_final_message, prompt.variables
        prompt = template.render(prompt.messages, True, tools, goes_on, **variables)
    ids = tuple(tokenizer.encode_prompt(prompt, chat) if isinstance(prompt, str) else prompt)
    if not ids:
        raise ValueError(
            "the prompt is empty, and this model puts no BOS token in front; give text"
        )
    return ids
