"""The GGUF converter against a second dequantisation, transformers' own reader and a tiny file made
here.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rellax_ds import assets
from rellax_ds.errors import AssetError
from rellax_ds.gguf import convert

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, LAYERS = 4, 2, 16, 64, 96, 2
CONTROL, NORMAL = 3, 1
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
PARTS = {
    "self_attn.q_proj": ("attn_q", "Q4_1"),
    "self_attn.k_proj": ("attn_k", "Q4_1"),
    "self_attn.v_proj": ("attn_v", "Q4_1"),
    "self_attn.o_proj": ("attn_output", "Q4_1"),
    "mlp.gate_proj": ("ffn_gate", "Q8_0"),
    "mlp.up_proj": ("ffn_up", "Q4_1"),
    "mlp.down_proj": ("ffn_down", "F16"),
    "input_layernorm": ("attn_norm", "F32"),
    "post_attention_layernorm": ("ffn_norm", "F32"),
}


def vocabulary():
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "Ġ t", "Ġt he", "1 9", "19 7"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    tokens = control + sorted(ByteLevel.alphabet()) + [m.replace(" ", "") for m in merges]
    return tokens, [CONTROL] * len(control) + [NORMAL] * (len(tokens) - len(control)), merges


def gguf_names(tied):
    names = {
        "model.embed_tokens.weight": ("token_embd.weight", "Q8_0"),
        "model.norm.weight": ("output_norm.weight", "F32"),
    }
    if not tied:
        names["lm_head.weight"] = ("output.weight", "Q8_0")
    for layer in range(LAYERS):
        for name, (part, kind) in PARTS.items():
            names[f"model.layers.{layer}.{name}.weight"] = (f"blk.{layer}.{part}.weight", kind)
    return names


def rotary_rows(heads):
    """File row of every checkpoint row: head h, half s, pair i lies at h, i, s in the file."""
    half = HEAD_DIM // 2
    return [h * HEAD_DIM + 2 * i + s for h in range(heads) for s in range(2) for i in range(half)]


def write_gguf(path, *, tied=True, arch="llama", pre="smollm", drop=(), extra=(), fields=None):
    """Write a random tiny Llama as llama.cpp would; returns each tensor's name, kind and bytes."""
    tokens, kinds, merges = vocabulary()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(7)
    state = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in (fields or {}).items():
        writer.add_string(key, value)
    written = {}
    names = gguf_names(tied)
    for name in (*names, *extra):
        if name in drop:
            continue
        target, kind = names.get(name, (name, "F32"))
        weight = state[name].numpy() if name in state else np.ones(4, np.float32)
        if weight.ndim == 1:
            weight = np.random.default_rng(len(name)).uniform(0.5, 1.5, weight.shape)
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                weight = weight[np.argsort(rotary_rows(heads))]
        weight = weight.astype(np.float32)
        quantisation = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(weight, quantisation)
        writer.add_tensor(target, data, raw_dtype=quantisation)
        written[name] = (kind, data.tobytes(), weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def dequantise(kind, raw, shape):
    """The formats as llama.cpp documents them, written without the gguf package."""
    if kind in ("F32", "F16"):
        values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[kind])
    elif kind == "Q8_0":
        blocks = np.frombuffer(raw, [("d", "<f2"), ("q", "i1", 32)])
        values = blocks["d"].astype(np.float32)[:, None] * blocks["q"]
    else:
        assert kind == "Q4_1"
        blocks = np.frombuffer(raw, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
        nibbles = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
        scale, least = (blocks[field].astype(np.float32)[:, None] for field in ("d", "m"))
        values = scale * nibbles + least
    return values.astype(np.float32).reshape(shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    source, target = folder / "tiny.gguf", folder / "converted"
    target.mkdir()
    written = write_gguf(source)
    convert(source, target)
    return source, target, written


def test_convert_mixed_quantisation_gives_the_values_of_a_second_dequantisation(tiny):
    _, target, written = tiny
    found = load_file(target / "model.safetensors")
    assert found.keys() == written.keys()
    for name, (kind, raw, shape) in written.items():
        expected = dequantise(kind, raw, shape)
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                expected = expected[rotary_rows(heads)]
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_convert_tensor_longer_than_one_block_of_rows_is_written_whole(tmp_path, monkeypatch, tiny):
    source, target, _ = tiny
    monkeypatch.setattr("rellax_ds.gguf._ROWS_AT_ONCE", 50)
    convert(source, tmp_path)
    again = (tmp_path / "model.safetensors").read_bytes()
    assert again == (target / "model.safetensors").read_bytes()


def test_convert_model_has_the_logits_of_transformers_own_gguf_reader(tiny):
    source, target, _ = tiny
    own = AutoModelForCausalLM.from_pretrained(target)
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    ids = torch.tensor([[1, 50, 60, 70, 80, 90, 100, 2]])
    with torch.no_grad():
        assert torch.equal(own(ids).logits, theirs(ids).logits)


def test_convert_model_can_be_trained_and_saved(tiny, tmp_path):
    _, target, _ = tiny
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.tensor([[1, 50, 60]])
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_convert_untied_model_keeps_its_own_output_matrix(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    written = write_gguf(tmp_path / "untied.gguf", tied=False)
    convert(tmp_path / "untied.gguf", target)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert not model.config.tie_word_embeddings
    expected = dequantise(*written["lm_head.weight"])
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), expected)


def test_convert_tokenizer_splits_digits_and_prepends_nothing(tiny):
    _, target, _ = tiny
    tokens, _, _ = vocabulary()
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer(" the1979<|im_end|><file_sep>").input_ids
    assert [tokens[i] for i in ids] == ["Ġthe", *"1979", "<|im_end|>", "<file_sep>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " the1979"
    assert tokenizer.decode(tokenizer("naïve 日本  7").input_ids) == "naïve 日本  7"
    assert tokenizer(" the", return_tensors="pt").keys() == {"input_ids", "attention_mask"}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>a<|im_end|>\n"


def test_convert_folder_names_theta_and_tokenizer_class_as_older_transformers_reads_them(tiny):
    _, target, _ = tiny
    config = json.loads((target / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rms_norm_eps"] == 1e-5
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]  # no token types


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arch": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"drop": ("model.layers.1.mlp.up_proj.weight",)}, "model.layers.1.mlp.up_proj.weight"),
        ({"extra": ("rope_freqs.weight",)}, "rope_freqs.weight"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type 'yarn'"),
    ],
)
def test_convert_form_it_does_not_cover_is_refused_by_name(tmp_path, change, named):
    target = tmp_path / "out"
    target.mkdir()
    write_gguf(tmp_path / "odd.gguf", **change)
    with pytest.raises(AssetError, match=r"odd\.gguf") as caught:
        convert(tmp_path / "odd.gguf", target)
    assert named in str(caught.value)
    assert not list(target.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["magic", "middle of header", "end"])
def test_convert_damaged_file_is_refused(tiny, tmp_path, damage):
    source, _, _ = tiny
    data = source.read_bytes()
    cut = {"magic": b"X" + data[1:], "middle of header": data[:3000], "end": data[:-5000]}
    (tmp_path / "cut.gguf").write_bytes(cut[damage])
    with pytest.raises(AssetError, match=r"cut\.gguf: not a whole GGUF file"):
        convert(tmp_path / "cut.gguf", tmp_path)


def test_resolve_model_local_gguf_file_is_converted_once_into_the_cache(
    tiny, tmp_path, monkeypatch
):
    source, _, _ = tiny
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path))
    first = assets.resolve_model(source)
    made = (first.path / "model.safetensors").stat()
    second = assets.resolve_model(str(source))
    assert (second.path / "model.safetensors").stat().st_ino == made.st_ino
    assert first.identity == second.identity
    assert hashlib.sha256(source.read_bytes()).hexdigest() in first.identity
    monkeypatch.setattr("rellax_ds.gguf.CONVERTER_VERSION", 2)
    assert assets.resolve_model(source).reference != first.reference
    assert AutoModelForCausalLM.from_pretrained(first.reference).config.hidden_size == HIDDEN


@pytest.fixture(scope="module")
def smollm():
    name = "smollm2-135m-instruct"
    try:
        found = assets.resolve_model(name)
    except AssetError as error:
        pytest.skip(str(error))
    return found


@pytest.mark.assets
def test_smollm_checkpoint_holds_the_values_of_the_gguf_file(smollm):
    from safetensors import safe_open

    known = assets.ASSETS["smollm2-135m-instruct"]
    source = smollm.path.parent.parent / "assets" / smollm.name / known.gguf
    if not source.exists():
        pytest.skip(f"{source} was removed after the conversion")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    names = {
        "token_embd": ("model.embed_tokens", None),
        "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", 9),
        "blk.17.attn_k": ("model.layers.17.self_attn.k_proj", 3),
        "blk.17.attn_v": ("model.layers.17.self_attn.v_proj", None),
        "blk.29.ffn_down": ("model.layers.29.mlp.down_proj", None),
        "output_norm": ("model.norm", None),
    }
    with safe_open(smollm.path / "model.safetensors", "numpy") as checkpoint:
        assert len(list(checkpoint.keys())) == len(stored) == 272
        for name, (target, heads) in names.items():
            tensor = stored[f"{name}.weight"]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            expected = dequantise(tensor.tensor_type.name, tensor.data.tobytes(), shape)
            if heads is not None:
                rows = [h * 64 + 2 * i + s for h in range(heads) for s in (0, 1) for i in range(32)]
                expected = expected[rows]
            np.testing.assert_array_equal(checkpoint.get_tensor(f"{target}.weight"), expected)


@pytest.mark.assets
def test_smollm_tokenizer_gives_the_published_ids(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm.reference)
    oracle = {
        "Alien (1979)": [32595, 264, 365, 33, 41, 39, 41, 25],
        "Yes": [10539],
        "No": [5230],
        " Yes": [9230],
        " No": [2838],
        ".": [30],
        "  123": [256, 33, 34, 35],
        "<|im_start|>": [1],
        "<|im_end|>": [2],
        "<|endoftext|>": [0],
    }
    assert {text: tokenizer(text).input_ids for text in oracle} == oracle


@pytest.mark.assets
def test_smollm_greedy_continuation_of_the_capital_of_france_is_paris(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm.reference)
    model = AutoModelForCausalLM.from_pretrained(smollm.reference)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"
