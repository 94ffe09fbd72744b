"""Kinds of attention layers for Flax modules, and what such a layer is made of."""

from scfa_jax.layers.drop import Drop as Drop
from scfa_jax.layers.hash import Hash as Hash
from scfa_jax.layers.hash import HashBy as HashBy
from scfa_jax.layers.hash import Hashes as Hashes
from scfa_jax.layers.hash import KMeans as KMeans
from scfa_jax.layers.hash import LearnedRotations as LearnedRotations
from scfa_jax.layers.hash import Rotations as Rotations
from scfa_jax.layers.kind import Cache as Cache
from scfa_jax.layers.kind import Heads as Heads
from scfa_jax.layers.kind import Kind as Kind
from scfa_jax.layers.kind import Layout as Layout
from scfa_jax.layers.kind import Parameter as Parameter
from scfa_jax.layers.kind import State as State
from scfa_jax.layers.kind import normalize as normalize
from scfa_jax.layers.moba import MoBA as MoBA
from scfa_jax.layers.nsa import NSA as NSA
from scfa_jax.layers.pattern import Dense as Dense
from scfa_jax.layers.pattern import Marked as Marked
from scfa_jax.layers.pattern import Marks as Marks
from scfa_jax.layers.pattern import Pattern as Pattern
from scfa_jax.layers.published import BigBird as BigBird
from scfa_jax.layers.published import Fixed as Fixed
from scfa_jax.layers.published import Longformer as Longformer
from scfa_jax.layers.published import Strided as Strided
from scfa_jax.layers.sparsek import SparseK as SparseK
from scfa_jax.layers.window import Window as Window
