"""What a compiled program sends, read from small programs that are written by hand."""

import pytest

from lmjax.plan.collectives import Collective, collectives

SHAPE = {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}

PROGRAM = """HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %gather = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[4,2], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%fused (p: bf16[4]) -> bf16[4] {
  ROOT %again = bf16[32]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %known = (s32[], f32[8]) while(%t), condition=%other, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %one = bf16[32]{0} fusion(%a), kind=kCustom, calls=%fused
  %two = bf16[32]{0} fusion(%a), kind=kCustom, calls=%fused.2
  %scatter = f32[4]{0} reduce-scatter(%a), channel_id=5, replica_groups=[2,4]<=[2,4]T(1,0), dimensions={0}
  %permute = bf16[10]{0} collective-permute(%a), channel_id=6, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %both = bf16[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3.clone
  %alone = f32[8]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
}

%fused.2 (p: bf16[4]) -> bf16[4] {
  ROOT %again = bf16[32]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

%all-reduce-scatter.3.clone (p: bf16[32]) -> bf16[8] {
  %sum = bf16[32]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %part = bf16[16]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={16}
}

%inner (p: f32[8]) -> f32[8] {
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
  ROOT %all = f32[8]{0} all-to-all(%x), channel_id=8, replica_groups=[1,8]<=[8]
}
"""


def test_a_program_is_read():
  found = {(one.kind, one.axes): one for one in collectives(PROGRAM, SHAPE, near=4)}
  # Six times round the loop, half of 64 bytes each; the groups are neighbours.
  assert found["all-gather", ("tensor",)] == Collective("all-gather", ("tensor",), 6, 6 * 64 / 2, False)
  # Once, although its channel stands twice; twice three quarters of 64 bytes.
  one = Collective("all-reduce", ("fsdp", "tensor"), 1, 2 * 64 * 3 / 4, False)
  assert found["all-reduce", ("fsdp", "tensor")] == one
  # [2, 4] transposed: groups 0 4 1 5 and 2 6 3 7, which reach beyond four neighbours. Three times its result.
  assert found["reduce-scatter", ("data", "tensor")] == Collective("reduce-scatter", ("data", "tensor"), 1, 48, True)
  assert found["collective-permute", ("fsdp",)].sent == 20
  # Of what a start returns the largest array is the result; every second of eight devices.
  assert found["all-gather", ("data", "fsdp")] == Collective("all-gather", ("data", "fsdp"), 3, 3 * 32 * 3 / 4, True)
  assert found["all-to-all", ("data", "fsdp", "tensor")].sent == pytest.approx(3 * 32 * 7 / 8)
  # An all-reduce of 64 bytes whose half each of two keeps sends half of them, once.
  assert found["reduce-scatter", ("tensor",)] == Collective("reduce-scatter", ("tensor",), 1, 32, False)
  assert len(found) == 7


def test_what_goes_between_slices_is_what_hosts_send():
  line = ('  %send.6 = (bf16[4,128]{1,0:T(2,128)}, u32[], token[]) send(%x, %after), channel_id=8, frontend_attributes='
          '{_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1}x{0:3}",'
          '_xla_megascale_transfer_type="ALL_REDUCE"}')
  text = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n"
  shape = {"replica": 2, "fsdp": 4}
  assert collectives(text, shape, near=4) == [Collective("all-reduce", ("replica",), 1, 2 * 1024 / 2, True)]
