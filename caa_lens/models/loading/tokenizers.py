"""The tokenizer of a checkpoint, with the token ids that its model was trained on, and how it joins a model."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caa_lens.extras import needed_for
from caa_lens.models.loading.hub import checkpoint_id

# transformers takes about 4 s to import, so it is imported where it is used.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
BESIDE_TOKENIZER = [
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
]


def folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder that holds one of ``TOKENIZER_FILES``, with the ids that these files give.

    transformers 5 builds the tokenizer of a Llama from vocabulary and merges alone. How a text is prepared for them
    is then its own idea: of Llama 2's files it forgets the blank in front of a text, and merges runs of blanks.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, LlamaTokenizer

    whole, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if not whole.is_file() and not (folder / "tokenizer_config.json").is_file():
        _check_bare(folder)
        bare = sentencepiece_tokenizer(pieces)
        if (folder / "chat_template.jinja").is_file():
            bare.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return bare
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):  # written in Python, and nothing beside it says how
        return tokenizer
    if whole.is_file():
        _prepare_like(tokenizer, Tokenizer.from_file(str(whole)))
    elif pieces.is_file() and isinstance(tokenizer, LlamaTokenizer):
        original = sentencepiece_tokenizer(pieces).backend_tokenizer
        _prepare_like(tokenizer, original)
        configuration = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if configuration.get("add_bos_token") is None:  # transformers 5 then adds none, before it did
            tokenizer.backend_tokenizer.post_processor = original.post_processor
    return tokenizer


def _check_bare(folder: Path) -> None:
    """A `tokenizer.model` does not say how a text is prepared for it; of Llamas and Mistrals that is known."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return
    if kind not in (None, "llama", "mistral", "mixtral"):
        raise ValueError(
            f"{folder} has a tokenizer.model alone, which is read for Llama and Mistral only, and this is a {kind!r}: "
            "put the checkpoint's tokenizer.json or tokenizer_config.json beside it, or give tokenizer="
        )


def _prepare_like(tokenizer: "PreTrainedTokenizerBase", original: Any) -> None:
    """Take everything from the original but what transformers reads from the configuration: added tokens, BOS."""
    backend = tokenizer.backend_tokenizer
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        setattr(backend, part, getattr(original, part))


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy a checkpoint's tokenizer beside other weights, such as finetuned ones, and the id that it is known by.

    `load_model(to)` then has the same token ids and the same prompt format. A tokenizer that transformers saves may
    have others: see `folder_tokenizer`.

    Args:
        folder: of the original, as `load_model` reads it; may be a snapshot in a hub cache.
        to: a folder that already holds the copy's config.json.
    """
    for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER):
        (to / name).unlink(missing_ok=True)
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    if known_as := checkpoint_id(folder):
        file = to / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | {"_name_or_path": known_as}, indent=2), encoding="utf-8")


def sentencepiece_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Meta's bare ``tokenizer.model``, with the token ids of sentencepiece itself and one BOS in front.

    transformers 5 reads such a file with other ids: ``AutoTokenizer`` leaves out the space in front of the
    first word, and both it and ``LlamaTokenizer`` merge runs of spaces too early and add no BOS.
    """
    with needed_for("Meta's tokenizer.model"):
        from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    pieces = SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    by_score = sorted(vocab, key=lambda piece: -pieces.get_score(vocab[piece]))
    splits = ((piece[:cut], piece[cut:]) for piece in by_score for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def take_tokenizer_away(model: Any) -> None:
    """Leave a bridge without a tokenizer; a HookedTransformer needs no such care."""
    if hasattr(model, "_tokenizer"):
        model._tokenizer = None
    if (driver := getattr(model, "driver", None)) is not None:
        driver.tokenizer = None


def attach_tokenizer(model: Any, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """What TransformerLens' ``set_tokenizer`` does, except that it loads the tokenizer anew and makes it add a BOS.

    So does a bridge that is given a second tokenizer; one that has none takes it as it is.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # On the left, TransformerLens would guess the mask from pad tokens, which may be real EOS tokens.
    tokenizer.padding_side = "right"
    take_tokenizer_away(model)
    model.tokenizer = tokenizer
    if (driver := getattr(model, "driver", None)) is not None:  # of TransformerLens 4
        driver.tokenizer = tokenizer
    model.cfg.tokenizer_name = name
    bos = tokenizer.bos_token_id
    prepends_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends_bos
