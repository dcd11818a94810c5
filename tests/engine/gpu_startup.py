"""The order in which vLLM's GPU worker starts, on a CPU with fake CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.platforms import current_platform
from vllm.utils import torch_utils
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_treespec.core.transfer import HostCopy
from vllm_treespec.integration import attention_cpu
from vllm_treespec.integration.worker import TreeWorker
from vllm_treespec.testing.fake_cuda import FakeCuda, FakeEvent, FakeStream

CACHE_BYTES = 2**21


class GpuStartup(FakeCuda):
    """Engines started inside profile, warm up and capture as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.profiled: dict[int, int] = {}  # storages of the profile's KV cache

    def __enter__(self) -> GpuStartup:
        super().__enter__()
        platform = type(current_platform)
        platform.graph_pool_handle = classmethod(lambda _: (0, 0))
        self._undo.append(lambda: delattr(platform, "graph_pool_handle"))
        self.replace(HostCopy, "_record", staticmethod(_record))
        self.replace(GroupCoordinator, "graph_capture", self._graph_capture())
        self.replace(torch.cuda, "set_stream", self._set_stream)
        self._set_stream(self.default)
        builder = attention_cpu.TreeMetadataBuilder
        self.replace(builder, "_cudagraph_support", AttentionCGSupport.ALWAYS)
        impl = attention_cpu.TreeAttentionImpl
        self.replace(impl, "do_kv_cache_update", self.as_kernel(_write_keys))
        # Of vLLM's own kernels for GPUs.
        self.replace(gpu_worker, "kernel_warmup", lambda _: None)
        self._replace_worker()
        return self

    def _set_stream(self, stream: FakeStream) -> None:
        self.stream = stream
        torch_utils._current_stream_tls.value = stream

    def _graph_capture(self) -> Any:
        original = GroupCoordinator.graph_capture

        @contextmanager
        def graph_capture(group: Any, context: Any = None) -> Iterator[Any]:
            with self.prepared(), original(group, context) as found:
                yield found

        return graph_capture

    def _replace_worker(self) -> None:
        init_device, load_model = TreeWorker.init_device, TreeWorker.load_model

        def init(worker: Any) -> None:
            init_device(worker)
            init_workspace_manager(worker.device)
            self.roots = [worker]
            self._follow(worker.model_runner)

        def load(worker: Any, **options: Any) -> None:
            load_model(worker, **options)
            _allow_graphs(worker.vllm_config)

        def determine_available_memory(worker: Any) -> int:
            self.order.append("profile")
            worker.model_runner.profile_run()
            worker.model_runner.profile_cudagraph_memory()
            return CACHE_BYTES

        def sleep(worker: Any, level: int = 1) -> None:
            """Caches come back with other contents at the same addresses."""
            for cache in worker.model_runner.kv_caches:
                cache.fill_(torch.nan)

        def warm_up(worker: Any) -> Any:
            self.order.append("warm up")
            return gpu_worker.Worker.compile_or_warm_up_model(worker)

        for name, method in (
            ("init_device", init),
            ("load_model", load),
            ("determine_available_memory", determine_available_memory),
            ("compile_or_warm_up_model", warm_up),
            ("sleep", sleep),
            ("wake_up", lambda worker, tags=None: self.memory_changed()),
        ):
            self.replace(TreeWorker, name, method)

    def _follow(self, runner: Any) -> None:
        initialize, capture = runner.initialize_kv_cache, runner.capture_model

        def initialize_kv_cache(
            config: Any, is_profiling: bool = False, **rest: Any
        ) -> None:
            self.memory_changed()
            self.order.append("profile's cache" if is_profiling else "cache")
            initialize(config, is_profiling=is_profiling, **rest)
            if is_profiling:
                caches = [each.untyped_storage() for each in runner.kv_caches]
                self.profiled = {each.data_ptr(): each.nbytes() for each in caches}

        def capture_model(**options: Any) -> Any:
            self.order.append("capture")
            return capture(**options)

        runner.initialize_kv_cache = initialize_kv_cache
        runner.capture_model = capture_model


def _write_keys(
    impl: Any,
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """As a GPU's kernel does, which knows nothing but its arguments."""
    slots = slot_mapping[: key.shape[0]]
    used = slots >= 0
    rows, slots = torch.cat([key, value], dim=-1)[used], slots[used]
    block_size = kv_cache.shape[2]
    kv_cache[slots // block_size, :, slots % block_size] = rows


def _record(device: torch.device) -> FakeEvent:
    event = FakeEvent()
    event.record()
    return event


def _allow_graphs(config: Any) -> None:
    """Which the CPU platform refuses whenever a configuration is made."""
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes = None
    compilation.max_cudagraph_capture_size = None
    config.model_config.enforce_eager = False
    config._set_cudagraph_sizes()
    config.kernel_config.enable_jit_warmup = True
