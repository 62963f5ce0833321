"""The same checkpoint as a TransformerBridge and as a HookedTransformer, in one process: sweeps, extraction, text.

    python benchmarks/bridge.py                        # everything, 30 layers x 5 multipliers, 10 questions
    python benchmarks/bridge.py --only letters text    # some of: letters, completions, extraction, text
    python benchmarks/bridge.py --questions 2 --repeats 1 --tokens 8   # quicker

All times are CPU seconds of this process (`time.process_time`), which a busy machine disturbs less than the wall's
clock; with one thread they are what an idle machine would take. The naive way is one plain forward with one hook for
each condition and prompt, with logits of every position. It runs a few conditions on every question, and its time is
scaled to the whole grid: every condition costs the same. Ways take turns, and the best turn of each counts.

With TransformerLens 4, which has no HookedTransformer, there are the rows of the bridge alone.
"""

import argparse
import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from timing import cpu_seconds, print_table

import caa_lens as cl
from caa_lens.engine.shared_prefix import unsupported
from caa_lens.engine.streams import reading
from caa_lens.measures.answers import score_answers
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.loading.causal_models import has_hooked_transformer
from caa_lens.prompts.prompt_formats import default_format, encode_answer, encode_letters
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

PARTS = ("letters", "completions", "extraction", "text")
MULTIPLIERS = [-2.0, -1.0, 0.0, 1.0, 2.0]
SAMPLED = [(3, 1.0), (20, -2.0)]  # the conditions that the naive way runs
BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"


def load() -> dict[str, Any]:
    """The demo model as each kind that is installed."""
    with contextlib.redirect_stderr(io.StringIO()):
        models: dict[str, Any] = {BRIDGE: cl.load_model("demo", device="cpu", dtype="float32", backend="bridge")}
    if has_hooked_transformer():
        models[HOOKED] = cl.load_model("demo", device="cpu", dtype="float32", backend="hooked")
    for kind, model in models.items():
        assert unsupported(model) is None, f"{kind}: {unsupported(model)}"  # else everything here is the naive way
    return models


def bytes_held(model: Any) -> int:
    """Of parameters and buffers; what two of them share counts once."""
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage() for one in (*model.parameters(), *model.buffers())
    }
    return sum(storage.nbytes() for storage in storages.values())


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best CPU time of each way; they take turns, so that a noisy minute hits all of them."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, run in ways.items():
            best[name] = min(best[name], cpu_seconds(run))
    return best


def naive(model: Any, prompts: list, vectors: Any, condition: tuple[int, float]) -> list[torch.Tensor]:
    """One plain forward a prompt with one hook; logits of the whole vocabulary at every position."""
    layer, multiplier = condition
    point, found = adapter_of(model).resid_post(model, layer), []
    for prompt in prompts:

        def steer(module, given, resid, prompt=prompt):
            resid = resid.clone()
            resid[:, prompt.steer_start :] += multiplier * vectors[layer].direction
            return resid

        handle = point.register_forward_hook(steer)
        try:
            found.append(model(torch.tensor([prompt.tokens]))[0])
        finally:
            handle.remove()
    return found


def sweeps(models: dict[str, Any], part: str, n_questions: int, repeats: int) -> None:
    one = models[BRIDGE]
    pairs = cl.ContrastSet.load("sycophancy" if part == "letters" else "sentiment").sample(n_questions, seed=0)
    n_layers, d_model = one.cfg.n_layers, one.cfg.d_model
    random = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(0))
    vectors = cl.SteeringVectors(
        directions=10 * torch.nn.functional.normalize(random, dim=-1), layers=tuple(range(n_layers))
    )
    form, letters = default_format(one), []
    if part == "letters":
        both = [encode_letters(form, one.tokenizer, p.question, (p.positive[1], p.negative[1])) for p in pairs]
        prompts, letters = [prompt for prompt, _ in both], [ids for _, ids in both]
    else:
        prompts = [encode_answer(form, one.tokenizer, p.question, a) for p in pairs for a in (p.positive, p.negative)]
    grid = [(layer, m) for layer in range(n_layers) for m in MULTIPLIERS]
    conditions = [(Intervention(vector=vectors[layer], multiplier=m),) for layer, m in grid]
    kept: dict[str, Any] = {}

    def engine(kind: str) -> None:
        kept[kind] = score_answers(models[kind], pairs, conditions, progress=False).values

    def plainly(kind: str) -> None:
        kept[kind, "naive"] = [naive(models[kind], prompts, vectors, condition) for condition in SAMPLED]

    for model in models.values():
        score_answers(model, pairs[:1], conditions[:5], progress=False)  # warm up, and try the engine out
    ways = {(kind, way): lambda k=kind, w=way: w(k) for kind in models for way in (engine, plainly)}
    times = in_turns(ways, repeats)
    worst = dict.fromkeys(models, 0.0)
    for kind in models:
        for condition, logits in zip(SAMPLED, kept[kind, "naive"], strict=True):
            column = grid.index(condition)
            for i in range(len(pairs)):
                expected = (
                    letter_score(logits[i], letters[i])
                    if part == "letters"
                    else mean_logp(logits[2 * i], prompts[2 * i]) - mean_logp(logits[2 * i + 1], prompts[2 * i + 1])
                )
                worst[kind] = max(worst[kind], abs(expected - float(kept[kind][i, column])))
    rows = []
    for kind in models:
        slow, fast = times[kind, plainly] * len(grid) / len(SAMPLED), times[kind, engine]
        rows.append([f"{kind}, one plain forward a condition and prompt (scaled)", slow, 1.0, ""])
        rows.append([f"{kind}, `score_answers`", fast, slow / fast, f"{worst[kind]:.1e}"])
    lengths, steered = [len(p) for p in prompts], [len(p) - p.steer_start for p in prompts]
    print_table(
        f"sweep of {part}: {len(grid)} conditions x {len(pairs)} questions, {min(lengths)} to {max(lengths)} tokens, "
        f"{min(steered)} to {max(steered)} of them steered",
        ["way", "CPU seconds", "naive / this", "largest difference from naive"],
        rows,
    )


def letter_score(logits: torch.Tensor, ids: tuple[int, int]) -> float:
    p = logits[-1].softmax(-1)
    return float(p[ids[0]] / (p[ids[0]] + p[ids[1]]))


def mean_logp(logits: torch.Tensor, prompt: Any) -> float:
    first = prompt.answer_start
    targets = torch.tensor(prompt.tokens[first:])
    return float(logits[first - 1 : -1].log_softmax(-1).gather(-1, targets[:, None]).mean())


def extraction(models: dict[str, Any], n_pairs: int, repeats: int) -> None:
    pairs, one = cl.ContrastSet.load("sycophancy").sample(n_pairs, seed=0), models[BRIDGE]
    form = default_format(one)
    prompts = [
        tuple(encode_answer(form, one.tokenizer, p.question, a) for a in (p.positive, p.negative)) for p in pairs
    ]
    kept: dict[Any, torch.Tensor] = {}

    def shared(kind: str) -> None:
        kept[kind] = cl.extract(models[kind], pairs, progress=False).directions

    def plainly(kind: str) -> None:
        model = models[kind]
        total = torch.zeros(model.cfg.n_layers, model.cfg.d_model)
        for both in prompts:
            for sign, prompt in zip((1, -1), both, strict=True):

                def keep(layer: int, resid: torch.Tensor, sign=sign, at=prompt.read[0]) -> None:
                    total[layer] += sign * resid[0, at]

                with reading(model, range(model.cfg.n_layers), keep):
                    adapter_of(model).run(model, torch.tensor([prompt.tokens]))
        kept[kind, "plain"] = total / len(prompts)

    for model in models.values():
        cl.extract(model, pairs[:1], progress=False)
    times = in_turns({(k, w): lambda k=k, w=w: w(k) for k in models for w in (shared, plainly)}, repeats)
    rows = []
    for kind in models:
        cosine = torch.cosine_similarity(kept[kind], kept[kind, "plain"], dim=-1).min()
        slow, fast = times[kind, plainly], times[kind, shared]
        rows.append([f"{kind}, two plain forwards a pair", slow / n_pairs, 1.0, ""])
        rows.append([f"{kind}, `extract`", fast / n_pairs, slow / fast, f"{float(cosine):.7f}"])
    print_table(
        f"extraction from {n_pairs} A/B pairs at {one.cfg.n_layers} layers",
        ["way", "CPU seconds a pair", "plain / this", "smallest cosine with plain"],
        rows,
    )


def text(models: dict[str, Any], n_tokens: int, repeats: int) -> None:
    """Seconds of a step: of `n_tokens` steps behind the first, which reads the prompt."""
    one = models[BRIDGE]
    prompt = default_format(one).encode(one.tokenizer, "Describe a walk in the park.")
    random = torch.randn(one.cfg.d_model, generator=torch.Generator().manual_seed(0))
    vector = cl.SteeringVector.from_direction(10 * torch.nn.functional.normalize(random, dim=0), 14)
    rows: list[list[object]] = []
    for batch_size in (1, 8):
        tokens = torch.tensor([prompt.tokens] * batch_size)

        def ours(kind: str, n: int, size: int = batch_size) -> None:
            model = models[kind]
            eos, model.tokenizer.eos_token = model.tokenizer.eos_token, None  # so that no way stops early
            try:
                list(generate_tokens(model, [prompt] * size, vectors=[(vector, 1.0)], max_new_tokens=n))
            finally:
                model.tokenizer.eos_token = eos

        def theirs(kind: str, n: int, tokens: torch.Tensor = tokens, size: int = batch_size) -> None:
            with cl.steer(models[kind], vector, prompt=[prompt] * size):
                models[kind].generate(tokens, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False)

        ways = {
            (kind, way, n): lambda k=kind, w=way, n=n: w(k, n)
            for kind in models
            for way in (ours, theirs)
            for n in (1, 1 + n_tokens)
        }
        for kind in models:
            ours(kind, 2)
        times = in_turns(ways, repeats)
        for kind in models:
            for way, name in ((ours, "`cl.generate`"), (theirs, "its own `generate` inside `cl.steer`")):
                step = (times[kind, way, 1 + n_tokens] - times[kind, way, 1]) / n_tokens
                rows.append([batch_size, f"{kind}, {name}", step, batch_size / step])
    print_table(
        f"text, steered at layer 14, {n_tokens} tokens",
        ["batch", "way", "CPU seconds a step", "tokens a CPU second"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = load()
    held = ", ".join(f"{kind} {bytes_held(model) / 1e6:.0f} MB" for kind, model in models.items())
    print(f"parameters and buffers: {held}")
    with torch.inference_mode():
        for part in options.only:
            if part == "extraction":
                extraction(models, options.questions, options.repeats)
            elif part == "text":
                text(models, options.tokens, options.repeats)
            else:
                sweeps(models, part, options.questions, options.repeats)


if __name__ == "__main__":
    main()
