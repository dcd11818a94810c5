"""Train, distil and measure the bundled python-stdlib model pair.

The text is the running interpreter's own standard library, so nothing has to be
downloaded. A file is held out by the hash of its path, never trained on, and used
for every figure that `evaluate` prints. The steps, in order:

    python models/train.py tokenizer   # byte-level BPE, written for both models
    python models/train.py target      # next-token loss on the text
    python models/train.py draft       # the same for the small model
    python models/train.py distill     # draft learns the target's distribution
    python models/train.py evaluate    # re-measure the saved weights
    python models/train.py deepen      # the target with twice the layers, see there

`target` and `draft` are independent and may run side by side. Needs torch (2.9 or
newer, for torch.optim.Muon), transformers, tokenizers and safetensors; no GPU.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD, EOS_ID, PAD_ID = "<|eos|>", "<|pad|>", 0, 1
VOCAB, MAX_LENGTH = 2048, 2048
HELD_OUT_PERCENT = 3
TOKENS_PER_STEP = 4096
WINDOW = 512  # of held-out text, each evaluated on its own
# (fraction of the run at which the stage ends, sequence length). Attention is slow
# on a CPU, so most of it uses short sequences; the end reaches the full length.
STAGES = ((0.70, 256), (0.88, 512), (0.97, 1024), (1.0, 2048))
# Directories that are left out: tests, generated character tables, help-text dumps.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Hidden size, MLP size, layers, attention heads (of 64), key-value heads.
SHAPES = {
    "target": (256, 640, 6, 4, 2),
    "draft": (128, 320, 2, 2, 1),
    "draft_small": (128, 256, 1, 2, 1),
}
PROMPTS = (
    "def read_json(path):\n",
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\n",
    "for i in range(",
)
# Messages are plain code; they are joined as they are, one after another.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Model = Any  # transformers' models are only partly annotated


def read_corpus() -> tuple[list[str], list[str]]:
    """Return (training, held-out) files of the standard library.

    The split hashes the path below the library's root, not the content, so that a
    file stays on its side from one Python version to the next.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sides: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        held = int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT
        sides[held].append(text.replace("\r\n", "\n"))
    return sides


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    options: dict[str, Any] = {"eos_token": EOS, "bos_token": EOS, "pad_token": PAD}
    options |= {"model_max_length": MAX_LENGTH, "clean_up_tokenization_spaces": False}
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=bpe, **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer  # type: ignore[no-any-return]


def encode(tokenizer_dir: Path, texts: list[str]) -> Tensor:
    """Encode files into one stream in which each file is followed by EOS."""
    bpe = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    files = bpe.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([i for file in files for i in (*file.ids, EOS_ID)])


def batches(data: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield [batch, length + 1] windows; an epoch visits each token about once."""
    rows = TOKENS_PER_STEP // length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(data) - length - 1, length)
        order = starts[torch.randperm(len(starts), generator=generator)].tolist()
        for i in range(0, len(order) - rows + 1, rows):
            yield torch.stack([data[s : s + length + 1] for s in order[i : i + rows]])


def new_model(role: str) -> Model:
    """Build an untrained model; a residual branch starts as the zero function."""
    hidden, mlp, layers, heads, kv_heads = SHAPES[role]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model: Model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def deepen(target: Model) -> Model:
    """The target with a new layer, so far the zero function, behind each of its own.

    Large models have many layers that change little, this one has none to spare:
    trained on, the new ones become such layers, for whoever skips some.
    """
    config = copy.deepcopy(target.config)
    config.num_hidden_layers *= 2
    deep: Model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    weights = {}
    for name, weight in target.state_dict().items():
        kept = re.sub(r"layers\.(\d+)", lambda m: f"layers.{2 * int(m[1])}", name)
        new = re.sub(r"layers\.(\d+)", lambda m: f"layers.{2 * int(m[1]) + 1}", name)
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        weights[new] = torch.zeros_like(weight) if is_output else weight.clone()
        weights[kept] = weight
    deep.load_state_dict(weights)
    return deep


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)  # in eval mode


def publish(item: Any, folder: Path) -> None:
    """Save a model or a tokenizer, moving each complete file into place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        item.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            if path.name == "tokenizer_config.json":
                fields = json.loads(path.read_text())  # a name all releases load:
                fields["tokenizer_class"] = "PreTrainedTokenizerFast"
                path.write_text(json.dumps(fields, indent=2) + "\n")
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def logits_of(model: Model, ids: Tensor) -> Tensor:
    """Float32 logits, with the matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, use_cache=False)
    return torch.as_tensor(output.logits).float().flatten(0, 1)


def train(
    model: Model,
    data: Tensor,
    folder: Path,
    args: Any,
    *,
    teacher: Model = None,
    trained: bool = False,
) -> None:
    """Train on next-token loss or, with a teacher, on KL(teacher || model).

    Muon updates the layers' matrices; AdamW updates the embedding and the norms.
    The run and its schedule end after --steps or --minutes, whichever comes first.
    """
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim < 2 or "embed" in n]
    scale = 0.5 if trained else 1.0
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.03 * scale, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.012 * scale, betas=(0.9, 0.95), fused=True),
    ]

    def rate(step: int) -> float:
        """Warm up for 40 steps, then follow a cosine down to 3%."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return min(1.0, (step + 1) / 40) * (0.03 + 0.97 * cosine)

    step, done, saved, total = 0, 0.0, 0.0, 0.0
    start = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    model.train()
    for until, length in STAGES:
        source = batches(data, length, generator)
        while done < until:
            batch = next(source)
            logits = logits_of(model, batch[:, :-1])
            if teacher is None:
                loss = F.cross_entropy(logits, batch[:, 1:].flatten())
            else:
                with torch.no_grad():
                    wanted = logits_of(teacher, batch[:, :-1]).softmax(-1)
                loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            step, total = step + 1, total + loss.item()
            elapsed = time.monotonic() - start
            done = max(step / args.steps, elapsed / (60 * args.minutes))
            if step % 20 == 0:
                where = f"step {step} ({done:.1%}) length {length}"
                print(f"{where} loss {total / 20:.4f} {elapsed:.0f} s", flush=True)
                total = 0.0
            if elapsed - saved > 180 or done >= 1:
                publish(copy.deepcopy(model).to(torch.float16), folder)
                saved = elapsed
    print(f"{step} steps, {step * TOKENS_PER_STEP} tokens, {elapsed:.0f} s")


@torch.no_grad()
def evaluate(out: Path) -> dict[str, Any]:
    """Measure the saved weights on the held-out files, in float32."""
    texts = read_corpus()[1]
    data = encode(out / "target", texts)
    target = load(out / "target")
    drafts = {role: load(out / role) for role in SHAPES if role != "target"}
    half = load(out / "target", torch.float16)
    sums: defaultdict[str, float] = defaultdict(float)
    for start in range(0, len(data) - 1, WINDOW):
        ids = data[None, start : min(start + WINDOW, len(data) - 1)]
        wanted = data[start + 1 : start + 1 + ids.shape[1]]
        big = target(ids).logits[0]
        best = big.argmax(-1)
        sums["target"] += F.cross_entropy(big, wanted, reduction="sum").item()
        sums["top1"] += (best == wanted).sum().item()
        agreed = torch.zeros_like(best, dtype=torch.bool)
        for role, draft in drafts.items():
            small = draft(ids).logits[0]
            sums[role] += F.cross_entropy(small, wanted, reduction="sum").item()
            agrees = small.argmax(-1) == best
            agreed |= agrees
            sums[f"{role} agrees"] += agrees.sum().item()
            in4 = (small.topk(4).indices == best[:, None]).sum().item()
            sums[f"{role} in 4"] += in4
        sums["any agrees"] += agreed.sum().item()
        if start % (8 * WINDOW) == 0:  # float16 is slow on a CPU: every 8th window
            sums["half"] += (half(ids).logits[0].argmax(-1) == best).sum().item()
            sums["half_count"] += len(wanted)
    count, size = len(data) - 1, sum(len(text.encode()) for text in texts)
    bits = count / size / math.log(2)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(out / "target")
    samples: list[str] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = target.generate(ids, max_new_tokens=64, do_sample=False)
        samples.append(tokenizer.decode(made[0]))
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        "held_out": {"files": len(texts), "bytes": size, "tokens": count},
        "parameters": [each.num_parameters() for each in (target, *drafts.values())],
        "target_nats_per_token": sums["target"] / count,
        "target_bits_per_byte": sums["target"] / count * bits,
        "target_top1_accuracy": sums["top1"] / count,
        "drafts": {
            role: {
                "nats_per_token": sums[role] / count,
                "bits_per_byte": sums[role] / count * bits,
                "top1_is_target_argmax": sums[f"{role} agrees"] / count,
                "top4_has_target_argmax": sums[f"{role} in 4"] / count,
            }
            for role in drafts
        },
        "any_draft_top1_is_target_argmax": sums["any agrees"] / count,
        "float16_argmax_is_float32_argmax": sums["half"] / sums["half_count"],
        "file_bytes": {str(p.relative_to(out)): p.stat().st_size for p in files},
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "task", choices=("tokenizer", *SHAPES, "distill", "evaluate", "deepen")
    )
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "python-stdlib")
    deep = here.parent / "build" / "python-stdlib-deep"
    parser.add_argument("--deep", type=Path, default=deep, help="where deepen writes")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--resume", action="store_true", help="from the saved weights")
    parser.add_argument("--student", default="draft", help="whom distill teaches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.task == "evaluate":
        print(json.dumps(evaluate(args.out), indent=2))
        return
    texts = read_corpus()[0]
    if args.task == "tokenizer":
        for role in SHAPES:
            publish(train_tokenizer(texts), args.out / role)
        return
    data = encode(args.out / "target", texts)
    print(f"{len(texts)} files, {sum(map(len, texts))} characters, {len(data)} tokens")
    if args.task == "deepen":
        model = deepen(load(args.out / "target"))
        publish(PreTrainedTokenizerFast.from_pretrained(args.out / "target"), args.deep)
        train(model, data, args.deep, args, trained=True)
    elif args.task == "distill":
        teacher = load(args.out / "target")
        folder = args.out / args.student
        trained = (folder / "config.json").exists()
        model = load(folder) if trained else new_model(args.student)
        train(model, data, folder, args, teacher=teacher, trained=trained)
    else:
        folder = args.out / args.task
        model = load(folder) if args.resume else new_model(args.task)
        train(model, data, folder, args)


if __name__ == "__main__":
    main()
