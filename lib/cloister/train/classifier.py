# SPDX-License-Identifier: Apache-2.0
"""The text classifier that the built-in job trains and the serving handler loads: one class, one set of files.

A model is a directory of five files, here a mapping from name to bytes, because opened weights never become files:

    config.json         transformers' BertConfig of the encoder, with id2label and label2id
    model.safetensors   float32; `encoder.*` is BertModel without pooler, `head.weight` and `head.bias` the classifier
    vocab.txt           WordPiece vocabulary, one token a line, the line number is the token's id
    labels.json         list of label names; the position is the class
    preprocessing.json  {"format": "cloister-text-classifier-v1", "max_length", "head_share", "lower_case"}

Shapes, as suffixes of names: b texts, l tokens, h hidden size, c classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

# transformers looks for newer files on its hub at the first chance; a TD has no business there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import safetensors.torch
import torch
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import logging as transformers_logging

from cloister.errors import CloisterError, Code

FORMAT: Final = "cloister-text-classifier-v1"
WEIGHTS: Final = "model.safetensors"
MODEL_FILES: Final = ("config.json", WEIGHTS, "vocab.txt", "labels.json", "preprocessing.json")
Content = bytes | Mapping[str, torch.Tensor]  # of a file; tensors stand for a safetensors file
PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD_TO_MULTIPLE: Final = 8  # matrices of such sizes are faster, and few shapes repeat

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to a text before the encoder: in training and in serving the same."""

    max_length: int = 128  # tokens, [CLS] and [SEP] included
    head_share: float = 1.0  # of a longer text, the share of tokens kept from its start; the rest is from its end
    lower_case: bool = True


class TextEncoder:
    """Turn texts into token ids and padded tensors."""

    def __init__(self, vocabulary: Sequence[str], preprocessing: Preprocessing) -> None:
        self.vocabulary = tuple(vocabulary)
        self.preprocessing = preprocessing
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        if len(ids) != len(self.vocabulary) or not ids.keys() >= set(SPECIAL_TOKENS):
            raise _unloadable("the vocabulary repeats a token or lacks one of " + " ".join(SPECIAL_TOKENS))
        self._tokenizer: Any = BertTokenizer(vocab=ids, do_lower_case=preprocessing.lower_case)
        # A constructor that ignores its vocabulary gives five entries and no error.
        if len(self._tokenizer) != len(ids):
            raise _unloadable("the tokenizer did not take the whole vocabulary")
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = ids[PAD], ids[CLS], ids[SEP], ids[MASK]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, at most `max_length`, [CLS] and [SEP] included."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[self.cls_id, *self._cut(ids), self.sep_id] for ids in encoded]

    def _cut(self, ids: list[int]) -> list[int]:
        room = self.preprocessing.max_length - 2
        if len(ids) <= room:
            return ids
        head = round(room * self.preprocessing.head_share)
        return ids[:head] + ids[len(ids) - (room - head) :]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids_bl and mask_bl (1 for a token, 0 for padding)."""
        longest = max(len(row) for row in rows)
        width = min(-(-longest // _PAD_TO_MULTIPLE) * _PAD_TO_MULTIPLE, max(self.preprocessing.max_length, longest))
        ids_bl = torch.full((len(rows), width), self.pad_id)
        mask_bl = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_bl[i, : len(row)] = torch.tensor(row)
            mask_bl[i, : len(row)] = 1
        return ids_bl, mask_bl


class TextClassifier(torch.nn.Module):  # type: ignore[misc]  # torch is not typed
    """A BERT encoder without pooler, the mean over its tokens, dropout, and one linear layer."""

    def __init__(self, encoder: Any, classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids_bl: torch.Tensor, mask_bl: torch.Tensor) -> torch.Tensor:
        """Return logits_bc."""
        hidden_blh = self.encoder(input_ids=ids_bl, attention_mask=mask_bl).last_hidden_state.float()
        weight_bl1 = mask_bl.unsqueeze(-1).float()
        mean_bh = (hidden_blh * weight_bl1).sum(1) / weight_bl1.sum(1)
        return self.head(self.dropout(mean_bh))


def new_encoder(config: BertConfig, *, attention: str) -> Any:
    """Return a freshly initialised BertModel without pooler; `attention` is "eager" or "sdpa"."""
    config._attn_implementation = attention
    return BertModel(config, add_pooling_layer=False)


def pretrained_encoder(config: BertConfig, tensors: Mapping[str, torch.Tensor], *, attention: str) -> Any:
    """Return a BertModel without pooler over exactly these weights; a missing tensor is an error, never random.

    Takes the names of BertModel and those of BERT with a head (`bert.*`), whose head is left out.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    wanted = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith((prefix + "embeddings.", prefix + "encoder."))
    }
    try:
        encoder, loading = BertModel.from_pretrained(
            None,
            config=config,
            state_dict=wanted,
            add_pooling_layer=False,
            attn_implementation=attention,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise _unloadable(f"the weights do not fit config.json: {str(error)[:300]}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        missing = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
        raise _unloadable(f"tensors are missing or of another shape: {', '.join(missing[:5])}")
    return encoder


class Files(Protocol):
    """What a checkpoint is read from: a sealed directory, or anything else that has files."""

    @property
    def files(self) -> Sequence[str]: ...
    def read(self, name: str) -> bytes: ...


def load_checkpoint(source: Files, preprocessing: Preprocessing, *, attention: str) -> tuple[Any, TextEncoder]:
    """Return encoder and text encoder of a BERT or PERT checkpoint: config.json, vocab.txt, model.safetensors.

    Raises CloisterError(MODEL_LOAD_FAILED), also for weights that are only there as a pickle: opening one runs code.
    """
    absent = [name for name in ("config.json", "vocab.txt", "model.safetensors") if name not in source.files]
    if absent:
        raise CloisterError(
            Code.MODEL_LOAD_FAILED,
            what=f"the checkpoint has no {' and no '.join(absent)}",
            why="weights in pytorch_model.bin are a pickle, which runs code when it is opened; they are never used",
            todo="convert it with transformers' save_pretrained; seal config.json, vocab.txt and model.safetensors",
        )
    encoder = TextEncoder(vocabulary_from(source.read("vocab.txt")), preprocessing)
    config = config_from(source.read("config.json"))
    _require_fit(config, encoder)
    tensors = tensors_from(source.read("model.safetensors"))
    return pretrained_encoder(config, tensors, attention=attention), encoder


def classifier_files(model: TextClassifier, encoder: TextEncoder, labels: Sequence[str]) -> dict[str, Content]:
    """Return the five files of a model, the weights as tensors."""
    config = model.encoder.config
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    return {
        "config.json": config.to_json_string(use_diff=False).encode(),
        WEIGHTS: tensors,
        "vocab.txt": "".join(f"{token}\n" for token in encoder.vocabulary).encode(),
        "labels.json": json.dumps(list(labels), ensure_ascii=False).encode(),
        "preprocessing.json": json.dumps({"format": FORMAT, **asdict(encoder.preprocessing)}).encode(),
    }


class Predictor:
    """A loaded model that answers texts; safe to call from several threads."""

    def __init__(self, model: TextClassifier, encoder: TextEncoder, labels: Sequence[str]) -> None:
        self._model = model.eval()
        self._encoder = encoder
        self.labels = tuple(labels)

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Return probabilities_bc, rows in the order of the texts."""
        if not texts:
            return torch.empty((0, len(self.labels)))
        ids_bl, mask_bl = self._encoder.pad(self._encoder.encode(texts))
        with torch.inference_mode():
            return torch.softmax(self._model(ids_bl, mask_bl), dim=-1)

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Return the likeliest label of each text and its probability."""
        best = self.probabilities(texts).max(dim=-1) if texts else None
        if best is None:
            return []
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(self.labels[index], float(value)) for value, index in pairs]


def load_classifier(files: Mapping[str, Content]) -> Predictor:
    """Build a predictor from the files of a model, in memory; weights are taken as they are, not copied.

    Raises CloisterError(MODEL_LOAD_FAILED) for missing, malformed or ill-fitting files.
    """
    absent = [name for name in MODEL_FILES if name not in files]
    if absent:
        raise _unloadable(f"the model lacks {', '.join(absent)}")
    texts = {name: content for name, content in files.items() if isinstance(content, bytes)}
    labels, preprocessing = _labels(texts["labels.json"]), _preprocessing(texts["preprocessing.json"])
    encoder = TextEncoder(vocabulary_from(texts["vocab.txt"]), preprocessing)
    config = config_from(texts["config.json"])
    _require_fit(config, encoder)
    weights = files[WEIGHTS]
    tensors = tensors_from(weights) if isinstance(weights, bytes) else weights
    body = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    model = TextClassifier(pretrained_encoder(config, body, attention="sdpa"), len(labels))
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    try:
        model.head.load_state_dict(head)
    except RuntimeError as error:
        raise _unloadable(f"the head does not fit {len(labels)} labels") from error
    return Predictor(model, encoder, labels)


def vocabulary_from(data: bytes) -> list[str]:
    """Parse vocab.txt: UTF-8, one token a line."""
    try:
        return data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise _unloadable("vocab.txt is not UTF-8") from error


def config_from(data: bytes) -> BertConfig:
    """Parse config.json of a BERT-architecture encoder (model_type "bert", which PERT and its kin carry)."""
    document = _json(data, "config.json")
    if not isinstance(document, dict) or document.get("model_type") != "bert":
        raise _unloadable('config.json is not of model_type "bert"')
    try:
        return BertConfig.from_dict(document)
    except (TypeError, ValueError) as error:
        raise _unloadable(f"config.json is not a BERT configuration: {str(error)[:300]}") from error


def tensors_from(data: bytes) -> dict[str, torch.Tensor]:
    """Parse model.safetensors."""
    try:
        return safetensors.torch.load(data)  # type: ignore[no-any-return]  # safetensors is untyped
    except (safetensors.SafetensorError, ValueError) as error:
        raise _unloadable(f"model.safetensors does not parse: {error}") from error


def _require_fit(config: BertConfig, encoder: TextEncoder) -> None:
    """Refuse what would end in an index error at the first rare character or long text."""
    length = encoder.preprocessing.max_length
    if config.vocab_size < len(encoder.vocabulary) or config.max_position_embeddings < length:
        raise _unloadable(
            f"config.json has {config.vocab_size} tokens and {config.max_position_embeddings} positions; "
            f"the vocabulary has {len(encoder.vocabulary)}, max_length is {length}"
        )


def _labels(data: bytes) -> list[str]:
    labels = _json(data, "labels.json")
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise _unloadable("labels.json is not a list of at least two names")
    return labels


def _preprocessing(data: bytes) -> Preprocessing:
    match _json(data, "preprocessing.json"):
        case {"format": str(fmt), "max_length": int(length), "head_share": float(share), "lower_case": bool(lower)} if (
            fmt == FORMAT and length >= 3 and 0 <= share <= 1
        ):
            return Preprocessing(length, share, lower)
    raise _unloadable(f"preprocessing.json is not of format {FORMAT}")


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise _unloadable(f"{name} is not JSON") from error


def _unloadable(why: str) -> CloisterError:
    return CloisterError(
        Code.MODEL_LOAD_FAILED,
        what="the text classifier cannot be loaded",
        why=why,
        todo="deploy a model directory that the text classifier job wrote, whole and unchanged",
    )
