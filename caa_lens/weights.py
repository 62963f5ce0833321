"""Move Llama weights into TransformerLens without copying them twice, in the layout its forward pass wants.

TransformerLens writes attention weights as ``[head d_model d_head]`` and multiplies from the right; Hugging
Face writes ``[out in]`` matrices. On every forward pass TransformerLens turns its form back into the other
one (``W_in.T.contiguous()``, ``rearrange(W_Q, "n m h -> (n h) m")``), which copies every weight for every
token generated, unless the strides already are those of the Hugging Face matrix. So the parameters here are
*views* of Hugging Face's matrices: the same shapes and values as ever, and the conversion costs nothing.

Nothing is folded or centred: ``ln1.w``, ``ln2.w`` and ``ln_final.w`` are the norms' own weights, so a lens on
the residual stream has to apply ``ln_final`` before it unembeds.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig
    from transformers import PreTrainedTokenizerBase

INDEX_NAME = "model.safetensors.index.json"
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}  # as safetensors writes them

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
"""Fetches one tensor by its Hugging Face name; called once a tensor, so a checkpoint is never in memory
whole."""


# Layout: how a Hugging Face matrix [out in] is seen as a TransformerLens parameter. Each is a view, never a
# copy.


def _heads_in(matrix: Float[Tensor, "out d_model"], d_head: int) -> Float[Tensor, "head d_model d_head"]:
    return matrix.unflatten(0, (-1, d_head)).transpose(1, 2)


def _heads_out(matrix: Float[Tensor, "d_model in"], d_head: int) -> Float[Tensor, "head d_head d_model"]:
    return matrix.unflatten(1, (-1, d_head)).permute(1, 2, 0)


def _transposed(matrix: Float[Tensor, "out in"], d_head: int) -> Float[Tensor, "in out"]:
    return matrix.T


def _as_is(tensor: Tensor, d_head: int) -> Tensor:
    return tensor


View = Callable[[Tensor, int], Tensor]


def _parameter_map(cfg: "HookedTransformerConfig") -> Iterator[tuple[str, Shape, str, View]]:
    """Each weight as ``(Hugging Face name, its shape there, TransformerLens name, view)``."""
    assert cfg.d_mlp is not None
    d_model, d_mlp = cfg.d_model, cfg.d_mlp
    d_query = cfg.n_heads * cfg.d_head
    d_key = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    # TransformerLens keeps ungrouped keys and values under an underscore, and shows them repeated without it.
    kv = "_" if cfg.n_key_value_heads is not None else ""
    yield EMBEDDING, (cfg.d_vocab, d_model), "embed.W_E", _as_is
    if not cfg.tie_word_embeddings:
        yield UNEMBEDDING, (cfg.d_vocab, d_model), "unembed.W_U", _transposed
    for layer in range(cfg.n_layers):
        hf, tl = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{hf}.mlp.gate_proj.weight", (d_mlp, d_model), f"{tl}.mlp.W_gate", _transposed
        yield f"{hf}.mlp.up_proj.weight", (d_mlp, d_model), f"{tl}.mlp.W_in", _transposed
        yield f"{hf}.mlp.down_proj.weight", (d_model, d_mlp), f"{tl}.mlp.W_out", _transposed
        yield f"{hf}.self_attn.q_proj.weight", (d_query, d_model), f"{tl}.attn.W_Q", _heads_in
        yield f"{hf}.self_attn.k_proj.weight", (d_key, d_model), f"{tl}.attn.{kv}W_K", _heads_in
        yield f"{hf}.self_attn.v_proj.weight", (d_key, d_model), f"{tl}.attn.{kv}W_V", _heads_in
        yield f"{hf}.self_attn.o_proj.weight", (d_model, d_query), f"{tl}.attn.W_O", _heads_out
        yield f"{hf}.input_layernorm.weight", (d_model,), f"{tl}.ln1.w", _as_is
        yield f"{hf}.post_attention_layernorm.weight", (d_model,), f"{tl}.ln2.w", _as_is
    yield "model.norm.weight", (d_model,), "ln_final.w", _as_is


def expected_shapes(cfg: "HookedTransformerConfig") -> dict[str, Shape]:
    """Name and shape of every tensor that a Llama checkpoint of this configuration holds, as Hugging Face
    writes it.

    Tied embeddings appear once. The sum of the sizes is the number of parameters.
    """
    return {name: shape for name, shape, _, _ in _parameter_map(cfg)}


def fill_weights(model: "HookedTransformer", read: Read) -> None:
    """Give a model that was built without memory (on the ``meta`` device) its weights and buffers.

    Every tensor is asked for once, placed on ``model.cfg.device`` as ``model.cfg.dtype``, and set as a view of
    the matrix that was read; biases are zero. A tensor that already is there in that type is shared, not copied.

    Args:
        model: a Llama-shaped HookedTransformer, from ``models.py``; changed in place.
        read: fetches one tensor by its Hugging Face name.
    """
    cfg = model.cfg
    for hf_name, _, tl_name, view in _parameter_map(cfg):
        tensor = read(hf_name).to(device=cfg.device, dtype=cfg.dtype)
        _set_parameter(model, tl_name, view(tensor, cfg.d_head))
    if cfg.tie_word_embeddings:
        _set_parameter(model, "unembed.W_U", model.embed.W_E.data.T)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            assert name.rpartition(".")[2].lstrip("_").startswith("b_"), f"{name} was not filled"
            _set_parameter(model, name, torch.zeros(parameter.shape, dtype=cfg.dtype, device=cfg.device))
    _fill_buffers(model)


def _set_parameter(model: "HookedTransformer", name: str, value: Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    assert getattr(module, attribute).shape == value.shape, name
    setattr(module, attribute, nn.Parameter(value))


def _fill_buffers(model: "HookedTransformer") -> None:
    """Masks and rotary tables. The layers share one table, of which TransformerLens would keep a copy
    each."""
    cfg = model.cfg
    attentions = [block.attn for block in model.blocks]
    first = attentions[0]
    assert cfg.rotary_dim is not None
    length = min(
        cfg.n_ctx, first.ROTARY_INITIAL_CACHE_SIZE
    )  # grown by TransformerLens when a prompt is longer
    tables = first.calculate_sin_cos_rotary(cfg.rotary_dim, length, base=cfg.rotary_base, dtype=cfg.dtype)
    sin, cos = (table.to(cfg.device) for table in tables)
    for attention in attentions:
        attention.mask = torch.empty((0, 0), dtype=torch.bool, device=cfg.device)
        attention.IGNORE = torch.tensor(-torch.inf, device=cfg.device)
        attention.rotary_sin, attention.rotary_cos = sin, cos


class SafetensorsFolder:
    """The tensors of a folder of safetensors, one file or sharded by an index, read one at a time.

    No file stays open: the pages that a mapping has touched count as memory of the process for as long as the
    mapping lives, so one kept over the whole load would double the peak.

    Args:
        folder: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is not there.
        ValueError: a file or the index is damaged, or the index names a tensor that its shard does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        shard_of = _read_index(folder)
        for file in sorted(set(shard_of.values())) or ["model.safetensors"]:
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {file}, which {INDEX_NAME} lists: download the missing shard"
                )
            self._read_header(folder / file)
        for name, file in shard_of.items():
            if self.files.get(name) != folder / file:
                raise ValueError(
                    f"{INDEX_NAME} says that {file} holds {name!r}, but it does not: download the folder"
                    " again"
                )

    def _read_header(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in FLOAT_DTYPES:
                        raise ValueError(
                            f"{path}: {name!r} is stored as {tensor.get_dtype()}, expected one of"
                            f" {', '.join(sorted(FLOAT_DTYPES))}: use a checkpoint that is not quantised"
                        )
                    self.files[name], self.shapes[name] = path, tuple(tensor.get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or was not downloaded to its end ({error}): download it again"
            ) from None

    def read(self, name: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor, on a device and in a type (as stored, if none is given)."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            # The copy is what frees the mapped pages of the file: get_tensor returns a view of them.
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)

    def check(self, cfg: "HookedTransformerConfig") -> None:
        """Compare names and shapes with what the configuration says, before anything is read.

        Raises:
            ValueError: a tensor is missing, has another shape, or is not one that a Llama has. Only
                ``rotary_emb.inv_freq``, which old checkpoints store and no one reads, is passed over; and a
                stored unembedding of a model with tied embeddings has to be equal to the embedding.
        """
        expected = expected_shapes(cfg)
        extra = {
            name for name in self.shapes.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")
        }
        if cfg.tie_word_embeddings and UNEMBEDDING in extra and EMBEDDING in self.shapes:
            extra.remove(UNEMBEDDING)
            if not torch.equal(self.read(UNEMBEDDING), self.read(EMBEDDING)):
                raise ValueError(
                    f"{self.folder}: config.json ties the embeddings, but {UNEMBEDDING} differs from"
                    f" {EMBEDDING}:"
                    ' set "tie_word_embeddings": false in config.json to use both'
                )
        missing = expected.keys() - self.shapes.keys()
        if missing or extra:
            raise ValueError(
                f"{self.folder} does not hold the tensors of the Llama that its config.json describes:"
                f" missing {_some(missing)}; unexpected {_some(extra)}: check that weights and config belong"
                " together"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.folder}: {name!r} has shape {list(self.shapes[name])}, but config.json asks for"
                    f" {list(shape)}: check that weights and config belong together"
                )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = names[:3]
    return (", ".join(map(repr, shown)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


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
                f"{self.path} has rotary scaling {kind!r}, expected none or Llama 3's: load the safetensors"
                " instead"
            )
        tables = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        if not tables:
            return {}
        table = torch.from_numpy(tables[0].copy()).flatten()
        factor, low, high, trained_length = float(table.max()), 1.0, 4.0, 8192
        exponents = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        periods = trained_length / (2 * torch.pi * config["rope_parameters"]["rope_theta"] ** exponents)
        blend = ((periods - low) / (high - low)).clamp(0, 1)
        if table.shape != blend.shape or not torch.allclose(
            table, 1 / ((1 - blend) / factor + blend), rtol=1e-3
        ):
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

    def check(self, cfg: "HookedTransformerConfig") -> None:
        """Compare the names of the tensors with what the configuration says.

        Raises:
            ValueError: a tensor is missing, or is not one that a Llama has.
        """
        from gguf import MODEL_ARCH, get_tensor_name_map

        translated = get_tensor_name_map(MODEL_ARCH.LLAMA, cfg.n_layers)
        expected = {str(translated.get_name(name, (".weight",))) for name in expected_shapes(cfg)}
        missing, extra = expected - self.names, self.names - expected - {"rope_freqs.weight"}
        if missing or extra:
            raise ValueError(
                f"{self.path} does not hold the tensors of a Llama: missing {_some(missing)}; unexpected"
                f" {_some(extra)}: mixtures of experts and other variants cannot be loaded"
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


def lay_out_weights(model: "HookedTransformer") -> "HookedTransformer":
    """Rewrite the weights of any HookedTransformer so that its forward pass stops copying them.

    Models from :func:`caa_lens.load_model` come that way. Names, shapes, values and outputs stay the same,
    bit for bit; only strides change, one parameter at a time, so the extra memory is that of the largest one.
    Weights whose layout the forward pass does not undo (of an MLP without gate, of experts, quantised ones)
    are left alone.

    Args:
        model: changed in place, in storage only.

    Returns:
        The same model.
    """
    from transformer_lens.components import AbstractAttention, GatedMLP, Unembed

    for module in model.modules():
        order_of: Mapping[str, Shape] = {}  # dimensions as they lie in memory, slowest first
        if isinstance(module, AbstractAttention):
            order_of = {**dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), (0, 2, 1)), "W_O": (2, 0, 1)}
        elif isinstance(module, GatedMLP):
            order_of = dict.fromkeys(("W_in", "W_gate", "W_out"), (1, 0))
        elif isinstance(module, Unembed):
            order_of = {"W_U": (1, 0)}
        for name, parameter in module.named_parameters(recurse=False):
            order = order_of.get(name)
            if order and parameter.is_floating_point():
                back = [order.index(dim) for dim in range(len(order))]
                parameter.data = parameter.data.permute(order).contiguous().permute(back)
    return model
