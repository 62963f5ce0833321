"""Compare steering methods fairly: effect on held-out questions against what they do to everything else.

1. The training pairs are split in two: most to fit on, the others to choose on.
2. Every method is fitted at as many settings as the others (layers; of masks over all layers, numbers of elements), and
   scored on the choosing part at as many strengths; the setting with the largest effect at one mean divergence, both
   signs counted, is chosen. What choosing costs is measured on neutral prompts of its own.
3. The chosen setting of each runs once on the test part, at all its strengths, and on other neutral prompts.
4. Controls are always there: nothing; a random direction of CAA's norm; the instruction in words, as a system prompt.

Effects are then read at the same divergence (`compared`), with paired intervals over questions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, as_seed, check_count, check_list, describe
from caa_lens.contrast.messages import Asked, plain_data
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.measures.answers import Scores, score_answers
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.elsewhere.neutral import CHOOSING, REPORTING
from caa_lens.measures.elsewhere.neutral_text import (
    OF_TEXT,
    mean_and_p95,
    neutral_questions,
    of_steered_text,
    of_unsteered_text,
    of_words,
)
from caa_lens.measures.placed_conditions import Condition
from caa_lens.methods.candidates import Candidate, named_candidates
from caa_lens.methods.compared import BUDGETS, NOTHING, WORDS, Choice, Comparison, matched
from caa_lens.methods.costs import Cost, numbers_of, share_of_coordinates, share_of_tokens, shares_prefix
from caa_lens.methods.data import hash_of
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.prompts.turns import check_one_system_prompt
from caa_lens.provenance import Provenance, layer_ranges

METHODS = ("CAA", "ActAdd", "Linear-AcT", "instruction", "BiPO", "SADI", "InferAligner")
STEERED_TEXT = ("all", "chosen", "none")


def compare(
    model: Any,
    train: ContrastSet,
    test: ContrastSet,
    methods: Sequence[str | Candidate] = METHODS,
    *,
    words: tuple[str, str],
    layers: Sequence[int] | None = None,
    validation: float | int | ContrastSet = 0.25,
    budgets: Sequence[float | int] = BUDGETS,
    choose_at: float | int = 0.1,
    neutral: tuple[Sequence[Asked], Sequence[Asked]] = (CHOOSING, REPORTING),
    n_tokens: int = 32,
    steered_text: str = "all",
    check: Callable[[str], float] | None = None,
    bipo_options: Mapping[str, Any] | None = None,
    prompt_format: PromptFormat | str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    seed: int | None = 0,
) -> Comparison:
    """Fit, choose and measure methods on the same pairs.

    Args:
        train: pairs to fit and choose on; `test` is held out from both.
        methods: names, see `candidates`, of which those with "original" act where their authors' code does; or
            candidates of your own. A random direction is always among them.
        words: the instruction in words, for more of the behavior and for less of it, as ("Be cheerful.", "Be gloomy.").
        layers: 0-based blocks that are chosen among; by default three, at 0.35, 0.5 and 0.65 of the depth.
        validation: the part of `train` that is chosen on, a share or a number of pairs; or a set of its own.
        budgets: mean divergences at which methods are compared, in nats a token.
        choose_at: the divergence at which a setting is chosen.
        neutral: questions that no method is fitted on: to choose on, and to report.
        n_tokens: of each neutral answer.
        steered_text: at which strengths neutral questions are answered under steering too, which finds texts that run
            away and is the costliest part: "all", those "chosen" for each method and sign, or "none".
        check: a number of a steered answer's text that tells the behavior without a judge, such as its share of
            capitals; its means over the reported neutral questions become the column `checked`.
        bipo_options: more of `methods.bipo.fit`, such as `{"epochs": 3}`.
        max_tokens: suffix tokens in flight at once; worked out from the free memory by default.

    Raises:
        TypeError, ValueError: for a method that is unknown or named twice, candidates with unequal numbers of settings
            or strengths, a test set that shares pairs with what is fitted or chosen on, or another kind of pairs;
            neutral questions that are both chosen on and reported, or questions of the pairs.
    """
    check_model(model)
    for pairs in (train, test):
        check_contrast_set(pairs)
    if train.kind != test.kind:
        raise ValueError(f"train has pairs of kind {train.kind!r}, test {test.kind!r}: give both of one kind")
    if not (isinstance(words, tuple) and len(words) == 2 and all(isinstance(one, str) and one for one in words)):
        raise TypeError(f"words must be two texts, as ('Be cheerful.', 'Be gloomy.'), got {describe(words)}")
    depth = model.cfg.n_layers
    by_default = sorted({round(share * (depth - 1)) for share in (0.35, 0.5, 0.65)})
    layers = check_layers(model, by_default if layers is None else layers)
    budgets = tuple(sorted(check_list("budgets", budgets, float)))
    if not budgets or min(budgets) <= 0 or as_float("choose_at", choose_at) <= 0:
        raise ValueError(f"budgets and choose_at are divergences above 0 nats, got {list(budgets)} and {choose_at}")
    choose_at, n_tokens, seed = as_float("choose_at", choose_at), check_count("n_tokens", n_tokens), as_seed(seed)
    if steered_text not in STEERED_TEXT:
        raise ValueError(f"unknown steered_text={steered_text!r}: expected one of {', '.join(STEERED_TEXT)}")
    fit_on, choose_on = _split(train, validation, seed)
    _check_held_out(test, fit_on, choose_on)
    asked = neutral_questions(neutral, (fit_on, choose_on, test))
    for question in (*(pair.question for pair in test), *asked[1]):
        check_one_system_prompt(question, words[0])  # which the model is told in
    chosen_format = resolve_format(model, prompt_format)
    candidates = _candidates(methods, words, len(layers), bipo_options, chosen_format)
    settings = {one.name: one.settings or layers for one in candidates}
    _check_alike(candidates, settings)

    def score(pairs: ContrastSet, conditions: Sequence[Condition], system: str | None = None) -> Scores:
        return score_answers(
            model,
            pairs,
            list(conditions),
            prompt_format=chosen_format,
            system=system,
            max_tokens=max_tokens,
            progress=progress,
        )

    fits: dict[str, Mapping[int, Any]] = {}
    seconds: dict[str, float] = {}
    for one in tqdm(candidates, desc="fit", unit="method", disable=not progress):
        begun = time.perf_counter()
        fits[one.name] = one.fit(model, fit_on, settings[one.name], seed)
        seconds[one.name] = time.perf_counter() - begun

    prompts = [[chosen_format.encode(model.tokenizer, text) for text in some] for some in asked]
    to_choose, to_report = (answered(model, some, max_new_tokens=n_tokens, progress=progress) for some in prompts)

    keys = [(one, setting, s) for one in candidates for setting in settings[one.name] for s in one.strengths]
    conditions: list[Condition] = [one.at(fits[one.name][setting], s) for one, setting, s in keys]
    tried = score(choose_on, [(), *conditions])
    effects = (tried.values[:, 1:] - tried.values[:, :1]).double().numpy()  # [question condition]
    divergences = token_kl(model, to_choose, conditions, max_tokens=max_tokens, progress=progress)
    kl = torch.cat(divergences, dim=1).mean(1).double().numpy()
    choices = tuple(_choose(one, settings[one.name], keys, effects, kl, choose_at, max(budgets)) for one in candidates)

    keys = [(one, found.setting, s) for one, found in zip(candidates, choices, strict=True) for s in one.strengths]
    conditions = [one.at(fits[one.name][setting], s) for one, setting, s in keys]
    tested = score(test, [(), *conditions])
    plain = tested.values[:, 0]
    divergences = token_kl(model, to_report, conditions, max_tokens=max_tokens, progress=progress)
    by_token = torch.cat(divergences, dim=1)  # [condition token]
    deployed = {(one.method, s) for one in choices for s in (one.up, one.down)}
    texted = [
        i
        for i, (one, _, s) in enumerate(keys)
        if steered_text == "all" or (steered_text == "chosen" and (one.name, s) in deployed)
    ]
    text = of_steered_text(
        model, prompts[1], [conditions[i] for i in texted], n_tokens=n_tokens, check=check, progress=progress
    )
    texts = dict(zip(texted, text, strict=True))
    with_text = steered_text != "none"
    nothing = of_unsteered_text(model, to_report, check) if with_text else {}
    rows = [_row(NOTHING, 0, 0.0, (), plain, plain, {"kl_mean": 0.0, "kl_p95": 0.0, **nothing})]
    for i, (one, setting, s) in enumerate(keys):
        costs_of_it = dict(zip(("kl_mean", "kl_p95"), mean_and_p95(by_token[i]), strict=True)) | texts.get(i, {})
        rows.append(_row(one.name, setting, s, conditions[i], tested.values[:, i + 1], plain, costs_of_it))
    for strength, instruction in zip((1.0, -1.0), words, strict=True):
        values = score(test, [()], system=instruction).values[:, 0]
        told = [chosen_format.encode(model.tokenizer, question, system=instruction) for question in asked[1]]
        costs_of_it = of_words(
            model, prompts[1], told, to_report, n_tokens=n_tokens, steered_text=with_text, check=check
        )
        rows.append(_row(WORDS, 0, strength, (), values, plain, costs_of_it))
    frame = pd.concat(rows, ignore_index=True).assign(behavior=test.behavior)
    costs = tuple(
        _cost(one, fits[one.name][found.setting], fit_on, to_report, seconds[one.name])
        for one, found in zip(candidates, choices, strict=True)
    )
    return Comparison(
        frame=frame,
        choices=choices,
        costs=costs,
        metric=tested.metric,
        budgets=budgets,
        n_neutral=len(to_report),
        settings={
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
            "train": train.name,
            "test": test.name,
            "test_hash": test.content_hash,
            "n_fit": str(len(fit_on)),
            "n_choose": str(len(choose_on)),
            "choose_on_hash": choose_on.content_hash,
            "layers": str(list(layers)),
            "choose_at": f"{choose_at:g}",
            "neutral": f"{len(prompts[0])} to choose, {len(prompts[1])} to report, {n_tokens} tokens",
            "neutral_hash": hash_of([[plain_data(one) for one in some] for some in asked]),
            "steered_text": steered_text,
            "check": "" if check is None else str(getattr(check, "__name__", type(check).__name__)),
            "words": " / ".join(words),
            "prompt_format": chosen_format.name,
            "bipo": str(dict(bipo_options or {})),
            "seed": str(seed),
        },
        provenance={
            "fit": Provenance(
                model=str(model.cfg.model_name),
                behavior=train.behavior,
                n_pairs=len(fit_on),
                dataset_hash=fit_on.content_hash,
                prompt_format=chosen_format.name,
                details=fit_on.provenance_details,
            )
        },
    )


def _split(train: ContrastSet, validation: float | int | ContrastSet, seed: int) -> tuple[ContrastSet, ContrastSet]:
    if not isinstance(validation, ContrastSet):
        return train.split(test=validation, seed=seed)
    check_contrast_set(validation)
    return train, validation


def _check_held_out(test: ContrastSet, fit_on: ContrastSet, choose_on: ContrastSet) -> None:
    for what, some in (("fitted", fit_on), ("chosen", choose_on)):
        if shared := set(test.pair_hashes) & set(some.pair_hashes):
            raise ValueError(
                f"{len(shared)} of the {len(test)} test pairs are among those that are {what} on, which would flatter "
                "the methods: train, test = pairs.split(test=0.3)"
            )
    if shared := set(fit_on.pair_hashes) & set(choose_on.pair_hashes):
        raise ValueError(f"{len(shared)} pairs to choose on are among those that are fitted on: give others")


def _candidates(
    methods: Sequence[str | Candidate],
    words: tuple[str, str],
    n_settings: int,
    options: Mapping[str, Any] | None,
    prompt_format: PromptFormat,
) -> list[Candidate]:
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise TypeError(f"expected a list of methods, got {describe(methods)}")
    known = named_candidates(words, n_settings=n_settings, bipo_options=options, prompt_format=prompt_format)
    found = []
    for one in (*methods, *(() if "random" in methods else ("random",))):
        if isinstance(one, Candidate):
            found.append(one)
        elif one in known:
            found.append(known[one])
        else:
            raise ValueError(
                f"unknown method {one!r}: expected some of {', '.join(known)}, or a Candidate. Activation scaling is "
                "tied to the positions of prompts of one length, and neutral questions have others, so it is none"
            )
    names = [one.name for one in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the method {repeated[0]!r} is there twice: give each its own name")
    return found


def _check_alike(candidates: Sequence[Candidate], settings: Mapping[str, Sequence[int]]) -> None:
    """As many evaluations for each."""
    for what, sizes in (
        ("settings", {one.name: len(settings[one.name]) for one in candidates}),
        ("strengths", {one.name: len(one.strengths) for one in candidates}),
    ):
        if len(set(sizes.values())) > 1:
            few, many = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            raise ValueError(
                f"{many!r} has {sizes[many]} {what} and {few!r} has {sizes[few]}: a method that is tuned more often "
                "looks better, so give all as many"
            )


def _choose(
    candidate: Candidate,
    settings: Sequence[int],
    keys: Sequence[tuple[Candidate, int, float]],
    effects: np.ndarray,
    kl: np.ndarray,
    at: float,
    most: float,
) -> Choice:
    tried, ends = [], {}
    for setting in settings:
        own = [i for i, (one, where, _) in enumerate(keys) if one is candidate and where == setting]
        towards, best = [], []
        for sign in (1, -1):
            some = sorted((i for i in own if keys[i][2] * sign > 0), key=lambda i: abs(keys[i][2]))
            point = matched([keys[i][2] for i in some], [float(kl[i]) for i in some], effects[:, some], at)
            towards.append(sign * float(point.effects.mean()))
            within = [i for i in some if kl[i] <= most]
            best.append(max(within, key=lambda i: sign * effects[:, i].mean(), default=None))
        tried.append((setting, sum(towards) / 2))
        ends[setting] = [0.0 if i is None else keys[i][2] for i in best]
    setting, value = max(tried, key=lambda one: one[1])
    return Choice(
        method=candidate.name,
        setting=setting,
        unit=candidate.unit,
        value=value,
        tried=tuple(tried),
        up=ends[setting][0],
        down=ends[setting][1],
    )


def _row(
    name: str,
    setting: int,
    strength: float,
    condition: Condition,
    values: torch.Tensor,
    plain: torch.Tensor,
    side_effects: Mapping[str, float],
) -> pd.DataFrame:
    """All questions of a method at a strength."""
    wheres = sorted({one.where if isinstance(one.where, str) else "caa" for one in condition})
    layers = sorted({edit.layer for edit in (one._at((0, None)) for one in condition)})
    return pd.DataFrame(
        {
            "method": name,
            "setting": setting,
            "layers": layer_ranges(layers) if layers else "",
            "positions": " ".join(wheres),
            "site": " ".join(sorted({one.site for one in condition})),
            "strength": strength,
            "question": np.arange(len(values)),
            "score": values.double().numpy(),
            "effect": (values - plain).double().numpy(),
            **{name: side_effects.get(name, np.nan) for name in ("kl_mean", "kl_p95", *OF_TEXT)},
        }
    )


def _cost(one: Candidate, fitted: Any, fit_on: ContrastSet, prompts: Sequence[Prompt], seconds: float) -> Cost:
    condition = one.at(fitted, max(one.strengths))
    forward, backward = one.passes(len(fit_on))
    return Cost(
        method=one.name,
        forward=forward,
        backward=backward,
        seconds=seconds,
        numbers=numbers_of(condition),
        coordinates=share_of_coordinates(condition),
        tokens=share_of_tokens(condition, prompts),
        shares_prefix=shares_prefix(condition, prompts),
    )
