"""A steered token a step at fixed addresses, so that a card can replay the step as one CUDA graph.

The library's own loop gives the card hundreds of small kernels a token, one by one; at batch 1 the card waits for
them. A graph gives them all at once. It needs what the library's loop has not: keys and values attended over their
whole room with a mask, and the position as a tensor on the card. Whether that pays is for a card to say, so it stays
here, beside a comparison of its tokens with those of the library's loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caa_lens.models.adapters.llama_blocks import KeptText, rotate, run_block
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.interventions import as_interventions


class StaticSteps:
    """Greedy steered generation of prompts of one length, without an end-of-sequence token.

    Args:
        vectors: as `generate_tokens` takes them; they act from the instruction's end on.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt], vectors: Sequence[Any], max_new_tokens: int) -> None:
        device = model.W_E.device
        batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=device, room=max_new_tokens)
        if bool(batch.padding.any()):
            raise ValueError("got prompts of different lengths, expected one length: a step's shapes are fixed")
        self.model, self.n_prompt = model, batch.tokens.shape[1]
        room = self.n_prompt + max(8, max_new_tokens)  # a graph's rehearsal takes some steps, too
        self.room = -(-room // 8) * 8  # attention with a mask wants rows of eight numbers
        self.edits: dict[int, list[Any]] = {}
        for one in as_interventions(model, vectors):
            self.edits.setdefault(one.vector.layer, []).append(one.edit(batch.steer_start).to(device))
        self.text = KeptText(model, len(prompts), None, self.room)
        for memory in (*self.text._keys, *self.text._values):
            memory.zero_()  # what is masked has to be finite: nothing times NaN is NaN
        self.tables = model.blocks[0].attn.rotary_cos, model.blocks[0].attn.rotary_sin
        self.max_new_tokens = max_new_tokens
        self.new = torch.zeros(len(prompts), max(8, max_new_tokens), dtype=torch.long, device=device)
        self.tokens = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(self.room, device=device)
        self.prompt = batch.tokens

    def start(self) -> None:
        """Run the prompt, and choose the first token."""
        self.text.behind = 0
        resid = self.text.step(self.prompt, self._edited(lambda: self.text.behind))
        self._choose(resid)
        self.position.fill_(self.n_prompt)

    def step(self) -> None:
        """The next token of every row: nothing is waited for, and no address changes."""
        position = self.position
        cos, sin = (table[position] for table in self.tables)
        mask = (self.places <= position)[None, None, None]
        resid = F.embedding(self.tokens, self.model.W_E)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, attn: Any) -> Tensor:
            keys, values = self.text._keys[layer], self.text._values[layer]
            keys.index_copy_(2, position, rotate(attn, k, cos, sin).transpose(1, 2))
            values.index_copy_(2, position, v.transpose(1, 2))
            z = F.scaled_dot_product_attention(
                rotate(attn, q, cos, sin).transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                scale=1 / attn.attn_scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
            return z.transpose(1, 2)

        edited = self._edited(lambda: self.n_prompt)  # every token behind the prompt is steered alike
        for layer, block in enumerate(self.model.blocks):
            resid = edited(layer, run_block(block, resid, partial(attend, layer=layer, attn=block.attn)))
        self._choose(resid)
        position += 1

    def _edited(self, behind: Callable[[], int]) -> Callable[[int, Tensor], Tensor]:
        def edited(layer: int, resid: Tensor) -> Tensor:
            for edit in self.edits.get(layer, ()):
                resid = edit.apply(resid, behind())
            return resid

        return edited

    def _choose(self, resid: Tensor) -> None:
        chosen = final_logits(self.model, resid[:, -1]).argmax(-1)[:, None]
        self.tokens.copy_(chosen)
        self.new.index_copy_(1, self.count, chosen)
        self.count += 1

    def run(self, n: int | None = None, step: Callable[[], object] | None = None) -> Tensor:
        """The tokens `[batch n]`, all by default."""
        n = self.max_new_tokens if n is None else n
        self.count.zero_()
        self.start()
        for _ in range(n - 1):
            (step or self.step)()
        return self.new[:, :n].clone()

    def captured(self, step: Callable[[], object] | None = None) -> Callable[[], object]:
        """One step as a CUDA graph."""
        step = step or self.step
        self.count.zero_()
        self.start()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # what is set up in the first calls must not be captured
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
