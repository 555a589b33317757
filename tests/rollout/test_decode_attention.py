"""The packages behind decode attention, by stand-ins with their signatures that read pages row by row."""

import sys
import types

import pytest
import torch
from make_kv_pages import CASES, case
from vtfast_kernels.paged_attention import paged_attention

from vtfast.rollout import attention
from vtfast.rollout.attention import decode_attention
from vtfast.utils.errors import UserError


def by_rows(query, keys, values, lengths, table, scale):
    """What the packages compute: query [R, H, d] over the first `lengths` tokens of each row's pages."""
    assert lengths.dtype == table.dtype == torch.int32, "the packages take nothing else"
    out = []
    for q, n, pages in zip(query, lengths.tolist(), table.long(), strict=True):
        k, v = (x[pages].flatten(0, 1)[:n].repeat_interleave(3, 1) for x in (keys, values))
        out.append(torch.einsum("ht,thd->hd", (torch.einsum("hd,thd->ht", q, k) * scale).softmax(-1), v))
    return torch.stack(out)


def flash_attn_2(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    assert q.shape[1] == 1 and num_splits >= 1 and causal
    return by_rows(q[:, 0], k_cache, v_cache, cache_seqlens, block_table, softmax_scale)[:, None]


def flash_attn_3(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    softmax_scale=None,
    causal=False,
    num_splits=0,
):
    return flash_attn_2(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=page_table,
        softmax_scale=softmax_scale,
        causal=causal,
        num_splits=num_splits,
    ), None


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa and cu_seq_q.tolist() == list(range(len(query) + 1)) and max_q == 1
    assert max_k >= int(seqused_k.max())
    return by_rows(query, key, value, seqused_k, block_table, scale)


STAND_INS = {
    "flash_attn": ("flash_attn", "flash_attn_with_kvcache", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_with_kvcache", flash_attn_3),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen_attn),
}


def install(monkeypatch, *names):
    for module, function, stand_in in (STAND_INS[name] for name in names):
        fake = types.ModuleType(module)
        setattr(fake, function, stand_in)
        monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("rows", ["unequal groups", "one row"])
def test_packages_are_called_as_they_want(name, rows, monkeypatch):
    install(monkeypatch, name)
    inputs = case(*CASES[rows])
    expected = paged_attention(**inputs, scale=0.3)
    finite = {x: inputs[x].nan_to_num() for x in ("query", "keys", "values")}
    ours = attention.BACKENDS[name].attend(*finite.values(), inputs["pages"], 0.3)
    torch.testing.assert_close(ours, expected)


def test_the_choice(monkeypatch):
    assert decode_attention("auto", "cpu") is attention.BACKENDS["torch"]
    with pytest.raises(UserError, match="--rollout_attention flash: must be one of auto"):
        decode_attention("flash")
    with pytest.raises(
        UserError, match="--rollout_attention flash_attn: must be one of auto, torch; others are not installed"
    ):
        decode_attention("flash_attn", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    half, fp32 = torch.bfloat16, torch.float32
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert decode_attention("auto", "cuda", half) is attention.BACKENDS["triton"]
    install(monkeypatch, "flash_attn", "varlen")
    assert decode_attention("auto", "cuda", half) is attention.BACKENDS["flash_attn"]
    assert decode_attention("auto", "cuda", fp32) is attention.BACKENDS["triton"]
    assert decode_attention("varlen", "cuda", half) is attention.BACKENDS["varlen"]
    install(monkeypatch, "flash_attn_3")
    assert decode_attention("auto", "cuda", half) is attention.BACKENDS["flash_attn_3"]
    old = types.ModuleType("torch.nn.attention.varlen")
    old.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    with pytest.raises(UserError, match="--rollout_attention varlen: must be one of auto"):
        decode_attention("varlen", "cuda", half)


def test_splits_fill_the_gpu_and_never_vanish():
    assert attention._num_splits(1, 2) == 32 and attention._num_splits(16, 2) == 4
    assert attention._num_splits(512, 2) == 1
