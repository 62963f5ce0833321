"""The tokenizer of a checkpoint, with the token ids that its model was trained on, and how it joins a model."""

from pathlib import Path
from typing import TYPE_CHECKING

# TransformerLens takes about 3 s to import and transformers 4 s, so both are imported where they are used.
if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]


def folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder that holds one of ``TOKENIZER_FILES``."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return sentencepiece_tokenizer(folder / "tokenizer.model")


def sentencepiece_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Meta's bare ``tokenizer.model``, with the token ids of sentencepiece itself and one BOS in front.

    transformers 5 reads such a file with other ids: ``AutoTokenizer`` leaves out the space in front of the
    first word, and both it and ``LlamaTokenizer`` merge runs of spaces too early and add no BOS.
    """
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


def attach_tokenizer(model: "HookedTransformer", tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """What ``set_tokenizer`` does, except that it loads the tokenizer anew and makes it add a BOS."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # On the left, TransformerLens would guess the mask from pad tokens, which may be real EOS tokens.
    tokenizer.padding_side = "right"
    model.tokenizer = tokenizer
    model.cfg.tokenizer_name = name
    bos = tokenizer.bos_token_id
    prepends_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends_bos
