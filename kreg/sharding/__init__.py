"""Attention over a mesh of devices."""

from kreg.sharding.attention import attention as attention
from kreg.sharding.attention import explain as explain
from kreg.sharding.places import Layout as Layout
from kreg.sharding.shared import to_shared_keys as to_shared_keys
