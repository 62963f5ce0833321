"""What does one behavior's vector do to another behavior's questions, and one prompt format's vector in another?

    python experiments/own/transfer_across_behaviors.py

Asked: the grid of behaviors by test sets beside the cosines of their vectors (normalised across behaviors, as in the
paper), and a sentiment vector extracted with one kind of prompt and used with another. The paper asks neither; it
finds vectors of the base model's format at work in the chat model (Figure 10). What was found on the demo model stands
in `docs/interpretation.md`, with this command.
"""

from pathlib import Path

import caa_lens as cl

MODEL = "demo"
LAYER = 15
BEHAVIORS = ("sentiment", "formality", "refusal", "sycophancy")
N_TEST = 20
PROMPTS = {
    "chat": cl.transfers.PromptSetting(),
    "base": cl.transfers.PromptSetting(prompt_format="llama2-base"),
    "gloomy": cl.transfers.PromptSetting(system="You are a gloomy assistant who sees the worst in everything."),
    "cheerful": cl.transfers.PromptSetting(system="You are a cheerful assistant who sees the best in everything."),
}
OUT = Path("runs/transfer_across_behaviors")


def main() -> None:
    model = cl.load_model(MODEL)
    OUT.mkdir(parents=True, exist_ok=True)
    sets = {name: cl.ContrastSet.load(name).split(test=N_TEST, seed=0) for name in BEHAVIORS}
    vectors = {name: cl.extract(model, train, layers=[LAYER]) for name, (train, _) in sets.items()}
    tests = {name: test for name, (_, test) in sets.items()}
    behaviors = cl.transfer_behaviors(model, tests, cl.vectors.normalize_across_behaviors(vectors), layer=LAYER)
    prompts = cl.transfer_prompts(model, *sets["sentiment"], PROMPTS, layer=LAYER)
    for name, grid in {"behaviors": behaviors, "prompts": prompts}.items():
        print(f"\n{grid!r}\nunsteered { ({key: round(value, 3) for key, value in grid.unsteered.items()}) }")
        print(grid.summary().round(3).to_string(index=False))
        grid.plot().write_html(OUT / f"{name}.html")
    print(f"\nfigures in {OUT}")


if __name__ == "__main__":
    main()
