"""Inside `jax.shard_map` over some axes, what the compiler shards over the others is not gathered either."""

import jax
import pytest
from cases import Shape
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_sharding import assert_close, attention_of, case_of, dense, gradients, mesh_of, run, sharded

from scfa_jax._partitioning import _spec_of_parts

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")


@pytest.mark.parametrize(("pattern", "key_heads"), [("hash", 4), ("causal", 1)])
def test_heads_stay_apart_where_only_the_batch_is_manual(pattern, key_heads):
    """A key head that all devices share: forward alone, since its gradients add up by gathering here."""
    mesh, case = mesh_of(AxisType.Auto), case_of(pattern, Shape(2, 40, 40, 4, key_heads, 16))
    arguments = [sharded(mesh, x) for x in (case.query, case.key, case.value, *case.pattern)]
    specs = tuple(P("data" if x.shape[0] > 1 else None) for x in arguments)
    attend = jax.shard_map(attention_of(case), mesh=mesh, in_specs=specs, out_specs=P("data"), axis_names={"data"})
    if key_heads == 1:
        got, collectives = run(mesh, attend, *arguments)
        assert_close(got, dense(case)[1])
        got, _ = run(mesh, gradients(attend), *arguments)
    else:
        got, collectives = run(mesh, gradients(attend), *arguments)
    assert_close(got, dense(case))
    assert not collectives
    assert got[1].sharding.is_equivalent_to(arguments[0].sharding, 4)


def test_parts_name_axes_of_their_size():
    sizes = {"a": 2, "b": 1, "c": 4, "d": 2}
    assert _spec_of_parts((8, 5, 8), (4, 5, 2), sizes) == P(("a",), (), ("c",))
    assert _spec_of_parts((16, 3), (1, 3), sizes) == P(("a", "c", "d"), ())
