"""Checkpoints as sources of tensors: a folder of safetensors, or a GGUF file, by Hugging Face's names.

Nothing here knows TransformerLens: the caller says which tensors its model needs, and ``check`` names what is
missing or left over.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caa_lens.extras import needed_for

# transformers takes about 4 s to import, so it is imported where it is used.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX_NAME = "model.safetensors.index.json"
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}  # as safetensors writes them

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
"""Fetches one tensor by its Hugging Face name; called once a tensor, so no checkpoint is in memory whole."""


class SafetensorsFolder:
    """The tensors of a folder of safetensors, one file or sharded by an index, read one at a time.

    No file stays open: the pages that a mapping has touched count as memory of the process for as long as the
    mapping lives, so one kept over the whole load would double the peak.

    Args:
        folder: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        quantised: tensors of any type are taken, for transformers to make sense of.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is not there.
        ValueError: a file or the index is damaged, or the index names a tensor that its shard does not hold.
    """

    def __init__(self, folder: Path, *, quantised: bool = False) -> None:
        self.folder = folder
        self.quantised = quantised
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        shard_of = _read_index(folder)
        for file in sorted(set(shard_of.values())) or ["model.safetensors"]:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} has no {file}, which {INDEX_NAME} lists: download the missing shard")
            self._read_header(folder / file)
        for name, file in shard_of.items():
            if self.files.get(name) != folder / file:
                raise ValueError(
                    f"{INDEX_NAME} says that {file} holds {name!r}, but it does not: download the folder again"
                )

    def _read_header(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                    tensor = file.get_slice(name)
                    if not self.quantised and tensor.get_dtype() not in FLOAT_DTYPES:
                        raise ValueError(
                            f"{path}: {name!r} is stored as {tensor.get_dtype()}, expected one of"
                            f" {', '.join(sorted(FLOAT_DTYPES))}: use a checkpoint that is not quantised"
                        )
                    self.files[name], self.shapes[name] = path, tuple(tensor.get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or was not downloaded to its end ({error}): download it again"
            ) from None

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def read(self, name: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor, on a device and in a type (as stored, if none is given)."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            # The copy is what frees the mapped pages of the file: get_tensor returns a view of them.
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Compare names and shapes with what the configuration says, before anything is read.

        Args:
            expected: name and shape of every tensor; without the unembedding if the embeddings are tied.

        Raises:
            ValueError: a tensor is missing, has another shape, or is not one that a Llama has. Only
                ``rotary_emb.inv_freq``, which old checkpoints store and no one reads, is passed over; and a
                stored unembedding of a model with tied embeddings has to be equal to the embedding.
        """
        extra = {name for name in self.shapes.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")}
        if UNEMBEDDING in extra and EMBEDDING in self.shapes:
            extra.remove(UNEMBEDDING)
            if not torch.equal(self.read(UNEMBEDDING), self.read(EMBEDDING)):
                raise ValueError(
                    f"{self.folder}: config.json ties the embeddings, but {UNEMBEDDING} differs from"
                    f" {EMBEDDING}: set tie_word_embeddings to false in config.json to use both"
                )
        missing = expected.keys() - self.shapes.keys()
        if missing or extra:
            raise ValueError(
                f"{self.folder} does not hold the tensors of the Llama that its config.json describes:"
                f" missing {some(missing)}; unexpected {some(extra)}: check that weights and config belong"
                " together"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.folder}: {name!r} has shape {list(self.shapes[name])}, but config.json asks for"
                    f" {list(shape)}: check that weights and config belong together"
                )


def some(names: Collection[str]) -> str:
    """The first three of some names in words, and how many more there are."""
    shown, hidden = sorted(names)[:3], len(set(names)) - 3
    return (", ".join(map(repr, shown)) or "none") + (f" and {hidden} more" if hidden > 0 else "")


def _read_index(folder: Path) -> Mapping[str, str]:
    """Tensor name to file name; empty if all is in one file, which, as in transformers, goes first."""
    if (folder / "model.safetensors").is_file():
        return {}
    if (folder / INDEX_NAME).is_file():
        try:
            return dict(json.loads((folder / INDEX_NAME).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / INDEX_NAME} is damaged: download it again") from None
    found = sorted(path.name for path in folder.glob("*.bin")) or "nothing of the kind"
    raise FileNotFoundError(
        f"{folder} has {found}, expected model.safetensors or {INDEX_NAME}: download the safetensors of the"
        " model, or convert with transformers"
        " (AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
    )


class GgufFile:
    """A GGUF file of the Llama architecture, as llama.cpp writes it; transformers dequantises it.

    transformers passes over what it does not know, and fills a weight that it did not find with noise, so
    this class looks itself at the tensors, and at the rotary scaling, which transformers drops.

    Args:
        path: the file.

    Raises:
        ValueError: the file is damaged, of another architecture, or scales its rotary positions in a way that
            only llama.cpp knows.
    """

    def __init__(self, path: Path) -> None:
        with needed_for("models in GGUF"):
            from gguf import GGUFReader
        from transformers import AutoConfig

        self.path = path
        try:
            reader = GGUFReader(path)
            architecture = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{path} is damaged or was not downloaded to its end ({error}): download it again"
            ) from None
        if architecture != "llama":
            raise ValueError(f"{path} holds a {architecture!r}, expected 'llama': only Llamas can be loaded")
        self.names = {tensor.name for tensor in reader.tensors}
        self._metadata = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
        self.has_tokenizer = "tokenizer.ggml.model" in self._metadata
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        config["rope_parameters"] |= self._rope_scaling(reader, config)
        self.config: dict[str, Any] = config

    def _value(self, key: str) -> Any:
        return self._metadata[key].contents() if key in self._metadata else None

    def _rope_scaling(self, reader: Any, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling, which is stored as a table, with its usual constants; nothing if there is no
        table."""
        kind = self._value("llama.rope.scaling.type")
        if kind not in (None, "none"):
            raise ValueError(
                f"{self.path} has rotary scaling {kind!r}, expected none or Llama 3's: load the safetensors instead"
            )
        tables = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        if not tables:
            return {}
        table = torch.from_numpy(tables[0].copy()).flatten()
        factor, low, high, trained_length = float(table.max()), 1.0, 4.0, 8192
        exponents = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        periods = trained_length / (2 * torch.pi * config["rope_parameters"]["rope_theta"] ** exponents)
        blend = ((periods - low) / (high - low)).clamp(0, 1)
        if table.shape != blend.shape or not torch.allclose(table, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
            raise ValueError(
                f"{self.path} has rotary factors that are not those of Llama 3: load the safetensors instead"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": trained_length,
        }

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Compare the names of the tensors with what the configuration says.

        Args:
            expected: Hugging Face's name of every tensor, and its shape, which is not looked at.

        Raises:
            ValueError: a tensor is missing, or is not one that a Llama has.
        """
        with needed_for("models in GGUF"):
            from gguf import MODEL_ARCH, get_tensor_name_map

        translated = get_tensor_name_map(MODEL_ARCH.LLAMA, self.config["num_hidden_layers"])
        wanted = {str(translated.get_name(name, (".weight",))) for name in expected}
        missing, extra = wanted - self.names, self.names - wanted - {"rope_freqs.weight"}
        if missing or extra:
            raise ValueError(
                f"{self.path} does not hold the tensors of a Llama: missing {some(missing)}; unexpected"
                f" {some(extra)}: mixtures of experts and other variants cannot be loaded"
            )

    def dequantised(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors by their Hugging Face names, on the CPU. Takes 4 bytes a parameter besides, for a
        while."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.path.parent, gguf_file=self.path.name, dtype=dtype)
        return dict(model.state_dict())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the file carries, with its chat template."""
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        if self._value("tokenizer.ggml.pre") == "smollm":
            # SmolLM2 splits every digit off before the words; transformers drops that rule, and "a  1" would
            # get other tokens.
            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
            )
        return tokenizer
