# SPDX-License-Identifier: Apache-2.0
"""Train a text classifier of BERT architecture on sealed, labelled text; the built-in job of `cloister train submit`.

Every rank measures these bytes before it runs them. The data is a sealed directory with train.tsv, dev.tsv and
test.tsv; the model starts from nothing, or from a sealed BERT or PERT checkpoint (`--model INPUT`). `--preset`
chooses a recipe; every number in it can be given on its own.

Training uses eager attention: on a CPU the backward pass of the fused one is slower in bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from string import ascii_lowercase, digits
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig

import cloister.train
from cloister.data.text import LabelledText, read_labelled_text
from cloister.errors import CloisterError, Code
from cloister.train import classifier
from cloister.train.classifier import Preprocessing, TextClassifier, TextEncoder


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every hyperparameter; the defaults are those of 1,000 to 10,000 short reviews."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    max_length: int = 128  # tokens
    head_share: float = 1.0  # of longer texts, the share kept from the start; the rest is from the end
    epochs: int = 2
    batch: int = 32  # texts a step, over all ranks
    lr: float = 1e-3
    weight_decay: float = 0.01  # on matrices only
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    dropout: float = 0.2  # before the head
    token_dropout: float = 0.1  # probability of a token to become [MASK]
    min_count: int = 2  # occurrences in train.tsv that make a character a token
    precision: str = "bf16"  # "bf16" (autocast) or "fp32"
    log_steps: int = 20


PRESETS = {
    "sample": Recipe(hidden=64, heads=2, max_length=48, epochs=8, batch=64, lr=3e-3, dropout=0.1),
    # Reviews say what they think at their end, so longer ones keep more of that.
    "chnsenticorp": Recipe(max_length=160, head_share=0.25, epochs=3),
}
SPLITS = ("train", "dev", "test")


def main() -> None:
    job = cloister.train.context()
    options = arguments(job.args)
    recipe = recipe_of(options)
    job.init_process_group()
    torch.manual_seed(derived(job.seed, "weights"))

    labels, names = zip(*(pair.partition("=")[::2] for pair in options.labels.split(",")), strict=True)
    directory = job.input(options.data or job.sole_input(besides=options.model))
    splits = {split: read_labelled_text(directory, f"{split}.tsv", labels=labels) for split in SPLITS}
    model, encoder = build(job, options.model, recipe, [row.text for row in splits["train"]], len(labels))
    data = {split: Split.encode(rows, encoder, labels) for split, rows in splits.items()}
    job.report("data", f"{len(splits['train']):,} rows to train on, {len(encoder.vocabulary):,} tokens, "
               f"{sum(p.numel() for p in model.parameters()):,} parameters")  # fmt: skip

    step = train(job, model, encoder, data, recipe, resume=options.resume)
    if step is None:
        return
    unseen = unseen_rows(splits)
    figures = accuracy(job, model, encoder, data["test"], unseen)
    job.log_metrics({"test_accuracy": figures[0], "test_accuracy_unseen": figures[1]}, step=step, final=True)
    if job.rank == 0:
        shown = [name or label for label, name in zip(labels, names, strict=True)]
        job.output.save_model(classifier.classifier_files(model, encoder, shown))


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the script's arguments; every field of the recipe is one of them."""
    parser = argparse.ArgumentParser(prog="text_classifier.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="sample")
    parser.add_argument("--data", default="", metavar="INPUT", help="input with the text; default: the only other one")
    parser.add_argument("--model", default="", metavar="INPUT", help="input with config.json, vocab.txt, weights")
    parser.add_argument("--labels", default="0=negative,1=positive", help="LABEL=NAME,...: in the data, and in answers")
    parser.add_argument("--resume", action="store_true", help="go on from the output's latest checkpoint")
    for field in fields(Recipe):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=None, metavar=kind.__name__.upper())
    return parser.parse_args(list(argv))


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the preset with the options that were given on top."""
    preset = PRESETS[options.preset]
    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name) is not None}
    recipe = Recipe(**{f.name: given.get(f.name, getattr(preset, f.name)) for f in fields(Recipe)})
    sizes = (recipe.layers, recipe.hidden, recipe.heads, recipe.epochs, recipe.batch, recipe.log_steps)
    if min(sizes) < 1 or recipe.max_length < 3 or recipe.precision not in ("bf16", "fp32"):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="an argument of the text classifier is not allowed",
            why=f"sizes are at least 1, max-length at least 3, precision bf16 or fp32; here: {recipe}",
            todo="correct the arguments behind -- of `cloister train submit`",
        )
    return recipe


def derived(seed: int, *purpose: object) -> int:
    """Return a seed of its own for each use, the same on every machine (63 bits)."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- data


@dataclass(frozen=True, slots=True)
class Split:
    """Encoded rows: token ids and class of each."""

    ids: list[list[int]]
    classes: list[int]

    @classmethod
    def encode(cls, rows: Sequence[LabelledText], encoder: TextEncoder, labels: Sequence[str]) -> Split:
        return cls(encoder.encode([row.text for row in rows]), [labels.index(row.label) for row in rows])


def vocabulary(texts: Sequence[str], min_count: int) -> list[str]:
    """Return special tokens, every character seen often enough (NFD, lower case), and continuations of words."""
    seen = Counter(c for text in texts for c in unicodedata.normalize("NFD", text.lower()))
    chars = {
        c for c, n in seen.items() if n >= min_count and not c.isspace() and unicodedata.category(c)[0] not in "MC"
    }
    plain = set(ascii_lowercase + digits)
    return [*classifier.SPECIAL_TOKENS, *sorted(chars | plain), *(f"##{c}" for c in sorted(plain))]


def batches(lengths: Sequence[int], *, size: int, seed: int) -> list[list[int]]:
    """Return batches of row numbers: rows of like length together, batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    block = 50 * size
    near = [i for at in range(0, len(order), block) for i in sorted(order[at : at + block], key=lengths.__getitem__)]
    made = [near[at : at + size] for at in range(0, len(near), size)]
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def unseen_rows(splits: dict[str, list[LabelledText]]) -> list[bool]:
    """Say for each test row whether its text, letters and digits only, occurs in neither train nor dev."""
    known = {bare(row.text) for split in ("train", "dev") for row in splits[split]}
    return [bare(row.text) not in known for row in splits["test"]]


def bare(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


# --- model


def build(
    job: Any, model_input: str, recipe: Recipe, texts: Sequence[str], classes: int
) -> tuple[TextClassifier, TextEncoder]:
    """Return the model and its text encoder: new ones, or those of a sealed checkpoint."""
    preprocessing = Preprocessing(recipe.max_length, recipe.head_share)
    if model_input:
        body, encoder = classifier.load_checkpoint(job.input(model_input), preprocessing, attention="eager")
        return TextClassifier(body, classes, dropout=recipe.dropout), encoder
    encoder = TextEncoder(vocabulary(texts, recipe.min_count), preprocessing)
    config = BertConfig(
        vocab_size=len(encoder.vocabulary),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.hidden,
        max_position_embeddings=recipe.max_length,
        # Token dropout does their work at no cost.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return TextClassifier(classifier.new_encoder(config, attention="eager"), classes, dropout=recipe.dropout), encoder


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


# --- loop


def train(
    job: Any, model: TextClassifier, encoder: TextEncoder, data: dict[str, Split], recipe: Recipe, *, resume: bool
) -> int | None:
    """Train all epochs; return the number of steps, or None when the owner cancelled the job."""
    optimizer = optimizer_for(model, recipe)
    first = restore(job, model, optimizer, recipe) if resume else 0
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    lengths = [len(ids) for ids in data["train"].ids]
    per_epoch = -(-len(lengths) // recipe.batch)
    steps = per_epoch * recipe.epochs
    began = time.monotonic()
    for epoch in range(first, recipe.epochs):
        # Seeded anew each epoch, so that a resumed job goes on exactly as one that never stopped.
        torch.manual_seed(derived(job.seed, "epoch", epoch, "rank", job.rank))
        plan = batches(lengths, size=recipe.batch, seed=derived(job.seed, "order", epoch))
        meter = Meter(job, epoch + 1, recipe.epochs, steps)
        model.train()
        for step, batch in enumerate(plan, start=epoch * per_epoch + 1):
            set_rate(optimizer, recipe, step, steps)
            loss = train_step(job, parallel, encoder, data["train"], batch, recipe)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            meter.count(loss, len(batch[job.rank :: job.world_size]))
            at_interval = step % recipe.log_steps == 0 or step == (epoch + 1) * per_epoch
            if at_interval and not meter.publish(step):
                job.report("cancelled", f"stopped at step {step:,} of {steps:,}")
                return None
        dev, _ = accuracy(job, model, encoder, data["dev"])
        job.log_metrics({"loss": meter.loss, "dev_accuracy": dev}, step=(epoch + 1) * per_epoch, final=True)
        if job.rank == 0:
            line = f"epoch {epoch + 1}/{recipe.epochs}  loss {meter.loss:.4f}  dev accuracy {dev:.2%}"
            print(line, flush=True)  # noqa: T201 - for the rank's log
            about = checkpoint_about(job, recipe, epoch + 1)
            job.output.save_checkpoint((epoch + 1) * per_epoch, tensors_of(model, optimizer), about=about)
    job.report("trained", f"{steps:,} steps", elapsed_s=time.monotonic() - began)
    return steps


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    """Warm up linearly, then fall linearly to nothing."""
    warmup = max(1, round(recipe.warmup * steps))
    share = step / warmup if step <= warmup else (steps - step + 1) / (steps - warmup + 1)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * share


def train_step(
    job: Any, parallel: Any, encoder: TextEncoder, data: Split, batch: list[int], recipe: Recipe
) -> torch.Tensor:
    """Run this rank's share forward and backward; return its part of the loss sum.

    Gradients are averaged over ranks, so each rank's sum is scaled to make that the mean over the whole batch,
    also when the shares differ in size. A rank without a share computes with weight zero: collectives need everyone.
    """
    mine = batch[job.rank :: job.world_size]
    share = mine or batch[:1]
    ids_bl, mask_bl = encoder.pad([data.ids[i] for i in share])
    special_bl = (ids_bl == encoder.cls_id) | (ids_bl == encoder.sep_id) | (ids_bl == encoder.pad_id)
    hidden_bl = torch.rand(ids_bl.shape) < recipe.token_dropout
    ids_bl = ids_bl.masked_fill(hidden_bl & ~special_bl, encoder.mask_id)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits_bc = parallel(ids_bl, mask_bl)
    loss = cross_entropy(logits_bc.float(), torch.tensor([data.classes[i] for i in share]), reduction="sum")
    loss = loss if mine else loss * 0.0
    (loss * job.world_size / len(batch)).backward()
    return loss.detach()


class Meter:
    """Loss over all ranks and speed of this one, published every few steps."""

    def __init__(self, job: Any, epoch: int, epochs: int, steps: int) -> None:
        self._job, self._epoch, self._epochs, self._steps = job, epoch, epochs, steps
        self._total = torch.zeros(2, dtype=torch.float64)  # loss sum, samples; all ranks, since the epoch began
        self._recent = torch.zeros(2, dtype=torch.float64)
        self._since = time.monotonic()

    @property
    def loss(self) -> float:
        """Mean loss of the epoch so far."""
        return float(self._total[0] / self._total[1])

    def count(self, loss: torch.Tensor, samples: int) -> None:
        self._recent += torch.stack([loss.double(), torch.tensor(float(samples), dtype=torch.float64)])

    def publish(self, step: int) -> bool:
        """Report progress; return False when the job was cancelled, on all ranks at the same step."""
        own = float(self._recent[1])
        sums = torch.cat([self._recent, torch.tensor([float(self._job.cancelled)], dtype=torch.float64)])
        dist.all_reduce(sums)
        self._total += sums[:2]
        now = time.monotonic()
        self._job.progress(
            self._epoch,
            self._epochs,
            step,
            self._steps,
            loss=float(sums[0] / sums[1]),
            samples_per_s=own / max(now - self._since, 1e-9),
        )
        self._recent.zero_()
        self._since = now
        return float(sums[2]) == 0.0


def accuracy(
    job: Any, model: TextClassifier, encoder: TextEncoder, data: Split, subset: Sequence[bool] | None = None
) -> tuple[float, float]:
    """Return the share of right answers over all ranks: of all rows, and of those that `subset` marks."""
    model.eval()
    mine = sorted(range(job.rank, len(data.ids), job.world_size), key=lambda i: len(data.ids[i]))
    counts = torch.zeros(4, dtype=torch.float64)  # right, rows; the same of the subset
    with torch.inference_mode():
        for at in range(0, len(mine), 64):
            rows = mine[at : at + 64]
            best_b = model(*encoder.pad([data.ids[i] for i in rows])).argmax(-1)
            right = best_b == torch.tensor([data.classes[i] for i in rows])
            marked = torch.tensor([subset[i] if subset else False for i in rows])
            part = [right.sum(), torch.tensor(len(rows)), (right & marked).sum(), marked.sum()]
            counts += torch.stack(part).double()
    dist.all_reduce(counts)
    model.train()
    right, rows_all, right_marked, rows_marked = counts.tolist()
    return right / max(rows_all, 1), right_marked / max(rows_marked, 1)


# --- checkpoints


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return everything a resumed job needs, by name."""
    state = optimizer.state_dict()["state"]
    moments = {f"optimizer.{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}
    return {**{f"model.{name}": tensor for name, tensor in model.state_dict().items()}, **moments}


def checkpoint_about(job: Any, recipe: Recipe, epoch: int) -> dict[str, str]:
    return {"epoch": str(epoch), "recipe": str(recipe), "seed": str(job.seed), "world_size": str(job.world_size)}


def restore(job: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """Put the latest checkpoint of a job like this one into model and optimizer on every rank; return its epoch."""
    found = job.output.load_latest_checkpoint() if job.rank == 0 else None
    epoch = torch.tensor(0)
    if found is not None:
        epoch = torch.tensor(int(found.about.get("epoch", "0")))
        if found.about != checkpoint_about(job, recipe, int(epoch)):
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="the latest checkpoint is of another recipe, seed or number of ranks",
                why="going on from it would give neither that job's result nor this one's",
                todo="submit with the arguments of the first job, or choose another output directory",
            )
        model.load_state_dict({n.removeprefix("model."): t for n, t in found.tensors.items() if n.startswith("model.")})
    dist.broadcast(epoch, src=0)
    if int(epoch) == 0:
        return 0
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        like = {"step": torch.tensor(0.0), "exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()}
        source = {
            name: found.tensors[f"optimizer.{i}.{name}"] if found else torch.zeros_like(t) for name, t in like.items()
        }
        for tensor in source.values():
            dist.broadcast(tensor, src=0)
        state[i] = source
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(epoch)


if __name__ == "__main__":
    main()
