"""A beginner's mistakes are answered in the beginner's words: what was got, what was expected, what to write instead.

Tests run with types checked at every call, where such calls fail earlier. Here they run as a user's do, in a process
of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MISTAKES = {
    'cl.extract(model, "sentiment")': "got the str 'sentiment': make one with ContrastSet.load('sentiment')",
    "cl.extract(pairs, model)": "expected a model from caa_lens.load_model, got ContrastSet",
    'cl.extract("demo", pairs)': "expected a model from caa_lens.load_model, got the str 'demo'",
    "cl.extract(model, [('q', 'a', 'b')])": "ContrastSet.from_pairs",
    "cl.extract(model, pairs, layers=2)": "layers must be a list of whole numbers, got 2: write layers=[2]",
    "cl.extract(model, pairs, layers='2')": "layers must be a list of whole numbers, got the str '2'",
    "cl.extract(model, pairs, layers=['2'])": "layers must be whole numbers, got the str '2' among them",
    "cl.extract(model, pairs, layers=[1.5])": "layers must be whole numbers, got the float 1.5 among them",
    "cl.extract(model, pairs, layers=[None])": "layers must be whole numbers, got NoneType among them",
    "cl.extract(model, pairs, layers=[-1])": "layer -1 is out of range: tiny has layers 0 to 3; the last is 3, not -1",
    "cl.engine.pair_activations(model, 'sentiment')": "expected a ContrastSet",
    "cl.engine.pair_activations(pairs, model)": "expected a model",
    "cl.sweep(model, pairs, vectors, multipliers=1)": "must be a list of numbers, got 1: write multipliers=[1]",
    "cl.sweep(model, pairs, vectors, multipliers=['a'])": "multipliers must be numbers, got the str 'a' among them",
    "cl.sweep(model, pairs, vectors[1])": "got one SteeringVector: give the set, with the layer as layers=[...]",
    "cl.sweep(model, pairs, 'v.safetensors')": "SteeringVectors.load",
    "cl.sweep(model, vectors, pairs)": "expected a ContrastSet, got SteeringVectors",
    "cl.sweep(model, pairs, vectors, multipliers=[])": "no multipliers given",
    "cl.transfer_layers(model, vectors, pairs)": "expected a ContrastSet, got SteeringVectors",
    "cl.transfer_layers(model, pairs, vectors[1])": "expected SteeringVectors, got one SteeringVector",
    "cl.transfer_models(model, pairs, vectors, vectors[1])": "expected SteeringVectors, got one SteeringVector",
    "cl.logit_lens(vectors, model)": "expected a model",
    "cl.logit_lens(model, pairs)": "expected SteeringVectors, got ContrastSet",
    "cl.logit_lens(model, vectors, layers=1)": "write layers=[1]",
    "cl.word_ranks(vectors, model, ['love'])": "expected a model",
    "cl.residual_lens(prompt, model)": "expected a model",
    "cl.token_similarity('A text', model, vectors)": "expected a model",
    "cl.token_similarity(model, prompt, 'sentiment')": "expected SteeringVectors, got the str 'sentiment'",
    "cl.interpretation.attribute_logits(vectors, model, pairs)": "expected a model",
    "cl.generate('How was your day?', model)": "expected a model",
    "list(cl.generate_stream('How was your day?', model))": "expected a model",
    "cl.generate(model, prompt, vectors=[vectors])": "of SteeringVectors choose a layer, as in vectors[13]",
    "cl.generate(model, prompt, vectors=[torch.ones(32)])": "got a tensor of shape (32,); of SteeringVectors choose",
    "cl.generate(model, prompt, vectors=[(vectors[1], '1')])": "multiplier must be a number or a tensor [batch], got",
    "cl.steer('v', model)": "expected a model",
    "vectors['2']": "no vector for layer '2': this set has layers 0-3",
    "cl.ContrastSet.load('sentimnt')": "did you mean 'sentiment'?",
    "cl.ContrastSet.load('hallucination')": "load_paper_set('hallucination')",
    "cl.ContrastSet.load('pairs.xlsx')": "ContrastSet.from_pairs(pandas.read_excel(...))",
    "cl.SteeringVectors.load('pairs.csv')": "it is text that begins with 'question,",
    "cl.ContrastSet.load([('q', 'a', 'b')])": "got a list, expected the name of a bundled set or a file",
    "cl.ContrastSet.from_pairs([dict(ask='q', positive='a', negative='b')])": "found whole texts that begin",
    "cl.ContrastSet.from_pairs(dict(question=['q'], positive=['a'], negative=['b']))": "of columns, pandas.DataFrame(",
    "cl.ContrastSet.from_pairs(['abc'])": "pair 1: got 'abc', expected a list of (question,",
    "cl.ContrastSet.from_pairs(('a question', 'yes', 'no'))": "pair 1: got 'a question', expected",
    "cl.ContrastSet.from_pairs([('a', 'b')])": "as in [(question, a, b) for a, b in pairs]",
    "cl.ContrastSet.from_pairs(pairs.frame, columns=dict(question='ask'))": "a column 'ask', which columns= names",
    "cl.generate(model, prompt, vectors=['v.safetensors'])": "a file is read by SteeringVectors.load",
    "cl.generate(model, prompt, vectors=[('v.safetensors', 2.0)])": "a file is read by SteeringVectors.load",
    "cl.ContrastSet.from_pairs([('a', 'b', float('nan'))])": "pair 1: got ('a', 'b', nan), expected",
    "cl.ContrastSet.from_pairs(pairs.frame, on_bad='skip')": "on_bad must be 'raise' or 'drop'",
    "cl.ContrastSet.load('pairs.csv', on_bad=None)": "on_bad must be 'raise' or 'drop'",
    "cl.ContrastSet.load('pairs.csv', columns='question')": "expected columns={'question': ..., 'positive': ...,",
    "cl.ContrastSet.load('pairs.csv', columns={'question': 3})": "each the name of a column of yours",
    "pairs.check(model='demo')": "expected a model with a tokenizer that gives character offsets",
    "pairs.check(other='sentiment')": "make one with ContrastSet.load('sentiment')",
    "cl.load_model(model)": "got a HookedTransformer, expected a hub id, a folder, a .gguf file or 'demo'",
    "cl.generate(model, torch.tensor([[1, 2]]))": "or a Prompt as Prompt.of makes it, got a tensor",
    "cl.generate(model, prompt, vectors=(vectors[1], 1))": "got the int 1; a multiplier stands in a pair",
    "cl.steer(model, vectors[1], prompt=prompt, start=0)": "either prompt=..., or start=..., not both",
    "cl.steer(model, vectors[1])": "start=0 steers every position",
    "cl.steer(model, cl.Intervention(vector=vectors[1]))": "start=0 steers every position",
    "vectors[1].hook()": "it is not said where steering starts, and a hook knows no prompt: give start=0 for every",
    "cl.Intervention(vector=vectors[1]).hook()": "for the end of the instruction, or positions=...",
    "cl.measures.score_answers(model, pairs, [(cl.Intervention(vector=vectors[1], start=0),)])": "takes no start",
    "cl.SteeringVector.from_direction([1.0, 2.0], 3)": "got a list, expected a tensor or an array [d_model]",
    "cl.logit_lens(model, vectors, k='5')": "k must be a whole number, got the str '5'",
    "cl.ContrastSet.from_pairs([('q', 'a', 'b'), ('q', 'a', 'a')])": "pair 2, negative: found",
    "cl.extract(model, pairs, batch_size=0)": "batch_size must be at least 1, got 0",
    "cl.interpretation.attribute_logits(model, pairs, vectors[1], batch_size=2.0)": (
        "batch_size must be a whole number, got the float 2.0"
    ),
    "cl.generate(model, prompt, max_new_tokens=4.5)": "max_new_tokens must be a whole number, got the float 4.5",
    "cl.generate(halved, prompt)": "weights are float16, but its cfg.dtype says float32: load it with dtype='float16'",
    "list(cl.engine.read_residuals(model, ['a text']))": "expected Prompts, got the str 'a text' among them",
    "cl.ContrastSet([('q', 'a', 'b')])": "make a set with ContrastSet.from_pairs([(question, positive, negative)",
    "cl.ContrastSet.load('v.pt')": "found a file of vectors, expected contrast pairs in a .json, .jsonl, .csv",
    "cl.read_vectors('pairs.jsonl')": "pairs.jsonl is a file of contrast pairs, expected steering vectors",
    "cl.SteeringVectors.load('pairs.jsonl')": "expected steering vectors: pairs are loaded with ContrastSet.load",
    "cl.SteeringVectors.load('v.pt')": "it is a file of torch.save, which caa_lens.read_vectors may read",
    "cl.read_vectors('v.pt')": (
        "is a pickle of objects, caa_lens.provenance.Provenance, caa_lens.vectors.steering_vectors"
    ),
    "vectors[1.0]": "no vector for layer 1.0: this set has layers 0-3 (0-based blocks); int(1.0) makes a layer of it",
    "cl.vectors.mean_vector([vectors[1], vectors[1]])": "got a list of them: write mean_vector(*vectors)",
    "cl.steer(model, [vectors[1], vectors[2]], start=0)": "leave out the list: steer takes vectors one after another",
    "vectors.at(2)": "expected a list of layers, got 2: write .at([2])",
    "cl.extract(model, pairs.split(test=1))": "a split gives two, as in train, test = pairs.split(test=0.2)",
    "cl.extract(model, pairs, estimator='pcas')": "unknown estimator 'pcas': expected mean_difference, pca_of",
    "cl.sweep(model, pairs, [vectors[1]])": "make a set of them with SteeringVectors.from_vectors([...])",
    "cl.SteeringVectors.from_vectors(vectors[1])": "expected a list of SteeringVector, got one: put it into a list",
    "cl.SteeringVector.from_direction(torch.ones(32), '3')": "layer must be a whole number, the 0-based block, got '3'",
    "cl.Intervention(vector=vectors)": "expected a SteeringVector, got SteeringVectors: of a set choose a layer",
    "cl.generate(model, prompt, vectors=[(vectors[1], [1, 2])])": "got the list [1, 2]; torch.tensor(...) makes one",
    "cl.generate(model, prompt, vectors=None)": "expected a list of vectors, got NoneType: without any, [], nothing",
    "cl.generate(model, prompt, vectors={1: vectors[1]})": "expected a list of vectors, got dict",
    "list(cl.generate_stream(model, [prompt, prompt]))": "expected a question in words or in messages, or a Prompt",
    "cl.steer(model, [vectors[1]], start=0)": "leave out the list: steer takes vectors one after another",
    "cl.steer(model, vectors[1], start='0')": "start must be a whole number or a tensor [batch], got '0'",
    "cl.steer(model, vectors[1], prompt=torch.tensor([[1, 2]]))": "Prompt.of makes it, got a tensor of shape (1, 2)",
    "cl.ContrastSet(name='mine', pairs=[('q', 'a', 'b')])": "got a tuple among the pairs: make a set of texts with",
    "cl.ContrastSet.from_pairs(pairs[0])": "got a ContrastPair, expected a list of (question, positive, negative)",
    "cl.ContrastSet.from_pairs([('Is it?\\n (A) Yes\\n (B) No', 'A', 'B')])": "found 'A', expected '(A)' where the",
    "pairs.split(test='4')": "got test='4' for the 4 pairs of 'sentiment', expected a number of pairs (int) or a share",
    "pairs.save('pairs.csv')": "pairs are saved as .jsonl or .json, got 'pairs.csv'",
    "cl.token_similarity(model, ['a', 'b'], vectors)": "expected the text in words, one at a time, got a list of",
    "cl.interpretation.pair_pca(vectors)": (
        "expected PairActivations, as pair_activations(model, pairs) reads, got SteeringVectors"
    ),
    "cl.interpretation.vector_norms(vectors, pairs)": (
        "expected PairActivations, as pair_activations(model, pairs) reads, got ContrastSet"
    ),
    "cl.reliability(pairs)": "expected PairActivations, as pair_activations(model, pairs) reads, got ContrastSet",
    "vectors[1:3]": "several are chosen with .at([...])",
    "cl.logit_lense": "has no attribute 'logit_lense': try 'logit_lens'",
}
ACCEPTED = [
    "cl.Intervention(vector=vectors[1], multiplier=np.int64(2), start=np.int64(1)).edit()",
    "cl.Intervention(vector=vectors[1], multiplier=np.float32(2), start=0).hook()",
    "vectors[np.int64(1)]",
    "vectors[1].to('bfloat16')",
    "cl.ContrastSet.from_pairs(np.array([('q', 'a', 'b')]))",
    "cl.ContrastSet.from_pairs([dict(question='q', positive='a', negative='b', id=3)])",
    "cl.ContrastSet.from_pairs([dict(prompt='q', positive='a', negative='b')])",
    "cl.ContrastSet.from_pairs(pairs.frame)",
    "cl.ContrastSet.load('pairs.csv')",
    "cl.logit_lens(model, [vectors[1], vectors[2]])",
    "cl.steer(model, [vectors[1], 2.0], start=0).__enter__()",
]
RUN = """
import json, sys
import numpy as np
import torch
sys.path.insert(0, sys.argv[1])
from helpers.models import tiny_model
import caa_lens as cl
model = tiny_model(n_layers=4)
model.cfg.model_name = "tiny"
pairs = cl.ContrastSet.load("sentiment").sample(4)
vectors = cl.SteeringVectors(directions=torch.ones(4, model.cfg.d_model), layers=(0, 1, 2, 3))
prompt = cl.prompts.Prompt(text="", answer_start=3, tokens=(1, 2, 3), steer_start=1, read=(2, 3))
pairs.save("pairs.jsonl")
torch.save(vectors, "v.pt")
halved = tiny_model(n_layers=4).half()
open("pairs.csv", "w").write("question,positive,negative\\nHow?,Well.,Badly.\\n")
open("pairs.xlsx", "wb").write(b"PK")
said = {}
for mistake in json.loads(sys.argv[2]):
    try:
        eval(mistake)
        said[mistake] = "no error"
    except Exception as error:
        said[mistake] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What every mistake was answered with."""
    run = [sys.executable, "-W", "ignore", "-c", RUN, str(Path(__file__).parent), json.dumps([*MISTAKES, *ACCEPTED])]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("mistakes"), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_a_remedy(said, mistake):
    kind = said[mistake].partition(":")[0]
    assert kind in {
        "AttributeError",
        "FieldError",
        "TypeError",
        "ValueError",
        "IndexError",
        "ContrastFileError",
        "VectorFileError",
    }
    assert MISTAKES[mistake] in said[mistake]
    assert len(said[mistake]) < 400


@pytest.mark.parametrize("call", ACCEPTED)
def test_what_means_only_one_thing_is_taken_as_it_is_meant(said, call):
    assert said[call] == "no error"
