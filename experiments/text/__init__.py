"""Text for language models, in NumPy: documents, tokens on disk, rows to train on, a baseline.

A run takes a `Dataset`, writes its tokens once, and reads rows from them:

    data = text.stories(2000, 100, seed=0)       # or plain_text, tinystories, babistories of a path
    corpus = text.prepare(folder, data, text.TOKENIZERS["bytes"])   # or "gpt2"; opens what is there
    rows = text.RandomWindows(corpus.train, 256, rows=steps * batch_size, seed=0)
    batches = kreg.training.batches(rows, batch_size, seed=0, shuffle=False)
    packed = text.PackedDocuments(corpus.train, 256)          # whole documents, with segment_ids
    held_out = text.EvaluationWindows(corpus.validation, 256)            # every token exactly once
    baseline = text.KneserNey.fit(corpus.train, order=3, across_documents=True)
    baseline.score(corpus.validation).perplexity
    text.LossByPosition.of(losses, labels).mean                       # of a model's token losses

Labels that are IGNORED_LABEL count nowhere. `python -m experiments.text fetch NAME FOLDER`
downloads TinyStories or BabiStories. Nothing else uses the network, but for tiktoken's own files.
"""

from experiments.text.grammar import story as story
from experiments.text.metrics import LossByPosition as LossByPosition
from experiments.text.metrics import document_positions as document_positions
from experiments.text.ngram import KneserNey as KneserNey
from experiments.text.ngram import Score as Score
from experiments.text.official import OFFICIAL as OFFICIAL
from experiments.text.official import babistories as babistories
from experiments.text.official import fetch as fetch
from experiments.text.official import tinystories as tinystories
from experiments.text.sources import Dataset as Dataset
from experiments.text.sources import plain_text as plain_text
from experiments.text.sources import stories as stories
from experiments.text.token_files import Corpus as Corpus
from experiments.text.token_files import Tokens as Tokens
from experiments.text.token_files import open_corpus as open_corpus
from experiments.text.token_files import prepare as prepare
from experiments.text.tokenizers import TOKENIZERS as TOKENIZERS
from experiments.text.tokenizers import Tokenizer as Tokenizer
from experiments.text.windows import IGNORED_LABEL as IGNORED_LABEL
from experiments.text.windows import EvaluationWindows as EvaluationWindows
from experiments.text.windows import PackedDocuments as PackedDocuments
from experiments.text.windows import RandomWindows as RandomWindows
