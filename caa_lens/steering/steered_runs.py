"""What a model runs while a steered block is open, and what of it was steered: told at the block's end.

Torch's own hooks on the embedding and on every block see which tokens run, through which blocks, and how many are
behind them in a KV cache; `model.reset_hooks()` leaves them alone. One forward is a pass. Passes that go on with a KV
cache, or start at the layer where an earlier one stopped, are one run with it.
"""

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from caa_lens.engine.edits import Edit
from caa_lens.engine.positions import Reach
from caa_lens.models.adapters.adapter import Entry
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.adapters.torch_hooks import stream_of
from caa_lens.prompts.batches import PromptBatch


class NothingSteeredWarning(UserWarning):
    """`steer` without a `with` block, or a run that a vector was not added to."""


def warn_past_the_end(edits: Sequence[Edit], n_pos: int, *, stacklevel: int) -> None:
    """Warns of edits at no position of the first `n_pos`, of which there are all in a run."""
    for edit in edits:
        reach = Reach.of(edit.positions)
        if not reach.meets(0, n_pos):
            warnings.warn(
                f"the vector at layer {edit.layer} was not added: it acts {reach}, and the run has positions 0 to "
                f"{n_pos - 1}",
                NothingSteeredWarning,
                stacklevel=stacklevel + 1,
            )


class OtherPromptWarning(UserWarning):
    """The model ran another text than the prompt that `steer` was told, so steering started elsewhere in it."""


class VisiblePaddingWarning(UserWarning):
    """The padding of a batch was seen by attention, so its rows are not what each prompt gives alone."""


@dataclass(slots=True, eq=False)
class _Run:
    """A text, whole or in chunks: its tokens so far, those behind it included, and which vectors missed it and why."""

    begins: int
    cache: weakref.ref | None = None
    length: int = 0
    due: set[int] = field(default_factory=set)  # edits that some pass had positions for
    missed: dict[int, tuple[str, int]] = field(default_factory=dict)  # edit to (why, a number for the message)


@dataclass(slots=True, eq=False)
class _Pass:
    """One forward: the blocks it went through, and which edits acted in it."""

    run: _Run
    behind: int
    until: int
    first: int
    last: int
    n_rows: int
    number: int | None = None  # of the model's own forward, where the kind of model tells
    whole: bool = False  # whether its latest block came to its end
    continued: bool = False
    acted: set[int] = field(default_factory=set)


class SteeredRuns:
    """Follows the passes of a model, from when it is made until `close`."""

    def __init__(self, model: Any, edits: Sequence[Edit], prompts: PromptBatch | None) -> None:
        self.edits = tuple(edits)
        self._reach = [Reach.of(one.positions) for one in edits]
        self._n_layers = len(model.blocks)
        self._model = weakref.ref(model)
        self._prompts = prompts
        self._padding = 0 if prompts is None else int(prompts.padding.max())
        self._passes: dict[int, _Pass] = {}  # of each thread, the latest
        self._embedded: dict[int, Tensor] = {}  # of each thread, tokens that were embedded and did not run yet
        self._stopped: dict[tuple, _Pass] = {}  # passes that stopped below the last block, by how they would go on
        self._outputs: dict[int, tuple[weakref.ref, _Pass]] = {}  # of each block, the latest
        self._cached: dict[int, _Run] = {}  # runs by the id of their KV cache
        self._n_runs = 0
        self._missed: dict[tuple[str, int], list[int]] = {}  # (why, edit) to a number of each run it missed
        self._other_prompt = self._padding_seen = 0
        self._handles = self._follow(model)

    def acted(self, edit: int) -> None:
        """To be told by the hook that adds a vector."""
        if (here := self._passes.get(threading.get_ident())) is not None:
            here.acted.add(edit)

    @property
    def ran(self) -> bool:
        """Whether anything ran."""
        return self._n_runs > 0 or bool(self._passes)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for here in list(self._passes.values()):
            self._end_pass(here)
        for here in list(self._stopped.values()):
            self._judge(here)
        for run in self._cached.values():
            self._end_run(run)
        self._passes, self._stopped, self._cached = {}, {}, {}

    def warnings(self) -> list[UserWarning]:
        """What happened, one warning for each kind."""
        found: list[UserWarning] = []
        for why in ("removed", "stopped", "started", "past", "short"):
            numbers_of = {i: numbers for (reason, i), numbers in self._missed.items() if reason == why}
            if not numbers_of:
                continue
            n_missed = max(map(len, numbers_of.values()))
            of = f" in {n_missed} of {self._n_runs} runs" if n_missed < self._n_runs else ""
            what = "nothing was steered"
            if len(numbers_of) < len(self.edits):
                layers = sorted({self.edits[i].layer for i in numbers_of})
                subject = ("vectors at layers", "were") if len(layers) > 1 else ("vector at layer", "was")
                what = f"the {subject[0]} {' and '.join(map(str, layers))} {subject[1]} not added"
            edit, (number, *_) = next(iter(numbers_of.items()))
            found.append(NothingSteeredWarning(f"{what}{of}: {self._because(why, edit, number)}"))
        if self._other_prompt and not any(why == "short" for why, _ in self._missed):
            found.append(
                OtherPromptWarning(
                    "the model ran another text than the prompt that steer was told, so steering started elsewhere in "
                    "it: give every prompt a block of its own, or generate(..., vectors=[...]), which needs none"
                )
            )
        if self._padding_seen:
            found.append(
                VisiblePaddingWarning(
                    "the padding of the batch was not masked, so attention saw it and padded rows are not what their "
                    "prompts give alone; TransformerLens' generate masks only what it takes for padding itself "
                    "(TransformerLens#1005): use caa_lens.generate(model, prompts, vectors=[...]), or run the batch "
                    "with model(batch.tokens, attention_mask=batch.attention_mask)"
                )
            )
        return found

    def _because(self, why: str, edit: int, number: int) -> str:
        layer, reach = self.edits[edit].layer, self._reach[edit]
        if why == "removed":
            return (
                "the block's hooks did not run. model.reset_hooks() inside the block removes them, and a module put in "
                "the place of a hook point hides it: add hooks with model.hooks(...), which removes its own only"
            )
        if why == "stopped":
            return f"what ran stopped after block {number}: let it run with stop_at_layer={layer + 1} or more"
        if why == "started":
            return f"what ran started at block {number}, above layer {layer}: start_at_layer={layer} or less is steered"
        if why == "past":
            return f"what ran begins at position {number}, behind what is steered, {reach}"
        return (
            f"what the model ran has {number} tokens, and steering starts at position {reach.first}. Run the prompt's "
            "own tokens, torch.tensor([Prompt.of(model, question).tokens]): they are more than the question's; or "
            "give start=0"
        )

    # ---- following ------------------------------------------------------------------------------------------------

    def _follow(self, model: Any) -> list[Any]:
        # Plain functions: a copy of the model that is made inside the block shares them, instead of copying all this.
        def embed(module: Any, given: tuple, keywords: dict) -> None:
            if isinstance(tokens := (given or tuple(keywords.values()))[0], Tensor):
                self._embedded[threading.get_ident()] = tokens

        adapter = adapter_of(model)
        handles = [model.embed.register_forward_pre_hook(embed, with_kwargs=True)]
        for index, block in enumerate(model.blocks):

            def enter(module: Any, given: tuple, keywords: dict, index: int = index) -> None:
                entry = adapter.entering(model, index, given, keywords)
                if not entry.stops:
                    self._enter_block(index, entry)

            def leave(module: Any, given: tuple, output: Any, index: int = index) -> None:
                self._leave_block(index, stream_of(output))

            block = getattr(block, "_orig_mod", block)  # of one that torch.compile wraps
            handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        return handles

    def _enter_block(self, index: int, entry: Entry) -> None:
        thread, resid, cache = threading.get_ident(), entry.resid, entry.cache
        here = self._passes.get(thread)
        if here is not None and entry.run is not None and entry.run == here.number:
            here.last, here.whole = index, False
            if entry.injected:  # what the blocks below wrote is forgotten
                here.first, here.acted = index, set()
            return
        output, of_pass = self._outputs.get(index - 1, (None, None))
        goes_on = output is not None and output() is resid
        if here is not None and here.whole and goes_on and of_pass is here and index == here.last + 1:
            here.last, here.whole = index, False
            return
        if here is not None:
            self._end_pass(here)
        n_rows, n_pos = resid.shape[:2]
        behind = entry.behind
        earlier = of_pass if goes_on else self._stopped.get((index, n_rows, n_pos, behind))
        run = earlier.run if earlier is not None and cache is not None else self._run_of(cache, behind)
        here = _Pass(run=run, behind=behind, until=behind + n_pos, first=index, last=index, n_rows=n_rows)
        here.number = entry.run
        if earlier is not None:
            earlier.continued = True
            here.first = earlier.first
            here.acted = {i for i in earlier.acted if self.edits[i].layer < index}
        self._passes[thread] = here
        run.length = max(run.length, here.until)
        tokens = self._embedded.pop(thread, None)
        if earlier is None:
            self._look(here, n_pos, tokens if index == 0 else None, entry.mask)

    def _leave_block(self, index: int, resid: Any) -> None:
        if (here := self._passes.get(threading.get_ident())) is not None:
            here.whole = True
            self._outputs[index] = weakref.ref(resid), here

    def _run_of(self, cache: Any, behind: int) -> _Run:
        if cache is None:
            return _Run(begins=behind)
        before = self._cached.get(id(cache))
        if before is not None:
            # An id may be another cache's by now.
            if behind and before.cache is not None and before.cache() is cache:
                return before
            self._end_run(before)
        run = self._cached[id(cache)] = _Run(begins=behind, cache=weakref.ref(cache))
        return run

    def _look(self, here: _Pass, n_pos: int, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Compare a pass with the prompts: their tokens, as far as it goes, and the mask on their padding."""
        prompts = self._prompts
        if prompts is None or here.behind >= prompts.tokens.shape[1]:  # behind their end, without waiting for a GPU
            return
        n_prompts, n_rows = len(prompts.tokens), here.n_rows
        if tokens is not None and tokens.ndim == 2 and tokens.shape[1] == n_pos and n_prompts in (1, len(tokens)):
            ran = tokens.to(prompts.tokens.device)
            columns = slice(here.behind, here.until)
            expected, real = prompts.tokens[:, columns], prompts.attention_mask[:, columns]
            if not bool(((ran[:, : expected.shape[1]] == expected) | ~real).all()):
                self._other_prompt += 1
                return
        if self._padding and n_rows == n_prompts:
            self._padding_seen += _sees(mask, ~prompts.attention_mask[:, : here.until])

    def _cache_made(self, here: _Pass) -> Any:
        model = self._model()
        return None if here.number is None or model is None else adapter_of(model).cache_of(model, here.number)

    # ---- judging --------------------------------------------------------------------------------------------------

    def _end_pass(self, here: _Pass) -> None:
        if not here.whole:  # an error in a block ended it, which the caller heard of
            return
        if here.last < self._n_layers - 1:
            key = (here.last + 1, here.n_rows, here.until - here.behind, here.behind)
            if (before := self._stopped.get(key)) is not None:
                self._judge(before)
            self._stopped[key] = here
        else:
            self._judge(here)

    def _judge(self, here: _Pass) -> None:
        """Note the vectors that should have been added in a pass and were not."""
        if here.continued:
            return
        for i, (one, reach) in enumerate(zip(self.edits, self._reach, strict=True)):
            if reach.meets(here.behind, here.until):
                here.run.due.add(i)
                if one.layer > here.last:
                    here.run.missed.setdefault(i, ("stopped", here.last))
                elif one.layer < here.first:
                    here.run.missed.setdefault(i, ("started", here.first))
                elif i not in here.acted:
                    here.run.missed.setdefault(i, ("removed", 0))
        if here.run.cache is None and (cache := self._cache_made(here)) is not None:
            here.run.cache = weakref.ref(cache)  # others may go on with it
            self._cached[id(cache)] = here.run
        if here.run.cache is None:
            self._end_run(here.run)

    def _end_run(self, run: _Run) -> None:
        self._n_runs += 1
        for i, reach in enumerate(self._reach):
            if i not in run.due and reach.first is not None:
                short = run.length <= reach.first
                run.missed.setdefault(i, ("short", run.length) if short else ("past", run.begins))
        for i, (why, number) in run.missed.items():
            self._missed.setdefault((why, i), []).append(number)


def _sees(mask: Tensor | None, padding: Tensor) -> bool:
    """Whether an attention mask `[batch pos]` lets any padding through."""
    return mask is None or bool((mask[:, : padding.shape[1]].to(padding.device).bool() & padding).any())
