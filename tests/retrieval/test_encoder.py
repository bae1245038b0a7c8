"""The item encoder on tiny random models: what is pooled, what must not matter, and the steps from
text vectors to item vectors.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rellax_ds import assets
from rellax_ds.errors import AssetError
from rellax_ds.partitions import process, split_rows
from rellax_ds.retrieval import item_text
from rellax_ds.retrieval.encoder import (
    ItemEncoder,
    batches,
    check_encoder,
    distinct_texts,
    finish_vectors,
)
from rellax_ds.retrieval.text_vectors import write_texts
from rellax_ds.testing import made_tables

TEMPLATE = "Movie: {title}. Genre: {genre}."


def tokenizer(special):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if special:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if special:
        names["pad_token"] = "[PAD]"
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(special=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(special=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    items = made_tables(tmp_path_factory.mktemp("items")).items
    return distinct_texts(item_text.render(items, TEMPLATE))[0]


@pytest.fixture
def make(texts, tmp_path):
    write_texts(tmp_path / "texts.arrow", texts)

    def make(model, batch_size=4, max_tokens=64):
        return ItemEncoder(
            texts_path=str(tmp_path / "texts.arrow"),
            model=str(model),
            batch_size=batch_size,
            max_tokens=max_tokens,
            device="cpu",
        )

    return make


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_encode_batch_size_and_neighbours_do_not_move_a_bit(kind, make, request, texts):
    model = request.getfixturevalue(kind)
    mixed = ["abc", "abcdefghijkl", "z", "some words 123", *texts]
    alone, together = (make(model, batch_size=size).encode(mixed) for size in (1, 64))
    some = make(model, batch_size=7).encode(mixed[::-3])
    assert (alone == together).all()
    assert (some == together[::-3]).all()
    assert np.abs(alone).max() > 0.1


def test_batches_hold_equal_lengths_without_padding():
    lengths = np.array([3, 1, 3, 0, 2, 3, 1])
    assert [rows.tolist() for rows in batches(lengths, 2)] == [[1, 6], [4], [0, 2], [5]]


def test_encode_causal_model_is_the_mean_of_the_normed_last_states(make, llama):
    encoder = make(llama)
    ids = torch.tensor([tokenizer(special=False)("abc x")["input_ids"]])
    with torch.inference_mode():
        states = AutoModel.from_pretrained(llama)(ids).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode(["abc x"])[0], states.mean(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("pooling_file", [False, True])
def test_encode_special_tokens_count_only_with_a_pooling_file(pooling_file, make, bert, tmp_path):
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if pooling_file:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    ids = torch.tensor([tokenizer(special=True)("abc")["input_ids"]])
    assert ids.shape[1] == 5
    with torch.inference_mode():
        states = AutoModel.from_pretrained(bert)(ids).last_hidden_state[0]
    expected = states.mean(0) if pooling_file else states[1:-1].mean(0)
    np.testing.assert_allclose(make(tmp_path).encode(["abc"])[0], expected.numpy(), atol=1e-6)


def test_encode_text_longer_than_the_model_is_cut(make, bert):
    encoder = make(bert, max_tokens=500)
    long = encoder.encode(["a" * 300, "a" * 22])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)


def test_encode_text_without_tokens_is_zero(make, llama):
    vectors = make(llama).encode(["", "abc"])
    assert not vectors[0].any()
    assert vectors[1].any()


def test_partitions_of_any_size_give_the_same_bytes(make, bert, texts, tmp_path):
    encoder = make(bert)
    whole = encoder.encode(texts)
    for rows in (7, 60):
        out, parts = tmp_path / str(rows), split_rows(len(texts), rows)
        for part in parts:
            process(encoder, part, out, "key")
        found = np.concatenate([np.load(out / f"{part.name}.npy") for part in parts])
        assert (found == whole).all()


@pytest.mark.assets
def test_encode_real_model_gives_the_same_bits_in_any_batch(make, texts):
    try:
        model = assets.resolve_model("all-minilm-l6-v2").reference
    except AssetError:
        pytest.skip("all-minilm-l6-v2 is not fetched")
    alone, together = (make(model, batch_size=size).encode(texts) for size in (1, 64))
    assert (alone == together).all()


def test_check_encoder_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"embeddings\.encoder: .* is no model"):
        check_encoder(str(tmp_path))


def test_distinct_texts_positions_lead_back_to_the_texts():
    texts = ["b", "", "a", "b", "c", "a"]
    found, position = distinct_texts(pa.array(texts))
    assert found == ["b", "a", "c"]
    assert [found[p] if p >= 0 else "" for p in position] == texts


def test_finish_vectors_rows_are_unit_and_items_without_text_zero():
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    finished = finish_vectors(vectors, np.array([3, -1, 0, 3]), None)
    assert finished.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(finished, axis=1), [1, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(finished[0], vectors[3] / np.linalg.norm(vectors[3]), atol=1e-6)
    assert (finished[0] == finished[3]).all()


def test_finish_vectors_full_rank_pca_keeps_centred_cosines():
    rng = np.random.default_rng(1)
    vectors = (rng.normal(size=(30, 6)) + 3).astype(np.float32)
    position = rng.permutation(np.repeat(np.arange(30), 2))
    finished = finish_vectors(vectors, position, 6)
    centred = vectors[position] - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(finished @ finished.T, centred @ centred.T, atol=1e-5)


def test_finish_vectors_pca_keeps_the_widest_axis_with_a_fixed_sign():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(40, 3)).astype(np.float32) * [0.1, 9, 0.1]
    finished = finish_vectors(vectors.astype(np.float32), np.arange(40), 1)
    assert (np.sign(finished[:, 0]) == np.sign(vectors[:, 1] - vectors[:, 1].mean())).all()


@pytest.mark.parametrize(("asked", "given"), [(2, 2), (100, 4), (5, 4)])
def test_finish_vectors_components_are_clamped(asked, given):
    vectors = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    position = np.array([0, 1, 2, 3, 4, -1])
    assert finish_vectors(vectors, position, asked).shape == (6, given)
