"""Chat messages to a prompt with its positions, as every function of the library makes it of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from caa_lens.arguments import describe
from caa_lens.contrast.messages import Conversation
from caa_lens.models.checks import check_model
from caa_lens.prompts.checks import is_question
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format


def encode_chat(
    model: Any,
    messages: Sequence[Mapping[str, str]] | Conversation,
    *,
    prompt_format: PromptFormat | str | None = None,
) -> Prompt:
    """A prompt to answer from, of messages `{"role": ..., "content": ...}` that end with the user's.

    Args:
        messages: in the order that the model's chat template takes.
        prompt_format: the model's own by default.

    Raises:
        TypeError: for what is no list of messages with a role and words.
        ValueError: for roles in another order, a format that has no place for earlier turns, or a template that
            drops or changes what a message says.

    Warns:
        TemplateInQuestionWarning, SpecialTokenWarning, StrippedQuestionWarning: as `PromptFormat.encode`, of any turn.
    """
    check_model(model)
    if messages != [] and (isinstance(messages, str) or not is_question(messages)):
        raise TypeError(f"expected a list of messages with a role and a content, got {describe(messages)}")
    return resolve_format(model, prompt_format).encode(model.tokenizer, messages)
