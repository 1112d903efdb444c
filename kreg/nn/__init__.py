"""Flax NNX modules: they hold parameters and call the functions of kreg."""

from kreg.nn.attention_fn import AttentionFn as AttentionFn
from kreg.nn.attention_fn import attention_fn as attention_fn
from kreg.nn.config import MosaicConfig as MosaicConfig
from kreg.nn.config import TransformerConfig as TransformerConfig
from kreg.nn.convert import from_torch as from_torch
from kreg.nn.convert import to_torch as to_torch
from kreg.nn.generate import generate as generate
from kreg.nn.leaky import LeakyAverage as LeakyAverage
from kreg.nn.leaky import leaky_average as leaky_average
from kreg.nn.memory import ContextualMemory as ContextualMemory
from kreg.nn.memory import PersistentMemory as PersistentMemory
from kreg.nn.mosaic import MemoryMosaic as MemoryMosaic
from kreg.nn.transformer import Transformer as Transformer
