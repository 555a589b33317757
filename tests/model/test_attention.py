"""Attention over packed rows: every backend against plain softmax attention, one segment at a time, in float64."""

import ast
import inspect
import logging
import os
import sys
import types
import zipfile

import pytest
import torch
from plain_attention import KEYS, LENGTHS, D, H, K, plain, rows

from vtfast.model import attention, attention_layout, select_backend
from vtfast.model.attention import (
    AttentionLayout,
    choose_backend,
    language_attention,
    packed_attention,
    vision_attention,
)
from vtfast.utils.errors import UserError


def assert_same(layout, lengths, keys, **options):
    tensors = rows(sum(lengths))
    ours = packed_attention(*tensors, layout, None, options.get("window"))
    theirs = plain(*tensors, lengths, keys, layout.causal, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn(ours.shape, dtype=ours.dtype)
    for mine, expected in zip(
        torch.autograd.grad(ours, tensors, weight), torch.autograd.grad(theirs, tensors, weight), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("free_area", [0, 1 << 16])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 6, 7, 11, 12, 100])
def test_sdpa_shared_prompts(monkeypatch, window, free_area):
    """Segments one at a time, and padded together."""
    monkeypatch.setattr(attention_layout, "FREE_AREA", free_area)
    assert_same(AttentionLayout(LENGTHS, KEYS), LENGTHS, KEYS, window=window)


def test_sdpa_images():
    """Every patch sees its own image, and no other."""
    lengths, row = [4, 9, 4], [(0, 4), (4, 13), (13, 17)]
    assert_same(AttentionLayout(lengths, causal=False), lengths, [[span] for span in row])


def test_the_scale_is_not_taken_for_granted():
    """Every model of today scales by 1 / sqrt(d); another one would not."""
    tensors = rows(21)
    expected = plain(2 * tensors[0], *tensors[1:], LENGTHS, KEYS)
    torch.testing.assert_close(packed_attention(*tensors, AttentionLayout(LENGTHS, KEYS), 2 * D**-0.5), expected)
    q, k, v = (x.detach().transpose(0, 1)[None] for x in rows(13))
    ends = torch.tensor([0, 4, 13], dtype=torch.int32)
    ours, _ = vision_attention(None, q, k, v, None, 2 * D**-0.5, cu_seq_lens_q=ends)
    tensors = [x[:13] for x in rows(13)]
    expected = plain(2 * tensors[0], *tensors[1:], [4, 9], [[(0, 4)], [(4, 13)]], causal=False)
    torch.testing.assert_close(ours[0], expected)


def test_padding_is_bounded():
    """A long segment among short ones must not pad them all to its length."""
    lengths = [1000, *[10] * 50]
    batches, _ = AttentionLayout(lengths).batches
    area = sum(batch.size * batch.queries * batch.keys for batch in batches)
    assert area < 1.3 * sum(n * n for n in lengths) and len(batches) < 10


def reference_varlen(q, k, v, cu_q, cu_k, causal, window, scale):
    """What every varlen kernel computes, from its own arguments alone."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    out = []
    for s in range(len(cu_q) - 1):
        left = None if window[0] < 0 else window[0] + 1
        segment = q[cu_q[s] : cu_q[s + 1]] * (1 if scale is None else scale * D**0.5)
        length = len(segment)
        out.append(
            plain(
                segment,
                k[cu_k[s] : cu_k[s + 1]],
                v[cu_k[s] : cu_k[s + 1]],
                [length],
                [[(0, cu_k[s + 1] - cu_k[s])]],
                causal,
                left,
            )
        )
    return torch.cat(out)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert dropout_p == 0 and (max_seqlen_q, max_seqlen_k) == (7, 12)
    return reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, softmax_scale)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    out = reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, softmax_scale)
    return out, None


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    assert type(max_seqlen_q) is type(max_seqlen_k) is int and num_splits == 1
    assert all(size is None or size >= 0 for size in window_size)
    window = tuple(-1 if size is None else size for size in window_size)
    out = reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softmax_scale)
    return out, None  # the log-sum-exp


def varlen_211(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1], "this version knows no grouped heads"
    causal = window_size[1] == 0
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, causal, window_size, scale)


def varlen_213(
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
    assert enable_gqa
    causal = window_size[1] == 0
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, causal, window_size, scale)


VARLEN = [
    ("flash_attn", "flash_attn", "flash_attn_varlen_func", flash_attn_2),
    ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
    ("flash_attn_4", "flash_attn.cute", "flash_attn_varlen_func", flash_attn_4),
    ("varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_211),
    ("varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_213),
]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend, module, name, function", VARLEN)
def test_varlen_kernels_get_their_own_signatures(monkeypatch, backend, module, name, function, window):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: function}))
    layout = AttentionLayout(LENGTHS, KEYS, backend=backend)
    assert_same(layout, LENGTHS, KEYS, window=window)
    tensors = rows(21)
    doubled = packed_attention(*tensors, layout, 2 * D**-0.5, window)
    expected = plain(2 * tensors[0], *tensors[1:], LENGTHS, KEYS, window=window)
    torch.testing.assert_close(doubled, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend, module, name, function", VARLEN)
def test_varlen_kernels_are_told_what_is_causal(monkeypatch, backend, module, name, function, causal):
    """Images see all of themselves; and the longest query and key stand in their own places."""
    bound = {}

    def kernel(*args, **kwargs):
        bound.update(inspect.signature(function).bind(*args, **kwargs).arguments)
        return args[0]

    kernel.__signature__ = inspect.signature(function)
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: kernel}))
    packed_attention(*rows(21), AttentionLayout(LENGTHS, KEYS if causal else None, causal=causal, backend=backend))
    longest = [bound.get(f"max_seqlen_{x}", bound.get(f"max_{x}")) for x in "qk"]
    assert longest == [7, 12 if causal else 7]
    every_key = (None, None) if backend == "flash_attn_4" else (-1, 0 if causal else -1)
    assert bound.get("window_size", every_key) == every_key
    assert bound.get("causal", causal) == bound.get("is_causal", causal) == causal


@pytest.mark.slow
def test_the_stand_in_has_the_signature_of_the_wheel():
    """`FLASH_ATTN_4_WHEEL=flash_attn_4-….whl pytest -m slow`"""
    if "FLASH_ATTN_4_WHEEL" not in os.environ:
        pytest.skip("needs FLASH_ATTN_4_WHEEL, the path of FlashAttention-4's wheel")
    tree = ast.parse(zipfile.ZipFile(os.environ["FLASH_ATTN_4_WHEEL"]).read("flash_attn/cute/interface.py"))
    (real,) = (x for x in tree.body if getattr(x, "name", "") == "flash_attn_varlen_func")
    parameters = inspect.signature(flash_attn_4).parameters
    assert list(parameters) == [argument.arg for argument in real.args.args]
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults == [ast.literal_eval(value) for value in real.args.defaults]


def test_the_installed_varlen_has_a_signature_that_we_know():
    from torch.nn.attention.varlen import varlen_attn

    known = set(inspect.signature(varlen_attn).parameters)
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= known
    assert "window_size" in known or "is_causal" in known


def test_the_choice(monkeypatch, caplog):
    select_backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="vtfast"):
        assert choose_backend() == choose_backend("sdpa", "cpu") == "sdpa"
    assert [record.message for record in caplog.records] == ["packed attention (cpu, float32): sdpa"]
    with pytest.raises(UserError, match="must be one of auto, sdpa"):
        choose_backend("flash")
    with pytest.raises(UserError, match="must be one of auto, sdpa; others are not installed"):
        choose_backend("varlen")
    installed = {"flash_attn_interface", "flash_attn.cute", "flash_attn", "torch.nn.attention.varlen"}

    def load(name):
        if name not in installed:
            raise ImportError(name)
        return types.SimpleNamespace(flash_attn_varlen_func=1, varlen_attn=1)

    monkeypatch.setattr(attention.importlib, "import_module", load)
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    half = torch.bfloat16
    assert choose_backend("auto", "cuda", half) == "flash_attn_3"
    installed.remove("flash_attn_interface")
    assert choose_backend("auto", "cuda", half) == "flash_attn_4"
    capability[0] = 10
    assert choose_backend("auto", "cuda", half) == "flash_attn_4"
    capability[0] = 8
    assert choose_backend("auto", "cuda", half) == "flash_attn"
    installed.remove("flash_attn")
    assert choose_backend("auto", "cuda", half) == "varlen"
    assert choose_backend("auto", "cuda", torch.float32) == "sdpa", "flash kernels have no fp32"


def test_without_a_layout_it_is_transformers_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = types.SimpleNamespace(is_causal=True, num_key_value_groups=H // K, training=False)
    q, k, v = (x.detach().transpose(0, 1)[None] for x in rows(9))
    mask = torch.rand(1, 1, 9, 9) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    ours, _ = language_attention(module, q, k, v, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.3)
    assert ours.equal(theirs)
