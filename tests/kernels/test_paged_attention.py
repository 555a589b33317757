"""Attention over pages against the row-by-row reference in float64."""

from dataclasses import replace

import pytest
import torch
from make_kv_pages import CASES, PAGE, D, H, K, case, exactly
from vtfast_kernels.page_table import Pages
from vtfast_kernels.paged_attention import paged_attention


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Splits of six rows: 2 instead of 8. The interpreter runs one program after the other."""
    monkeypatch.setattr("vtfast_kernels.paged_attention.PROGRAMS", 48)


def on(device, inputs):
    pages = {k: v.to(device) for k, v in vars(inputs["pages"]).items() if isinstance(v, torch.Tensor)}
    moved = {k: v.to(device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return moved | {"pages": Pages(**pages, page_size=inputs["pages"].page_size)}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, impl, device):
    inputs = case(*CASES[name])
    exact = exactly(inputs)
    expected = paged_attention(**exact, impl="reference")
    ours = paged_attention(**on(device, inputs), impl=impl).cpu()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    scaled = paged_attention(**on(device, inputs), scale=0.1, impl=impl).cpu()
    expected = paged_attention(**exact, scale=0.1, impl="reference")
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [2, 5])
def test_rows_at_equal_distances_are_read_in_place(impl, device, apart):
    """Own pages of neighbouring rows `apart` pages from each other in the pool; pages that no row knows hold NaN."""
    inputs = case([2, 2], [[33, 48, 40], [36, 64, 43]])
    old = inputs["pages"].block_table
    new = torch.tensor(
        [[40 + 4 * (r // 3), 41 + 4 * (r // 3), 3 + r * apart, 4 + r * apart] for r in range(6)], dtype=torch.int32
    )
    known = torch.arange(4) * PAGE < inputs["pages"].lengths[:, None]
    for name in ("keys", "values"):
        pool = torch.full((60, PAGE, K, D), torch.nan)
        pool[new[known].long()] = inputs[name][old[:, :4][known].long()]
        inputs[name] = pool
    inputs["pages"] = replace(inputs["pages"], block_table=new)
    expected = paged_attention(**exactly(inputs), impl="reference")
    moved = on(device, inputs)
    if impl == "torch":
        assert moved["pages"].gather_plan.own_stride == apart
        poisoned = new[~known].long()  # read in place, then masked: NaN would survive
        moved["keys"][poisoned], moved["values"][poisoned] = 0.0, 0.0
    ours = paged_attention(**moved, impl=impl).cpu()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_gathered_shared_pages_are_remembered(monkeypatch):
    inputs, prefix_cache = case([2, 2], [[33, 48], [36, 64]]), {}
    inputs["pages"] = replace(inputs["pages"], prefix_cache=prefix_cache)
    first = paged_attention(**inputs)
    assert len(prefix_cache) == 1 and torch.equal(paged_attention(**inputs), first)
    other = {"keys": inputs["keys"].clone(), "values": 2 * inputs["values"]}
    torch.testing.assert_close(paged_attention(**inputs | other), 2 * first)
    assert len(prefix_cache) == 2
    shared = inputs["pages"].block_table[:, :2].unique().long()
    inputs["keys"][shared], inputs["values"][shared] = 1e6, 1e6  # read no more, but behind the mask
    assert torch.equal(paged_attention(**inputs), first)


@pytest.mark.parametrize("programs, page_size", [(1, 16), (1, 128), (128, 48), (256, 128)])
def test_a_long_context_is_split(impl, device, page_size, programs, monkeypatch):
    """More tokens than a block, than a page and than a split, more rows of a group than a program takes."""
    monkeypatch.setattr("vtfast_kernels.paged_attention.PROGRAMS", programs)
    lengths = [[260 + 37 * i for i in range(7)], [131]]
    inputs = case([256 // page_size, 0], lengths, pages=200, page_size=page_size)
    expected = paged_attention(**exactly(inputs), impl="reference")
    ours = paged_attention(**on(device, inputs), impl=impl).cpu()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_layers_follow_one_another(impl, device):
    """The kernel's counters are ready for the next layer, also for one of other heads."""
    inputs = on(device, case(*CASES["unequal groups"]))
    first = paged_attention(**inputs, impl=impl)
    other = inputs | {"query": inputs["query"].repeat(1, 2, 1)}
    assert torch.equal(paged_attention(**inputs, impl=impl), first)
    assert paged_attention(**other, impl=impl).shape == (7, 2 * H, D)
    assert torch.equal(paged_attention(**inputs, impl=impl), first)
    assert not any(count.any() for count in inputs["pages"]._arrivals.values())


def test_pages_of_any_size(impl, device):
    """In PyTorch; Triton's blocks are within a page."""
    inputs = on(device, case([2], [[15, 20]], page_size=7))
    if impl == "triton":
        with pytest.raises(ValueError, match="page_size: Triton needs a multiple of 16 tokens, got 7"):
            paged_attention(**inputs, impl=impl)
        return
    expected = paged_attention(**exactly(inputs), impl="reference")
    torch.testing.assert_close(paged_attention(**inputs, impl=impl).double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_no_worse_than_plain(impl, device):
    inputs = case([4, 4], [[70, 65], [80, 73]], torch.bfloat16)
    exact = exactly(inputs)
    expected = paged_attention(**exact, impl="reference")
    plain = paged_attention(**inputs, impl="reference").double()
    ours = paged_attention(**on(device, inputs), impl=impl).cpu().double()
    assert (ours - expected).abs().max() <= 1.2 * (plain - expected).abs().max() + 1e-3


def test_no_rows(impl, device):
    none = torch.empty(0, dtype=torch.int32)
    inputs = case([1], [[17]])
    inputs["query"], inputs["pages"] = (inputs["query"][:0], Pages(none.view(0, 2), none, none, none, PAGE))
    assert paged_attention(**on(device, inputs), impl=impl).shape == (0, H, D)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": int32(0, 6)}, "lengths: must be in"),
        ({"lengths": int32(99, 6)}, "lengths: must be in"),
        ({"group": int32(1, 0)}, "group: must be non-decreasing"),
        ({"shared": int32(2, 2)}, "shared: more pages"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, "lengths: expected shape"),
        ({"block_table": torch.zeros(2, 2)}, "block_table: expected torch.int32"),
        ({"page_size": 0}, "page_size: must be at least 1"),
        ({"query": torch.zeros(2, 5, D)}, "keys: 2 key heads do not divide"),
        ({"query": torch.zeros(3, H, D)}, "query: expected shape"),
        ({"values": torch.zeros(3, PAGE, K, D)}, "values: expected shape"),
        ({"impl": "cuda"}, "impl: must be one of auto, triton"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = case([1], [[17, 18]])
    fields = {k: change.pop(k) for k in list(change) if k in vars(inputs["pages"])}
    with pytest.raises(ValueError, match=message):
        paged_attention(**inputs | {"pages": replace(inputs["pages"], **fields)} | change)
