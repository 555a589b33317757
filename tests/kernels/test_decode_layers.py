"""The small ops of a decode layer against Hugging Face's modules, and against float64."""

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from vtfast_kernels import checks
from vtfast_kernels.add_rms_norm import add_rms_norm
from vtfast_kernels.rope_append import rope_append
from vtfast_kernels.silu_mul import silu_mul

HALF = (torch.bfloat16, torch.float16)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(device, *tensors):
    return [x if x is None else x.to(device) for x in tensors]


@pytest.mark.parametrize("R, D", [(0, 8), (1, 1), (3, 96), (5, 1536), (2, 2049)])
@pytest.mark.parametrize("add", [True, False])
def test_norm_equals_hugging_faces(impl, device, R, D, add):
    norm = Qwen2RMSNorm(D, eps=1e-5)
    norm.weight.data = normal(D, seed=1)
    x, delta = normal(R, D), normal(R, D, seed=2) if add else None
    total = x + delta if add else x
    x, delta, weight = on(device, x, delta, norm.weight.data)
    mine_total, mine = add_rms_norm(x, delta, weight, eps=1e-5, impl=impl)
    torch.testing.assert_close(mine_total.cpu(), total, rtol=0, atol=0)
    torch.testing.assert_close(mine.cpu(), norm.double()(total.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_norm_rounds_like_hugging_faces(impl, device, dtype):
    norm = Qwen2RMSNorm(96, eps=1e-6).to(dtype)
    norm.weight.data = normal(96, dtype=dtype, seed=1)
    x, delta = normal(40, 96, dtype=dtype), normal(40, 96, dtype=dtype, seed=2)
    total, out = add_rms_norm(*on(device, x, delta, norm.weight.data), impl=impl)
    torch.testing.assert_close(out.cpu(), norm(x + delta), rtol=2e-2, atol=1e-3)
    assert torch.equal(total.cpu(), x + delta)
    differ = (out.cpu() != norm(x + delta)).float().mean()
    assert differ < 0.01, "but for sums in another order"


@pytest.mark.parametrize("size", [1e-3, 1e-6, 0.0])
def test_norm_of_tiny_rows(impl, device, size):
    """Where eps decides; a row of zeros gives zeros."""
    norm = Qwen2RMSNorm(96, eps=1e-6)
    norm.weight.data = normal(96, seed=1)
    x = size * normal(5, 96)
    _, out = add_rms_norm(*on(device, x, None, norm.weight.data), impl=impl)
    torch.testing.assert_close(out.cpu(), norm.double()(x.double()).float(), rtol=1e-5, atol=1e-12)


H, K, D, PAGE, B = 6, 2, 12, 4, 9


def rope_case(dtype=torch.float32, R=5):
    angles = torch.tensor([3.0, 0, 39, 7, 7])[:R, None] * 10000.0 ** -(torch.arange(D // 2) / (D // 2))
    cos, sin = (torch.cat([f(angles)] * 2, dim=1).to(dtype) for f in (torch.cos, torch.sin))
    return {
        "qkv": normal(R, (H + 2 * K) * D, dtype=dtype),
        "cos": cos,
        "sin": sin,
        "slot": torch.tensor([1, 0, 35, 17, 18])[:R],
        "keys": normal(B, PAGE, K, D, dtype=dtype, seed=3),
        "values": normal(B, PAGE, K, D, dtype=dtype, seed=4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("R", [0, 1, 5])
def test_rotation_equals_hugging_faces(impl, device, dtype, R):
    case = rope_case(dtype, R)
    q, k, v = case["qkv"].double().unflatten(1, (-1, D)).split([H, K, K], dim=1)
    cos, sin = (case[name].double()[None] for name in ("cos", "sin"))
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    expected = {"keys": k[0].transpose(0, 1), "values": v}
    mine = {name: x.to(device) for name, x in case.items()}
    query = rope_append(**mine, impl=impl)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(query.cpu().double(), q[0].transpose(0, 1), **tolerance)
    for name, new in expected.items():
        after, before = mine[name].cpu().flatten(0, 1), case[name].flatten(0, 1).double()
        before[case["slot"]] = new
        torch.testing.assert_close(after.double(), before, **tolerance)
        untouched = torch.ones(B * PAGE, dtype=torch.bool)
        untouched[case["slot"]] = False
        assert torch.equal(after[untouched], case[name].flatten(0, 1)[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("R, F", [(0, 4), (1, 1), (3, 192), (2, 2500)])
def test_silu_mul_equals_pytorchs(impl, device, dtype, R, F):
    gate_up = 4 * normal(R, 2 * F, dtype=dtype)
    mine = silu_mul(gate_up.to(device), impl=impl).cpu()
    expected = silu(gate_up[:, :F]) * gate_up[:, F:]
    torch.testing.assert_close(mine, expected, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}))
    if R and dtype != torch.float32:
        assert (mine != expected).float().mean() < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(5, 7)}, "qkv: 7 columns"),
        ({"slot": torch.full((5,), B * PAGE)}, "slot: must be in"),
        ({"slot": torch.zeros(5, dtype=torch.int32)}, "slot: expected torch.int64"),
        ({"qkv": torch.zeros(5, 4 * D)}, "qkv: 48 columns"),
        ({"sin": torch.zeros(3, D)}, "sin: expected shape"),
        ({"keys": torch.zeros(B, K, PAGE, D).transpose(1, 2)}, "keys: pages must be contiguous"),
        ({"values": torch.zeros(B, PAGE, K, D + 2)}, "values: expected shape"),
    ],
)
def test_bad_arguments_of_rope_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rope_append(**rope_case() | change)


def test_bad_arguments_of_the_others_are_named():
    for x, delta, weight, eps, name in [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), 1e-6, "delta"),
        (torch.zeros(2, 3), None, torch.zeros(4), 1e-6, "weight"),
        (torch.zeros(2, 3), None, torch.zeros(3), -1.0, "eps"),
        (torch.zeros(2), None, torch.zeros(3), 1e-6, "x"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}:"):
            add_rms_norm(x, delta, weight, eps=eps)
    with pytest.raises(ValueError, match="two equal halves"):
        silu_mul(torch.zeros(2, 3))


def test_trusted_arguments_are_not_looked_at():
    wrong = (torch.zeros(2, 3), None, torch.zeros(3))
    with checks.skip_checks():
        add_rms_norm(*wrong, eps=-1.0)
    with pytest.raises(ZeroDivisionError), checks.skip_checks():
        raise ZeroDivisionError
    with pytest.raises(ValueError, match=r"^eps:"):
        add_rms_norm(*wrong, eps=-1.0)
