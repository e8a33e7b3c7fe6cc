"""Train the demo checkpoint: a 2.5M-parameter Llama on this machine's own Python sources.

    python scripts/train_demo.py --minutes 5 --output runs/demo

writes `model/` (a transformers checkpoint in bfloat16) and `training.json` (figures) below `--output`.

Data. Every `.py` file of `--stdlib` and `--packages` (default: the running interpreter's standard
library and site-packages) that `demo_texts.select` keeps: the modules of the demo's three texts, their
copies under any name, tables, generated, giant and duplicate files are left out. One kept file in 200,
by content hash, is for validation. The standard library is repeated three times a pass, since the texts
come from it. Each file is one document that starts with `<s>`; documents are joined and cut into windows
of `--sequence` tokens at a new random offset each pass, and in half of the windows the first token is
replaced by `<s>`, so that the model knows both kinds of start.

Tokenizer. Byte-level BPE of 1,024 entries trained on 32 MB of the training files; it adds no `<s>` of
its own.

Schedule. AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices, gradient norm at most 1), a linear
warm-up over 3 % of the time and a cosine to zero, both in wall-clock time. Seeds: `--seed` (default 0)
for the weights and the dropout, `--seed` + 1 for the windows, `--seed` + 2 for the tokenizer's sample.
Time-boxed training does not repeat bit for bit.

Dropout. While training, the input of each of a block's seven projections loses `--dropout` (default 0.1)
of its entries: without it so small a network has no redundancy, and dropping 60 % of every projection's
input channels takes its loss on the test text from 1.66 to 3.5 nats per token (with it, from 1.90 to
2.24). The stored checkpoint is a plain Llama and has no dropout.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from demo_texts import MODULES, TEXT_FOLDER, SourceFile, leaked_share, select
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 1024
BOS, BOS_ID = "<s>", 0
MAX_POSITIONS = 1024
STDLIB_REPEATS = 3
VALIDATION_ONE_IN = 200
TOKENIZER_SAMPLE_BYTES = 32_000_000
SECONDS_KEPT_FOR_THE_END = 30.0


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention without a mask tensor, so that the flash kernel is chosen.

    query [b, heads, t, d], key and value [b, kv heads, t, d] -> [b, t, heads, d]. Under autocast the rotary
    embedding leaves query and key in float32; they take the value's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal_without_mask", causal_attention)


DEMO_SHAPE = (12, 128, 384, 4, 2)
"""Blocks, hidden width, feed-forward width, heads and key/value heads of the packaged checkpoint."""


def model_config(shape: Sequence[int] = DEMO_SHAPE) -> LlamaConfig:
    blocks, hidden, feed_forward, heads, kv_heads = shape
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
        pad_token_id=None,
        use_cache=True,
    )


def train_tokenizer(files: Sequence[SourceFile], seed: int) -> tokenizers.Tokenizer:
    """Byte-level BPE on a random sample of the files; any text decodes to itself."""
    shuffled = random.Random(seed).sample(list(files), len(files))

    def sample() -> Iterator[str]:
        left = TOKENIZER_SAMPLE_BYTES
        for file in shuffled:
            if left < 0:
                return
            left -= file.size_bytes
            yield Path(file.path).read_bytes().decode("utf-8")

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        sys.exit(f"vocabulary: must reach {VOCABULARY} entries, got {tokenizer.get_vocab_size()}: add data")
    return tokenizer


_tokenizer: tokenizers.Tokenizer | None = None


def _begin_worker(tokenizer: tokenizers.Tokenizer) -> None:
    """Take the tokenizer; a literal `<s>` in a file is ordinary text to it."""
    global _tokenizer
    _tokenizer = tokenizer
    _tokenizer.encode_special_tokens = True


def _encode_in_worker(path: str) -> NDArray[np.uint16]:
    assert _tokenizer is not None
    text = Path(path).read_bytes().decode("utf-8")
    return np.array([BOS_ID, *_tokenizer.encode(text, add_special_tokens=False).ids], dtype=np.uint16)


def encode_files(
    tokenizer: tokenizers.Tokenizer, files: Sequence[SourceFile], processes: int
) -> list[NDArray[np.uint16]]:
    """Token ids of each file, `<s>` first; a literal `<s>` in a file is encoded as ordinary text."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin_worker, (tokenizer,)) as pool:
        return list(pool.map(_encode_in_worker, [file.path for file in files], chunksize=32))


def training_batches(stream: Tensor, batch: int, sequence: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each [batch, sequence], from the token stream [n] on its device."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(sequence + 1, device=stream.device)
    while True:
        offset = int(torch.randint(sequence, (), generator=generator))
        windows = (len(stream) - 1 - offset) // sequence
        starts = (torch.randperm(windows, generator=generator) * sequence + offset).to(stream.device)
        if windows < batch:
            raise ValueError(f"stream: must hold {batch} windows of {sequence} tokens or more, got {windows}")
        for chosen in torch.split(starts, batch)[: windows // batch]:
            tokens = stream[chosen[:, None] + within].long()
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            inputs[: batch // 2, 0] = BOS_ID  # the windows are in random order: a random half
            yield inputs, targets


def mean_loss(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token; inputs and targets [b, t]."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))


@torch.no_grad()
def text_nats(model: LlamaForCausalLM, ids: Sequence[int], window: int, batch: int = 16) -> float:
    """Summed nats of a text's tokens; every token is predicted once.

    The ids are cut into windows of `window` - 1 tokens without overlap; each is read after one `<s>`, which
    gives the window's first token its context. Divided by the text's UTF-8 bytes this is nats per byte.
    """
    device, step, total = next(model.parameters()).device, window - 1, 0.0
    rows = [list(ids[at : at + step]) for at in range(0, len(ids), step)]
    for at in range(0, len(rows), batch):
        chunk = rows[at : at + batch]
        for same in ([r for r in chunk if len(r) == step], [r for r in chunk if len(r) < step]):
            if same:
                targets = torch.tensor(same, device=device)
                inputs = F.pad(targets[:, :-1], (1, 0), value=BOS_ID)
                logits = model(input_ids=inputs, use_cache=False).logits.float()
                nats = F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), reduction="sum")
                total += nats.item()
    return total


def learning_rate_factor(progress: float) -> float:
    """Warm-up over 3 % of the time, then a cosine to zero; `progress` in [0, 1]."""
    return min(progress / 0.03, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class DropoutLinear(torch.nn.Linear):
    """A linear layer without bias whose input loses a share `p` of its entries in train mode.

    It takes over the weight of `linear`, under the same name.
    """

    def __init__(self, linear: torch.nn.Linear, p: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, self.p, self.training))


def initial_model(
    seed: int, device: torch.device, dropout: float, shape: Sequence[int] = DEMO_SHAPE
) -> LlamaForCausalLM:
    """The untrained model in train mode, with dropout on the inputs of each block's seven projections."""
    torch.manual_seed(seed)
    config = model_config(shape)
    config._attn_implementation = "causal_without_mask"
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual branches start small, so that depth does not grow the stream
        for block in model.model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(part, name, DropoutLinear(layer, dropout))
    return model.to(device).train()


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    seconds: float,
    deadline: float,
    learning_rate: float,
    batch: int,
    sequence: int,
    seed: int,
    halfway: Callable[[], None],
) -> dict[str, Any]:
    """Train for `seconds` after the first (compiling) step, not past `deadline` on the performance counter.

    Returns the figures of the run; `halfway` is called once, at half time.

    A step whose loss is not finite stops the program.
    """
    cuda = stream.device.type == "cuda"
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=cuda)
    loss_of: Callable[..., Tensor] = torch.compile(mean_loss) if cuda else mean_loss
    batches = training_batches(stream, batch, sequence, seed)

    def backward(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        return loss.detach()

    started = time.perf_counter()
    try:
        backward(*next(batches)).item()
    except Exception as error:
        if not cuda:
            raise
        print(f"compiled step failed, going on without torch.compile: {error!r:.2000}")
        loss_of = mean_loss
        backward(*next(batches)).item()
    print(f"first step {time.perf_counter() - started:.1f} s")
    optimizer.zero_grad(set_to_none=True)

    started = said = time.perf_counter()
    seconds = max(min(seconds, deadline - started), 1.0)
    step, losses, progress, saved, every = 0, [], 0.0, False, 10 if cuda else 1
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(progress)
        losses.append(backward(*next(batches)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % every:
            continue
        loss = torch.stack(losses[-every:]).mean().item()  # waits for the device, so that the time is right
        now = time.perf_counter()
        progress = max((now - started) / seconds, 1e-3)
        if not math.isfinite(loss):
            sys.exit(f"loss: must be finite, got {loss} at step {step}; lower --learning-rate")
        if progress >= 0.5 and not saved:
            saved = True
            halfway()
        if now - said > 10 or progress >= 1.0 or step == every:
            said = now
            rate = step * batch * sequence / (now - started)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
            print(
                f"step {step:6d}  {now - started:6.1f} s  loss {loss:.4f} nats/token  "
                f"lr {optimizer.param_groups[0]['lr']:.2e}  {rate:,.0f} tokens/s{memory}"
            )
    elapsed = time.perf_counter() - started
    tokens = step * batch * sequence
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": round(elapsed, 1),
        "tokens_per_second": round(tokens / elapsed),
        "last_100_steps_nats_per_token": round(torch.stack(losses[-100:]).mean().item(), 4),
    }


def save_checkpoint(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer, loadable by AutoModelForCausalLM and AutoTokenizer."""
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    stored = LlamaForCausalLM(model_config((*shape, config.num_attention_heads, config.num_key_value_heads)))
    stored.load_state_dict(model.state_dict())
    stored = stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=BOS_ID, pad_token_id=BOS_ID)
    stored.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": BOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def evaluate_checkpoint(folder: Path, sequence: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Figures of the stored checkpoint on the three texts: bfloat16 weights, float32 arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    figures = {}
    for name in MODULES:
        text = (TEXT_FOLDER / f"{name}.txt").read_bytes()
        ids = tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids
        nats = text_nats(model, ids, sequence)
        figures[name] = {
            "nats_per_byte": round(nats / len(text), 4),
            "nats_per_token": round(nats / len(ids), 4),
            "bytes_per_token": round(len(text) / len(ids), 4),
            "tokens": len(ids),
        }
    return figures


def report_selection(files: Sequence[SourceFile], texts: Sequence[bytes]) -> dict[str, Any]:
    """Print and return what each rule dropped, and how much of the texts the kept files still share."""
    count, size = Counter(f.dropped or "kept" for f in files), Counter[str]()
    for file in files:
        size[file.dropped or "kept"] += file.size_bytes
    for reason, number in count.most_common():
        print(f"{reason:>10}  {number:6d} files  {size[reason] / 1e6:8.2f} MB")
    for file in (f for f in files if f.dropped in ("name", "shingles")):
        print(f"  dropped by {file.dropped}: {os.path.join(*Path(file.path).parts[-4:])}")
    kept = [file for file in files if file.dropped is None]
    leaked = round(leaked_share(b"".join(texts), kept), 4)
    print(f"share of the texts' distinct 50-byte shingles that occurs in a kept file: {leaked}")
    return {"files": dict(count), "bytes": dict(size), "shared_shingles": leaked}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    paths = sysconfig.get_paths()
    parser = argparse.ArgumentParser(description="Train the packaged demo checkpoint.")
    parser.add_argument("--stdlib", type=Path, nargs="*", default=[Path(paths["stdlib"])])
    packages = [Path(paths["purelib"]), Path(paths["platlib"])]
    parser.add_argument("--packages", type=Path, nargs="*", default=packages)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="of training, after the first step")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="of the whole program")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=128, help="windows a step")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens a window")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.1, help="on the projections' inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        default=DEMO_SHAPE,
        metavar=("BLOCKS", "HIDDEN", "FEED_FORWARD", "HEADS", "KV_HEADS"),
        help="of another model than the packaged one",
    )
    parser.add_argument("--max-files", type=int, default=None, help="for a quick try")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {what}")

    texts = [(TEXT_FOLDER / f"{name}.txt").read_bytes() for name in MODULES]
    files = select(arguments.stdlib, arguments.packages, texts, arguments.processes)
    selection = report_selection(files, texts)
    kept = [file for file in files if file.dropped is None][: arguments.max_files]
    for_training = [f for f in kept if int(f.digest[:8], 16) % VALIDATION_ONE_IN]
    for_validation = [f for f in kept if int(f.digest[:8], 16) % VALIDATION_ONE_IN == 0]
    say(f"{len(for_training)} files for training, {len(for_validation)} for validation")

    tokenizer = train_tokenizer(for_training, arguments.seed + 2)
    say("tokenizer trained")
    documents = encode_files(tokenizer, for_training, arguments.processes)
    held_back = encode_files(tokenizer, for_validation, arguments.processes)
    repeated = [
        document
        for file, document in zip(for_training, documents, strict=True)
        for _ in range(STDLIB_REPEATS if file.is_stdlib else 1)
    ]
    random.Random(arguments.seed + 1).shuffle(repeated)
    unique_tokens = sum(map(len, documents))
    stream = torch.from_numpy(np.concatenate(repeated).astype(np.int32)).to(device)
    say(f"{unique_tokens:,} tokens, {len(stream):,} a pass")

    model = initial_model(arguments.seed, device, arguments.dropout, arguments.shape)
    folder = arguments.output / "model"
    figures = train(
        model,
        stream,
        arguments.minutes * 60,
        began + arguments.limit_minutes * 60 - SECONDS_KEPT_FOR_THE_END,
        arguments.learning_rate,
        arguments.batch,
        arguments.sequence,
        arguments.seed + 1,
        halfway=lambda: save_checkpoint(model, tokenizer, folder),
    )
    save_checkpoint(model, tokenizer, folder)
    say("checkpoint written")

    checkpoint = evaluate_checkpoint(folder, arguments.sequence, device)
    validation_ids = np.concatenate(held_back)[:1_000_000].tolist() if held_back else []
    validation = text_nats(model.eval(), validation_ids, arguments.sequence) / max(len(validation_ids), 1)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "settings": {
            name: getattr(arguments, name)
            for name in ("batch", "sequence", "learning_rate", "dropout", "seed", "shape")
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "selection": selection,
        "tokens": {"distinct": unique_tokens, "a_pass": len(stream)},
        "training": figures,
        "validation_nats_per_token": round(validation, 4),
        "checkpoint": checkpoint,
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({"training": figures, "checkpoint": checkpoint}, indent=2))
    say("done")


if __name__ == "__main__":
    main()
