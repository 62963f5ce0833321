"""Does a gate tell two kinds of prompts apart, and does nothing happen behind a closed one?

    python experiments/own/gate_of_two_classes.py

Asked: InferAligner's gate, its formula unchanged, on two harmless classes, questions about cooking (open) and about
programming (closed): how often it is right on questions that it was not fitted on, by layer; how often it opens at
neutral questions; and the divergence of the answers when the cooking direction is added behind it. The paper gates
harmful requests, guided by a safer model. What was found on the demo model stands in `docs/methods.md`.
"""

import pandas as pd
import torch

import caa_lens as cl
from caa_lens.measures.elsewhere.neutral import REPORTING

MODEL = "demo"
LAYERS = (1, 7, 14, 21, 28)
AT = 14  # where the direction is added
ALPHA = 1.0
COOKING = """
How do I poach an egg?
What spices go into a curry?
How long should rice simmer?
What makes bread dough rise?
How do I keep a sauce from splitting?
Which pan is best for frying fish?
How do I roast potatoes?
What can I use instead of butter in a cake?
How do I make soup stock from bones?
When should I salt boiling pasta?
How do I peel garlic quickly?
What is a good marinade for chicken?
How do I caramelise onions?
How much yeast does a pizza need?
What goes well with grilled salmon?
How do I whip cream without overdoing it?
How can I tell that a steak is done?
Which flour is used for pancakes?
How do I blanch green beans?
What herbs suit roasted lamb?
How do I thicken a stew?
What is the trick of a crisp pie crust?
How long do lentils cook?
How do I make a simple salad dressing?
""".strip().splitlines()
PROGRAMMING = """
How do I reverse a list in Python?
What is a pointer in C?
How do I merge two branches in Git?
What does a compiler do?
How do I read a file line by line?
Which loop is best for an array?
How do I catch an exception in Java?
What can I use instead of a global variable?
How do I write a unit test for a function?
When should I use recursion?
How do I parse a date quickly?
What is a good name for a class?
How do I sort a dictionary by value?
How much memory does an integer need?
What goes into a header file?
How do I query a database without joins?
How can I tell that a thread is done?
Which type is used for large numbers in Rust?
How do I split a string by commas?
What libraries suit numerical code?
How do I speed up a slow query?
What is the trick of a hash table?
How long does a binary search take?
How do I make a simple web server?
""".strip().splitlines()
N_FIT = 12


def main() -> None:
    model = cl.load_model(MODEL)
    fit_on, held_out = (COOKING[:N_FIT], PROGRAMMING[:N_FIT]), (COOKING[N_FIT:], PROGRAMMING[N_FIT:])
    fitted = cl.methods.inferaligner.fit(model, fit_on, layers=LAYERS)
    kinds = {"cooking": held_out[0], "programming": held_out[1], "neutral": REPORTING}
    opened = {kind: fitted.opened(model, questions).float().mean(0) for kind, questions in kinds.items()}
    table = pd.DataFrame({"layer": fitted.layers, **{kind: share.numpy() for kind, share in opened.items()}})
    table["right"] = (table["cooking"] + 1 - table["programming"]) / 2
    print(f"\n{fitted!r}\nshare of held-out questions that open the gate\n{table.round(2).to_string(index=False)}")
    condition = fitted.at([AT]).interventions(ALPHA)
    open_at = {kind: fitted.at([AT]).opened(model, questions)[:, 0] for kind, questions in kinds.items()}
    fmt = cl.prompts.resolve_format(model, None)
    rows = []
    for kind, questions in kinds.items():
        prompts = [fmt.encode(model.tokenizer, question) for question in questions]
        answers = cl.measures.answered(model, prompts, max_new_tokens=16)
        kl = torch.stack([one[0].mean() for one in cl.measures.token_kl(model, answers, [condition])])
        for is_open in (True, False):
            some = kl[open_at[kind] == is_open]
            rows.append(
                (
                    kind,
                    "open" if is_open else "closed",
                    len(some),
                    float(some.mean()),
                    float(some.max()) if len(some) else 0.0,
                )
            )
    print(
        pd.DataFrame(rows, columns=["questions", "gate", "n", "mean KL", "largest KL"]).round(4).to_string(index=False)
    )
    for question in (held_out[0][0], held_out[1][0], REPORTING[0]):
        plain, steered = (cl.generate(model, question, list(some), max_new_tokens=24) for some in ((), condition))
        print(f"\n{question}\n  without: {plain.shown!r}\n  with:    {steered.shown!r}")


if __name__ == "__main__":
    main()
