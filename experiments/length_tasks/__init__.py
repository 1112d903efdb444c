"""Tasks learned on short sequences and tested on long ones: their samples, batches and scores.

A task is a frozen dataclass: `TASKS["sort"].task`, or `Sort(vocab_size=8)`. A sample is a function
of (seed, split, index) alone, a batch drawn on the device one of its key:

>>> import jax
>>> task = Sort()
>>> layout = asentmax_layout(task)
>>> test = host_batch(task, layout, seed=0, split="test", indices=range(4), length=256)
>>> draw = jax.jit(device_batch, static_argnums=(0, 1, 3))
>>> key = batch_key(seed=0, split="train", step=7)
>>> batch = draw(task, layout, key, 128, task.tables(seed=0, split="train"))
>>> test.inputs.shape, batch.inputs.shape
((4, 514), (128, 130))

The loss is `mean_token_cross_entropy(logits, batch.labels, ignore=IGNORED)` with `layout.classes`
logits a position. `teacher_forced(logits.argmax(-1), batch, layout)` counts what is right; counts
join by `add`, and `.rates()` are the scores.

Follows Vasylenko et al., `Long-Context Generalization with Sparse Attention
<https://arxiv.org/abs/2506.16640>`_, 2025, in distribution.
"""

from experiments.length_tasks import files as files
from experiments.length_tasks import metrics as metrics
from experiments.length_tasks.batches import device_batch as device_batch
from experiments.length_tasks.batches import host_batch as host_batch
from experiments.length_tasks.bits import FlipFlop as FlipFlop
from experiments.length_tasks.bits import Parity as Parity
from experiments.length_tasks.labelling import LocalCount as LocalCount
from experiments.length_tasks.labelling import NBack as NBack
from experiments.length_tasks.layout import IGNORED as IGNORED
from experiments.length_tasks.layout import Encoded as Encoded
from experiments.length_tasks.layout import Layout as Layout
from experiments.length_tasks.layout import asentmax_layout as asentmax_layout
from experiments.length_tasks.layout import collate as collate
from experiments.length_tasks.layout import encode as encode
from experiments.length_tasks.layout import prompts as prompts
from experiments.length_tasks.layout import sparse_attention_layout as sparse_attention_layout
from experiments.length_tasks.metrics import add as add
from experiments.length_tasks.metrics import teacher_forced as teacher_forced
from experiments.length_tasks.mqmtar import MQMTAR as MQMTAR
from experiments.length_tasks.randomness import batch_key as batch_key
from experiments.length_tasks.randomness import device_seed as device_seed
from experiments.length_tasks.rearranging import Copy as Copy
from experiments.length_tasks.rearranging import Reverse as Reverse
from experiments.length_tasks.rearranging import Sort as Sort
from experiments.length_tasks.task import Sample as Sample
from experiments.length_tasks.task import Task as Task
from experiments.length_tasks.tasks import TASKS as TASKS
