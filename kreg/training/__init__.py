"""Optax steps, Orbax checkpoints, Grain data: the loop that trains kreg.nn models."""

from kreg.training.checkpoint import CheckpointError as CheckpointError
from kreg.training.data import batches as batches
from kreg.training.devices import Devices as Devices
from kreg.training.loop import TrainResult as TrainResult
from kreg.training.loop import load_params as load_params
from kreg.training.loop import train as train
from kreg.training.metrics import read_metrics as read_metrics
from kreg.training.objective import mean_token_cross_entropy as mean_token_cross_entropy
from kreg.training.objective import token_cross_entropy as token_cross_entropy
from kreg.training.optimizer import adamw as adamw
from kreg.training.optimizer import decay_all as decay_all
from kreg.training.optimizer import decay_matrices as decay_matrices
from kreg.training.progress import Progress as Progress
from kreg.training.state import TrainState as TrainState
from kreg.training.state import init_state as init_state
from kreg.training.step import make_step as make_step
from kreg.training.together import make_steps as make_steps
from kreg.training.together import train_together as train_together
