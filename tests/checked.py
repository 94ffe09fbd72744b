"""The public operators with their shapes and dtypes spelled out, checked at every call of the tests."""

from beartype import beartype
from jaxtyping import Array, Bool, Float, Float32, Int32, jaxtyped

import scfa_jax

Query = Float[Array, "*B T N H"]
Key = Float[Array, "*B S K H"]
Result = Query | tuple[Query, Float32[Array, "*B T N"]]
Offset = int | Int32[Array, ""] | Int32[Array, " C"]
checked = jaxtyped(typechecker=beartype)


def _of_right_dtype(query, options, result):
    output = result[0] if isinstance(result, tuple) else result
    assert output.dtype == options.get("output_dtype", query.dtype)
    return result


@checked
def causal_attention(query: Query, key: Key, value: Key, *, query_offset: Offset = 0, **options) -> Result:
    result = scfa_jax.causal_attention(query, key, value, query_offset=query_offset, **options)
    return _of_right_dtype(query, options, result)


@checked
def hash_sparse_attention(
    query: Query,
    key: Key,
    value: Key,
    query_hash: Int32[Array, "*#B #T #N"],
    key_hash: Int32[Array, "*#B #S #K"] | None = None,
    *,
    query_offset: Offset = 0,
    **options,
) -> Result:
    result = scfa_jax.hash_sparse_attention(
        query, key, value, query_hash, key_hash, query_offset=query_offset, **options
    )
    return _of_right_dtype(query, options, result)


@checked
def qk_sparse_attention(
    query: Query,
    key: Key,
    value: Key,
    query_keep: Bool[Array, "*#B #T #N"],
    key_keep: Bool[Array, "*#B #S #K"],
    *,
    query_offset: Offset = 0,
    **options,
) -> Result:
    result = scfa_jax.qk_sparse_attention(query, key, value, query_keep, key_keep, query_offset=query_offset, **options)
    return _of_right_dtype(query, options, result)


@checked
def range_attention(
    query: Query,
    key: Key,
    value: Key,
    key_start: Int32[Array, "*#B #T #N"],
    key_stop: Int32[Array, "*#B #T #N"],
    **options,
) -> Result:
    return _of_right_dtype(query, options, scfa_jax.range_attention(query, key, value, key_start, key_stop, **options))


@checked
def random_rotations(
    key, num_heads: int, head_dim: int, num_buckets: int
) -> Float32[Array, "{num_heads} {head_dim} {num_buckets}//2"]:
    return scfa_jax.random_rotations(key, num_heads, head_dim, num_buckets)


@checked
def lsh_hash(x: Float[Array, "*B T N H"], rotations: Float32[Array, "N H R"]) -> Int32[Array, "*B T N"]:
    return scfa_jax.lsh_hash(x, rotations)
