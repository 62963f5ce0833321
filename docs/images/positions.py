"""Which tokens are read and which are steered, drawn from the real tokens as HTML that docs/concepts.md shows inline.

    .venv/bin/python docs/images/positions.py path/to/llama2/tokenizer.model

Chips wrap on narrow screens and take their colours from docs/css/site.css, in light mode and in dark. Meta's
`tokenizer.model` comes with the Llama 2 weights; the other tokenizer is the demo model's.
"""

import html
import sys
from pathlib import Path
from typing import Any

from caa_lens.prompts.prompt_formats import LLAMA2_CHAT, PromptFormat, chat_template_format, encode_answer

HERE = Path(__file__).resolve().parent
LETTER = ("Do you agree with me?\n\nChoices:\n (A) Yes\n (B) No", "(A)")
COMPLETION = ("How was your day?", "It was lovely.")


def shown(piece: str) -> str:
    """A token's piece with its blanks and line breaks made visible."""
    return piece.replace("<0x0A>", "⏎").replace("Ċ", "⏎").replace("▁", "␣").replace("Ġ", "␣")


def picture(tokenizer: Any, prompt_format: PromptFormat, question: str, answer: str) -> str:
    """One chip a token, in the order of the prompt, and one for all that is generated."""
    prompt = encode_answer(prompt_format, tokenizer, question, answer)
    chips = []
    for pos, piece in enumerate(tokenizer.convert_ids_to_tokens(list(prompt.tokens))):
        kinds = ["steered"] * (pos >= prompt.steer_start) + ["read"] * (prompt.read[0] <= pos < prompt.read[1])
        title = f"position {pos}: {' and '.join(reversed(kinds)) or 'left alone'}"
        chips.append(f'<span class="{" ".join(["token", *kinds])}" title="{title}">{html.escape(shown(piece))}</span>')
    chips.append('<span class="token steered generated">every generated token</span>')
    return '<div class="tokens">\n' + "\n".join(chips) + "\n</div>\n"


def main() -> None:
    from caa_lens.models.loading.demo_model import demo_model_path
    from caa_lens.models.loading.tokenizers import folder_tokenizer, sentencepiece_tokenizer

    llama2, smollm2 = sentencepiece_tokenizer(Path(sys.argv[1])), folder_tokenizer(demo_model_path())
    llama2_html = picture(llama2, LLAMA2_CHAT, *LETTER)
    smollm2_html = picture(smollm2, chat_template_format(smollm2), *COMPLETION)
    (HERE / "positions_llama2.html").write_text(llama2_html, encoding="utf-8")
    (HERE / "positions_smollm2.html").write_text(smollm2_html, encoding="utf-8")


if __name__ == "__main__":
    main()
