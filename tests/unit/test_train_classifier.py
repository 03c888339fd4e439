# SPDX-License-Identifier: Apache-2.0
"""The model files of the text classifier: what training writes is what serving loads, and nothing else loads."""

import json

import pytest
import safetensors.torch
import torch
from transformers import BertConfig

from cloister.errors import CloisterError, Code
from cloister.train.classifier import (
    MODEL_FILES,
    SPECIAL_TOKENS,
    Preprocessing,
    TextClassifier,
    TextEncoder,
    classifier_files,
    load_checkpoint,
    load_classifier,
    new_encoder,
    pretrained_encoder,
    tensors_from,
)

VOCABULARY = [*SPECIAL_TOKENS, *"很好差不房间。", "##a", "a"]


def tiny(*, dropout: float = 0.5, **preprocessing: object) -> tuple[TextClassifier, TextEncoder]:
    torch.manual_seed(3)
    encoder = TextEncoder(VOCABULARY, Preprocessing(**{"max_length": 16, **preprocessing}))  # type: ignore[arg-type]
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return TextClassifier(new_encoder(config, attention="eager"), 2, dropout=dropout), encoder


def files() -> dict[str, bytes]:
    model, encoder = tiny()
    made = classifier_files(model, encoder, ["negative", "positive"])
    return {
        name: content if isinstance(content, bytes) else safetensors.torch.save(dict(content))
        for name, content in made.items()
    }


def refused(model_files: dict[str, bytes]) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        load_classifier(model_files)
    assert caught.value.code is Code.MODEL_LOAD_FAILED
    return caught.value


def test_a_saved_model_answers_what_the_trained_one_does() -> None:
    model, encoder = tiny()
    predictor = load_classifier(classifier_files(model, encoder, ["negative", "positive"]))
    texts = ["房间很好。", "差", ""]
    ids, mask = encoder.pad(encoder.encode(texts))
    with torch.no_grad():
        wanted = torch.softmax(model.eval()(ids, mask), -1)
    assert torch.allclose(predictor.probabilities(texts), wanted, atol=1e-6)
    answers = predictor.predict(texts)
    assert [label for label, _ in answers] == [("negative", "positive")[int(row.argmax())] for row in wanted]
    assert all(0.5 <= probability <= 1 for _, probability in answers)
    assert predictor.predict([]) == []


def test_the_files_are_the_documented_five_and_the_labels_stand_in_the_config() -> None:
    made = files()
    assert tuple(made) == MODEL_FILES
    assert json.loads(made["config.json"])["id2label"] == {"0": "negative", "1": "positive"}
    assert {name.split(".")[0] for name in tensors_from(made["model.safetensors"])} == {"encoder", "head"}


def test_padding_does_not_change_an_answer() -> None:
    predictor = load_classifier(files())
    alone = predictor.probabilities(["好"])
    together = predictor.probabilities(["好", "房间不好。很差。"])
    assert torch.allclose(alone[0], together[0], atol=1e-6)


def test_long_texts_are_cut_to_max_length_from_the_ends_asked_for() -> None:
    _, whole_head = tiny()
    _, both_ends = tiny(head_share=0.25)
    text = "好" * 20 + "差" * 20
    assert len(whole_head.encode([text])[0]) == 16
    good, bad = VOCABULARY.index("好"), VOCABULARY.index("差")
    assert whole_head.encode([text])[0][1:-1] == [good] * 14
    assert both_ends.encode([text])[0][1:-1] == [good] * 4 + [bad] * 10
    assert load_classifier(files()).predict([text * 100])


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_without_one_of_its_files_does_not_load(name: str) -> None:
    made = files()
    del made[name]
    assert name in refused(made).why


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_with_a_garbled_file_does_not_load(name: str) -> None:
    refused({**files(), name: b"\xff\x00garbage"})


def test_a_missing_tensor_is_an_error_and_never_random_weights() -> None:
    made = files()
    tensors = tensors_from(made["model.safetensors"])
    del tensors["encoder.encoder.layer.0.output.dense.weight"]
    error = refused({**made, "model.safetensors": safetensors.torch.save(tensors)})
    assert "encoder.layer.0.output.dense.weight" in error.why


def test_a_tensor_of_another_shape_is_an_error() -> None:
    made = files()
    tensors = tensors_from(made["model.safetensors"])
    tensors["encoder.embeddings.word_embeddings.weight"] = torch.zeros(3, 16)
    refused({**made, "model.safetensors": safetensors.torch.save(tensors)})


def test_a_head_for_other_labels_is_an_error() -> None:
    refused({**files(), "labels.json": b'["a", "b", "c"]'})


def test_a_checkpoint_with_a_head_of_its_own_gives_its_encoder() -> None:
    model, _ = tiny()
    named = {f"bert.{name}": tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    named["cls.predictions.bias"] = torch.zeros(len(VOCABULARY))
    encoder = pretrained_encoder(model.encoder.config, named, attention="eager")
    wanted = model.encoder.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.state_dict().items())


class Checkpoint(dict[str, bytes]):
    """The files of a checkpoint."""

    @property
    def files(self) -> list[str]:
        return list(self)

    def read(self, name: str) -> bytes:
        return self[name]


def checkpoint(**changes: bytes | None) -> Checkpoint:
    """Return what save_pretrained writes of a model with a head, and its vocabulary."""
    model, encoder = tiny()
    weights = {f"bert.{name}": tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    weights["cls.predictions.bias"] = torch.zeros(len(VOCABULARY))
    found: dict[str, bytes | None] = {
        "config.json": model.encoder.config.to_json_string().encode(),
        "vocab.txt": "\n".join(encoder.vocabulary).encode() + b"\n",
        "model.safetensors": safetensors.torch.save(weights),
        **changes,
    }
    return Checkpoint({name: data for name, data in found.items() if data is not None})


def test_training_starts_from_a_checkpoints_weights_and_vocabulary() -> None:
    body, encoder = load_checkpoint(checkpoint(), Preprocessing(max_length=12), attention="eager")
    assert list(encoder.vocabulary) == VOCABULARY
    wanted = tiny()[0].encoder.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in body.state_dict().items())
    logits = TextClassifier(body, 3)(*encoder.pad(encoder.encode(["房间很好。" * 9])))
    assert logits.shape == (1, 3)


def test_a_checkpoint_that_is_only_a_pickle_is_refused_since_that_runs_code() -> None:
    pickled = checkpoint(**{"model.safetensors": None, "pytorch_model.bin": b"cos\nsystem\n"})
    with pytest.raises(CloisterError, match=r"no model\.safetensors") as caught:
        load_checkpoint(pickled, Preprocessing(max_length=12), attention="eager")
    assert "pickle" in caught.value.why


def test_texts_longer_than_the_checkpoints_positions_are_refused_before_training() -> None:
    with pytest.raises(CloisterError) as caught:
        load_checkpoint(checkpoint(), Preprocessing(max_length=17), attention="eager")
    assert "16 positions" in caught.value.why


def test_a_vocabulary_that_repeats_a_token_is_refused() -> None:
    with pytest.raises(CloisterError, match="cannot be loaded"):
        TextEncoder([*VOCABULARY, "好"], Preprocessing())
