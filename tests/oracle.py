"""Attention and its gradients as explicit float64 loops over numpy arrays: the definition of the definitions."""

import numpy as np


def attend(query, key, value, allows, output_cotangent, logsumexp_cotangent, scale):
    """Loops over batch, head and query.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        allows: `(b, n, k, t, s) -> bool`: whether query `t` of head `n` attends to key `s` of key head `k`.
        output_cotangent: `[B, T, N, H]`.
        logsumexp_cotangent: `[B, T, N]`.
        scale: Factor of the scores.

    Returns:
        output, logsumexp, dquery, dkey, dvalue, all float64.
    """
    query, key, value, output_cotangent, logsumexp_cotangent = (
        np.asarray(x, np.float64) for x in (query, key, value, output_cotangent, logsumexp_cotangent)
    )
    (batch, query_length, heads, _), (_, key_length, key_heads, _) = query.shape, key.shape
    output, dquery, dkey, dvalue = (np.zeros(x.shape) for x in (query, query, key, value))
    logsumexp = np.full((batch, query_length, heads), -np.inf)
    for b in range(batch):
        for n in range(heads):
            k = n // (heads // key_heads)
            for t in range(query_length):
                chosen = [s for s in range(key_length) if allows(b, n, k, t, s)]
                if not chosen:
                    continue
                keys, values, q = key[b, chosen, k], value[b, chosen, k], query[b, t, n]
                scores = scale * keys @ q
                logsumexp[b, t, n] = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
                weights = np.exp(scores - logsumexp[b, t, n])
                output[b, t, n] = weights @ values
                cotangent = output_cotangent[b, t, n]
                gradient = weights * (values @ cotangent - output[b, t, n] @ cotangent + logsumexp_cotangent[b, t, n])
                dquery[b, t, n] = scale * gradient @ keys
                dkey[b, chosen, k] += scale * gradient[:, None] * q
                dvalue[b, chosen, k] += weights[:, None] * cotangent
    return output, logsumexp, dquery, dkey, dvalue
