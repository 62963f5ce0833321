"""A prompt as a table of its tokens: what is read, what is steered, and whose turn it is."""

from collections.abc import Sequence
from typing import Any

from caa_lens.prompts.prompt_formats import Prompt


def explain(prompt: Prompt, tokenizer: Any, *, steered: Sequence[bool] | None = None) -> str:
    """A table of a prompt's tokens, headed by its format's name: which are read, which steered (by default its own).

    Of a conversation it says which turn a token is of.
    """
    marked = [pos >= prompt.steer_start for pos in range(len(prompt))] if steered is None else steered
    lines = [f"format: {prompt.format_name}", f"{'pos':>4} {'id':>6}  {'token':<20} read steered"]
    if prompt.turns:
        lines[1] += " turn"
    for pos, token in enumerate(prompt.tokens):
        read = "read" if prompt.read[0] <= pos < prompt.read[1] and prompt.answer_start < len(prompt) else ""
        mark = "steered" if marked[pos] else ""
        piece = "" if tokenizer is None else repr(tokenizer.convert_ids_to_tokens(token))
        turn = next((role for role, start, stop in prompt.turns if start <= pos < stop), "")
        lines.append(f"{pos:>4} {token:>6}  {piece:<20} {read:<4} {mark:<7} {turn}".rstrip())
    if steered is None:
        lines.append("and every generated token is steered")
    return "\n".join(lines)
