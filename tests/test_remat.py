"""`remat.save_attention`: under it the backward pass computes again what leads to attention, but no attention."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, SMALL_BLOCKS, Shape, make_case
from flax import linen as nn
from flax import nnx
from jax.extend.core import jaxprs_in_params

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax.nnx import Drop, Hash
from scfa_jax.remat import save_attention

INDEX_WORK = ("sort", "cummax", "argmax")


def equations(jaxpr):
    """All equations of a jaxpr but those inside of Triton kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


def work(function, *arguments) -> Counter:
    """How often the gradient of a function calls each kernel, takes powers of two in plain JAX, and prepares an index.

    In plain JAX only the tiles of attention, forward and backward, take powers of two.
    """
    counts = Counter()
    for equation in equations(jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr):
        name = equation.primitive.name
        if name == "pallas_call":
            info = equation.params.get("name_and_src_info", equation.params.get("name"))
            counts[getattr(info, "name", info)] += 1
        elif name in (*INDEX_WORK, "exp2"):
            counts[name] += 1
    return counts


def assert_attention_runs_once(loss, remat, implementation, *arguments):
    """`loss` without rematerialisation, and `remat(policy)` of it."""
    once, twice, saved = (work(f, *arguments) for f in (loss, remat(None), remat(save_attention)))
    attention = "scfa_forward" if implementation == "triton_interpret" else "exp2"
    assert once[attention] > 0
    assert twice[attention] > once[attention]
    assert saved == once


CASES = [(pattern, {}) for pattern in PATTERNS] + [(pattern, {"promise": 4}) for pattern in ("hash", "shared_hash")]


def loss_of(case, implementation):
    """A function of query, key and value that has something to compute again before attention."""

    def loss(arrays):
        rows = map(jnp.sin, arrays)
        made = tuple(~x if x.dtype == bool else x + 1 for x in case.pattern)
        options = {"implementation": implementation, "block_sizes": SMALL_BLOCKS, "return_residual": True}
        output, logsumexp = case.operator(*rows, *made, **case.options, **options)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(jnp.isfinite(logsumexp), jnp.sin(logsumexp), 0))

    return loss


def case_of(pattern, **more):
    return make_case(pattern, np.random.default_rng(0), Shape(1, 40, 40, 2, 2, 16), jnp.float32, **more)


@pytest.mark.parametrize(("pattern", "more"), CASES, ids=str)
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_every_operator_runs_once(pattern, more, implementation):
    case = case_of(pattern, **more)
    loss = loss_of(case, implementation)
    remat = lambda policy: jax.checkpoint(loss, policy=policy)
    assert_attention_runs_once(loss, remat, implementation, (case.query, case.key, case.value))


def test_gradients_stay_the_same(implementation):
    case = case_of("hash")
    loss = loss_of(case, implementation)
    saved = jax.checkpoint(loss, policy=save_attention)
    got, want = (jax.jit(jax.grad(f))((case.query, case.key, case.value)) for f in (saved, loss))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


KINDS = {"dense": None, "hash": Hash(4), "drop": Drop(0.4, drop_at_evaluation=True)}
TOKENS = jax.random.normal(jax.random.key(0), (2, 24, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_nnx_modules_run_it_once(kind, implementation):
    make = partial(scfa_jax.nnx.CausalSelfAttention, 32, 2, sparsity=KINDS[kind], implementation=implementation)
    module = make(rngs=nnx.Rngs(0))
    draw = module.draw(*TOKENS.shape[:2], rngs=jax.random.key(1))
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)

    def loss(attend, params):
        module = nnx.merge(graph, nnx.State(params), nnx.State(rest))
        return jnp.sum(jnp.sin(attend(module, jnp.sin(TOKENS))))

    attend = lambda module, x: module(x, **draw)
    remat = lambda policy: partial(loss, nnx.remat(attend, policy=policy))
    assert_attention_runs_once(partial(loss, attend), remat, implementation, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_linen_modules_run_it_once(kind, implementation):
    make = partial(_module, KINDS[kind], implementation)
    variables = jax.jit(make().init)({"params": jax.random.key(0), "sparsity": jax.random.key(1)}, TOKENS)

    def loss(module, params):
        apply = partial(module.apply, {**variables, "params": params}, jnp.sin(TOKENS))
        return jnp.sum(jnp.sin(apply(rngs={"sparsity": jax.random.key(2)})))

    plain = partial(loss, make())
    remat = lambda policy: partial(
        loss, make(cls=nn.remat(scfa_jax.linen.CausalSelfAttention, policy=policy, prevent_cse=False))
    )
    assert_attention_runs_once(plain, remat, implementation, variables["params"])


def _module(sparsity, implementation, cls=scfa_jax.linen.CausalSelfAttention):
    return cls(32, 2, sparsity=sparsity, implementation=implementation, deterministic=True)
