"""Attention over the compressed cache: the calls, the definition, and what serves them faster."""

from turboquant_jax.attention.api import attend as attend
from turboquant_jax.attention.api import attend_and_write as attend_and_write
from turboquant_jax.attention.api import attend_projection as attend_projection
from turboquant_jax.attention.projection import Projection as Projection
from turboquant_jax.attention.segments import PLAIN as PLAIN
from turboquant_jax.attention.segments import Scores as Scores
from turboquant_jax.attention.segments import merge as merge
