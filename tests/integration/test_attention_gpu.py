"""The GPU backend's layer, as far as it goes without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from vllm_treespec.config import ConfigError, TreeSpecConfig
from vllm_treespec.core.attend import BatchTrees
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.integration.attention import TreeMetadata
from vllm_treespec.integration.attention_gpu import (
    TreeAttentionBackend,
    TreeAttentionImpl,
)

CPU = torch.device("cpu")
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 32


def layer_of(kv_cache_dtype: str, sinks: torch.Tensor | None = None):
    impl = TreeAttentionImpl(
        NUM_HEADS,
        HEAD_SIZE,
        HEAD_SIZE**-0.5,
        NUM_KV_HEADS,
        None,
        None,
        kv_cache_dtype,
        sinks=sinks,
    )
    kernels = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)
    impl.bind(kernels, BatchTrees.allocate(1, 4, CPU), None)
    return impl


def attend(impl: TreeAttentionImpl, cache: torch.Tensor) -> torch.Tensor:
    """The only query row of a context of 20."""
    query = torch.ones(1, NUM_HEADS, HEAD_SIZE)
    metadata = TreeMetadata(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([20], dtype=torch.int32),
        block_table=torch.tensor([[1, 0]], dtype=torch.int32),
        max_query_len=1,
    )
    scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(4.0))
    return impl.forward(scales, query, query, query, cache, metadata, query.clone())


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_quantized_caches_are_read_as_vllms_triton_kernel_stores_them(kv_cache_dtype):
    shape = (2, NUM_KV_HEADS, 16, 2 * HEAD_SIZE)
    stored = torch.randn(shape).to(torch.float8_e4m3fn)
    keys, values = stored.float().split(HEAD_SIZE, dim=3)
    plain = torch.cat([keys * 0.5, values * 4.0], dim=3)
    output = attend(layer_of(kv_cache_dtype), stored.view(torch.uint8))
    torch.testing.assert_close(output, attend(layer_of("auto"), plain))


def test_queries_are_not_quantized_with_the_cache(monkeypatch):
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    monkeypatch.setattr(platform, "has_device_capability", lambda *_, **__: True)
    assert not layer_of("fp8").supports_quant_query_input


def test_sinks_take_their_share():
    assert TreeAttentionBackend.supports_sink()
    cache = torch.ones(2, NUM_KV_HEADS, 16, 2 * HEAD_SIZE)
    sinks = torch.tensor([-torch.inf, 0.0, 5.0, 9.0])
    score = torch.tensor(HEAD_SIZE**0.5)
    keys = 20 * score.exp()
    output = attend(layer_of("auto", sinks), cache)[0, :, 0]
    torch.testing.assert_close(output, keys / (keys + sinks.exp()))


def test_scales_per_token_and_head_are_refused():
    with pytest.raises(ConfigError, match="'int8_per_token_head' has no tree kernel"):
        layer_of("int8_per_token_head")
