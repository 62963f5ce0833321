"""Do a model's vectors still work after it was finetuned, and can a linear map carry them?

    python experiments/own/transfer_across_models.py

Asked: the cosine of sentiment vectors before and after a short finetune, layer by layer, and the old vectors' effect in
the finetuned model (the paper's Figures 9 and 10, base against chat; here a short finetune of our own);
then a linear map between the two streams, with its held-out R^2, and the effect of what it carries. Only one model is
in memory at any time: vectors and activations go through files. What was found on the demo model stands in
`docs/interpretation.md`, with this command.
"""

from pathlib import Path

import torch

import caa_lens as cl
from caa_lens.models.loading.weights import checkpoint_parameters
from caa_lens.models.placement import device_of_tokens
from caa_lens.prompts.prompt_formats import default_format, encode_answer

MODEL = "demo"
LAYERS = tuple(range(2, 30, 3))
N_TEST = 12
STEPS, BATCH, RATE = 40, 4, 1e-5  # of Adam, with the gradient of some answers a step
OUT = Path("runs/transfer_across_models")


def main() -> None:
    train, test = cl.ContrastSet.load("sentiment").split(test=20, seed=0)
    test = test.sample(N_TEST, seed=0)
    shared = [cl.ContrastSet.load(name) for name in ("sentiment", "formality", "refusal", "sycophancy")]
    OUT.mkdir(parents=True, exist_ok=True)

    model = cl.load_model(MODEL)
    cl.extract(model, train, layers=LAYERS).save(OUT / "before.safetensors")
    for pairs in shared:
        cl.engine.pair_activations(model, pairs, layers=LAYERS).save(OUT / f"{pairs.name}.safetensors")

    finetune(model, cl.ContrastSet.load("formality"))  # from here on it is another model
    model.cfg.model_name += " taught formality"
    own, old = cl.extract(model, train, layers=LAYERS), cl.SteeringVectors.load(OUT / "before.safetensors")
    before = [cl.engine.PairActivations.load(OUT / f"{pairs.name}.safetensors") for pairs in shared]
    residual_map = cl.transfers.fit_residual_map(
        before, [cl.engine.pair_activations(model, pairs, layers=LAYERS) for pairs in shared]
    )
    print(f"\n{residual_map!r}\n{residual_map.frame.round(3).to_string(index=False)}")
    for name, foreign in {"as_they_are": old, "mapped": residual_map.carry(old)}.items():
        result = cl.transfer_models(model, test, own, foreign)
        print(f"\n{name}: {result!r}\n{result.cosines().frame.round(3).T.to_string()}")
        table = result.summary().pivot(index="layer", columns=["vectors", "multiplier"], values=["mean", "low", "high"])
        print(table.round(3).to_string())
        result.plot().write_html(OUT / f"{name}.html")
        result.plot_cosine().write_html(OUT / f"{name}_cosine.html")
    print(f"\nfigures in {OUT}")


def finetune(model, pairs) -> None:
    """Teach the positive completions, in place."""
    prompts = [encode_answer(default_format(model), model.tokenizer, pair.question, pair.positive) for pair in pairs]
    parameters = [parameter.requires_grad_(True) for parameter in checkpoint_parameters(model).values()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for prompt in [prompts[(step * BATCH + i) % len(prompts)] for i in range(BATCH)]:
            tokens = torch.tensor([prompt.tokens], device=device_of_tokens(model))
            with torch.enable_grad():
                logp = model(tokens).log_softmax(-1)[0, prompt.answer_start - 1 : -1]
                loss = -logp.gather(-1, tokens[0, prompt.answer_start :, None]).mean() / BATCH
                loss.backward()
            losses.append(BATCH * loss.item())
        optimizer.step()
        if step % 10 == 0:
            print(f"finetune step {step}: loss {sum(losses) / BATCH:.3f}")


if __name__ == "__main__":
    main()
