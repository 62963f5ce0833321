"""The least arithmetic that a sweep of completions needs, counted: blocks, vocabulary and attention apart.

    python benchmarks/completion_floor.py                  # 6 questions, 30 layers x 5 multipliers
    python benchmarks/completion_floor.py --questions 1    # that of bench.py's row

Every prompt runs once. Behind it, each token of the answers runs once a condition and block above its layer, and all
conditions below; what both answers begin with runs once for both, and their last tokens not at all. Each predicting
token needs one product with the whole vocabulary a condition. Nothing is run but the tokenizer.
"""

import argparse

import caa_lens as cl
from caa_lens.engine.token_trees import TokenTree
from caa_lens.prompts.prompt_formats import default_format, encode_answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--multipliers", type=int, default=5, help="of which one is 0")
    options = parser.parse_args()
    model = cl.load_model("demo", device="cpu", dtype="float32")
    cfg, form = model.cfg, default_format(model)
    steered = options.multipliers - 1
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    of_block = 2 * cfg.d_model * (2 * cfg.d_head * (cfg.n_heads + n_kv) + 3 * cfg.d_mlp)  # operations a token
    of_vocabulary = 2 * cfg.d_model * cfg.d_vocab
    row_blocks = sum(1 + steered * layer for layer in range(cfg.n_layers))  # conditions that differ, over the blocks
    conditions = 1 + steered * cfg.n_layers
    blocks = vocabulary = attention = in_rows = plain = 0
    for pair in cl.ContrastSet.load("sentiment").sample(options.questions, seed=0):
        both = [encode_answer(form, model.tokenizer, pair.question, a) for a in (pair.positive, pair.negative)]
        start = both[0].steer_start
        n = len(TokenTree.of([one.tokens[start:-1] for one in both]))
        blocks += (row_blocks * n + cfg.n_layers * start) * of_block
        vocabulary += conditions * n * of_vocabulary
        attention += 4 * cfg.n_heads * cfg.d_head * row_blocks * n * (start + n)
        padded = 2 * max(len(one) - start for one in both)  # as two rows of one length, with the last tokens
        in_rows += (row_blocks * padded + cfg.n_layers * start) * of_block
        in_rows += conditions * sum(len(one) - one.answer_start for one in both) * of_vocabulary
        in_rows += 4 * cfg.n_heads * cfg.d_head * row_blocks * padded * (start + padded // 2)
        plain += sum(len(one) for one in both) * (cfg.n_layers * of_block + of_vocabulary)
    total = blocks + vocabulary + attention
    print("| part | GFLOP | share |\n|---|---|---|")
    for name, n in (("blocks", blocks), ("vocabulary", vocabulary), ("attention", attention), ("all", total)):
        print(f"| {name} | {n / 1e9:.0f} | {n / total:.0%} |")
    n_grid = options.multipliers * cfg.n_layers
    least = (
        f"{total / plain:.1f} plain passes, {n_grid * plain / total:.2f} times less than {n_grid} forwards of each text"
    )
    print(f"\n{least}; both answers as rows of one length took {in_rows / total:.2f} times as much")


if __name__ == "__main__":
    main()
