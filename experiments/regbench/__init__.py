"""RegBench in NumPy: random regular languages shown word by word, metrics, baselines.

Follows Akyürek et al., `In-Context Language Learning: Architectures and Algorithms
<https://arxiv.org/abs/2401.12973>`_, 2024, in distribution. No part of it needs kreg or JAX.
"""

from experiments.regbench import baum_welch as baum_welch
from experiments.regbench import metrics as metrics
from experiments.regbench import ngram as ngram
from experiments.regbench.alphabet import IGNORED_LABEL as IGNORED_LABEL
from experiments.regbench.alphabet import PAD_ID as PAD_ID
from experiments.regbench.alphabet import SEPARATOR_ID as SEPARATOR_ID
from experiments.regbench.alphabet import VOCAB_SIZE as VOCAB_SIZE
from experiments.regbench.alphabet import decode as decode
from experiments.regbench.alphabet import encode as encode
from experiments.regbench.automata import Automata as Automata
from experiments.regbench.benchmark import Benchmark as Benchmark
from experiments.regbench.benchmark import make_split as make_split
from experiments.regbench.config import AutomataConfig as AutomataConfig
from experiments.regbench.files import read_instances as read_instances
from experiments.regbench.instances import Instances as Instances
from experiments.regbench.metrics import LoopScore as LoopScore
from experiments.regbench.metrics import Score as Score
from experiments.regbench.minimise import canonical as canonical
from experiments.regbench.minimise import minimise as minimise
