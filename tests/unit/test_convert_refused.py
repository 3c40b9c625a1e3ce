"""Files of systems that have no model here: one line each, which names the system."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict

from vqgan import convert
from vqgan.convert.containers import write_torch
from vqgan.convert.refused import REFUSED
from vqgan.errors import InputError

TAMING = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight")

# Some names out of a file of each, by what has to be said of it.
FILES = {
    "VAR's multi-scale tokenizer": (
        *(*TAMING, "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"),
        "quantize.quant_resi.qresi_ls.0.weight",
    ),
    "MoVQ": (
        *(*TAMING, "quantize.embedding.weight"),
        "decoder.mid.block_1.norm1.conv_y.weight",
    ),
    "MaskGIT's transformer": (
        "params.Embed_0.word_embeddings.embedding",
        "params.TransformerLayer_0.Attention_0.self_attention.query.kernel",
        "params.MlmLayer_0.mlm_dense.kernel",
    ),
    "Infinity's transformer": (
        *("pos_start", "lvl_embed.weight", "word_embed.weight"),
        "text_proj_for_sos.ca.mat_kv.weight",
    ),
    "Infinity's BSQ tokenizer": (
        *("vae.encoder.down.0.block.0.conv1.conv.weight", "vae.quantizer.lfq.mask"),
    ),
    "VAR's transformer": (
        *("pos_start", "pos_1LC", "lvl_embed.weight", "word_embed.weight", "class_emb.weight"),
        "blocks.0.attn.mat_qkv.weight",
    ),
    "RAR's transformer": (
        *("cls_token", "blocks.0.attn.qkv.weight", "pos_embed", "target_aware_pos_embed"),
        "adaln_before_head.adaLN_modulation.1.weight",
    ),
    "TA-TiTok": (
        *("latent_tokens", "encoder.latent_token_positional_embedding"),
        *("decoder.text_guidance_proj.weight", "quantize.embedding.weight"),
    ),
    "TiTok, a 1D tokenizer": (
        *("latent_tokens", "encoder.latent_token_positional_embedding"),
        *("pixel_decoder.up.0.block.0.conv1.weight", "quantize.embedding.weight"),
    ),
    "TiTok's masked transformer (BERT)": (
        "model.embeddings.word_embeddings.weight",
        "model.encoder.layer.0.attention.self.query.weight",
        "model.lm_head.weight",
    ),
    "TiTok's masked transformer (U-ViT)": (
        *("embeddings.weight", "in_blocks.0.attn.qkv.weight", "out_blocks.0.skip_linear.weight"),
    ),
    "MaskGen's transformer (of latents)": (
        *("text_emb.weight", "text_pooled_emb.weight", "diffusion_pos_embed_learned"),
    ),
    "MaskGen's transformer (of codes)": (
        *("text_embed_proj.weight", "cond_pooled_proj.weight", "pos_embed", "lm_head.weight"),
    ),
    "MaskBit's tokenizer": (
        *("encoder.conv_in.weight", "encoder.down.0.res_blocks.0.conv1.weight"),
        *("encoder.mid.res_blocks.0.conv1.weight", "quantize.embedding.weight"),
    ),
    "MaskBit's transformer": (
        *("class_emb.weight", "pos_emb", "transformer.layers.0.0.mha.in_proj_weight"),
    ),
    "LWM's VQGAN": (
        *("encoder.DownsamplingBlock_0.ResnetBlock_0.Conv_0.kernel", "quantize.embeddings"),
    ),
    "LWM's language model": ("transformer.vte.embedding", "vision_head.kernel", "lm_head.kernel"),
    "UViM": ("params.bottleneck_downsample", "params.encoder_head.kernel", "state.dictionary"),
    "RQ-VAE": (
        *("state_dict.encoder.conv_in.weight", "state_dict.encoder.down.0.block.0.conv1.weight"),
        *("state_dict.quantizer.codebooks.0.weight", "state_dict.quant_conv.weight"),
        *("discriminator.main.0.weight",),
    ),
    "RQ-Transformer": (
        "body_transformer.blocks.0.attn.key.weight",
        "head_transformer.blocks.0.attn.key.weight",
    ),
    "ViT-VQGAN of enhancing-transformers": (
        *("state_dict.encoder.to_patch_embedding.0.weight", "state_dict.pre_quant.weight"),
        "state_dict.quantizer.embedding.weight",
    ),
    "the second stage of enhancing-transformers": (
        *("transformer.tok_emb_code.weight", "transformer.pos_emb_code"),
        *("stage1_model.encoder.to_patch_embedding.0.weight", "stage1_model.pre_quant.weight"),
    ),
    "BSQ-ViT": (
        "state_dict.module.encoder.transformer.resblocks.0.attn.in_proj_weight",
        "state_dict.module.quant_embed.weight",
    ),
    "Paella's VQ tokenizer": ("in_block.1.weight", "vquantizer.codebook.weight"),
    "the DALL-E dVAE": (
        "_modules.blocks._modules.group_1._modules.block_1._modules.res_path._modules.conv_1."
        "_parameters.w",
    ),
    "IBQ's transformer": (
        *("transformer.blocks.0.attention.wqkv.weight", "transformer.head_nm.ada_lin.1.weight"),
        *("first_stage_model.encoder.down.0.block.0.conv1.weight",),
        "first_stage_model.quantize.embedding.weight",
    ),
    "Open-MAGVIT2's transformer": (
        "transformer.spatial_blocks.0.attention.wqkv.weight",
        "transformer.factorized_blocks.0.attention.wqkv.weight",
    ),
    "Open-MAGVIT2's video tokenizer": (
        *("encoder.conv_in.conv_1.weight", "decoder.adaptive.0.gamma.weight"),
    ),
    "Muse's or aMUSEd's transformer": (
        *("embed.embeddings.weight", "transformer_layers.0.attn1.to_q.weight"),
    ),
    "a diffusion UNet of latent diffusion": (
        *("state_dict.model.diffusion_model.input_blocks.0.0.weight",),
        "state_dict.first_stage_model.encoder.conv_in.weight",
    ),
    "a diffusion UNet of diffusers": (
        *("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ),
    "a transformer of diffusers": (
        "pos_embed.proj.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ),
    "an autoencoder of diffusers": (
        *("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"),
        "decoder.up_blocks.0.resnets.0.conv1.weight",
    ),
    "latent diffusion's AutoencoderKL": (*TAMING, "post_quant_conv.weight", "loss.logvar"),
    "the state of an optimizer": ("state.0.step", "state.0.exp_avg", "state.0.exp_avg_sq"),
    "a pickled module": ("_modules.0._parameters.weight", "_modules.0._parameters.bias"),
}


def torch_file(path, names):
    """Whatever the framework was: the container does not matter to what is said."""
    tree = {tuple(name.split(".")): np.zeros((1, 1), np.float32) for name in names}
    write_torch(path, unflatten_dict(tree))
    return path


def refusal(path):
    with pytest.raises(InputError) as error:
        convert.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_system_is_refused_by_name(name, tmp_path):
    said = refusal(torch_file(tmp_path / "model.pt", FILES[name]))
    assert "this is " in said and name in said


def test_every_system_of_the_table_has_a_file_here():
    assert len(FILES) == len(REFUSED)
    for system in REFUSED:
        assert any(name in system.name and system.is_in(FILES[name]) for name in FILES), system.name


def test_a_flax_file_is_refused_as_well(tmp_path):
    path = tmp_path / "maskgit_imagenet256_checkpoint"
    names = FILES["MaskGIT's transformer"]
    tree = unflatten_dict({tuple(n.split(".")): np.zeros(1, np.float32) for n in names})
    path.write_bytes(msgpack_serialize(tree))
    assert "MaskGIT's transformer" in refusal(path)


def test_programs_and_archives_are_refused_before_their_tensors_are_seen(tmp_path):
    """As published: Cosmos in TorchScript, LWM as a plain pickle, UViM in npz."""
    script, plain, arrays = tmp_path / "encoder.jit", tmp_path / "vqgan", tmp_path / "uvim.npz"
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("encoder/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("encoder/code/__torch__.py", "")
    plain.write_bytes(pickle.dumps({"encoder": {"Conv_0": [1.0]}}, protocol=4))
    buffer = io.BytesIO()
    np.savez(buffer, **{"params/encoder_head/kernel": np.zeros(2)})
    arrays.write_bytes(buffer.getvalue())
    assert "TorchScript" in refusal(script)
    assert "not one of torch.save" in refusal(plain)
    assert "without data.pkl" in refusal(arrays)


def test_an_unknown_model_beside_its_optimizer_is_not_taken_for_an_optimizer(tmp_path):
    names = ("model.weight", "optimizer.state.0.exp_avg")
    said = refusal(torch_file(tmp_path / "last.pt", names))
    assert "no format known here" in said and "model.weight" in said


def test_marks_are_whole_components_of_a_name(tmp_path):
    names = [name.replace("vquantizer", "my_vquantizer") for name in FILES["Paella's VQ tokenizer"]]
    assert "no format known here" in refusal(torch_file(tmp_path / "model.pt", names))


def test_a_named_format_is_tried_whatever_the_file_looks_like(tmp_path):
    path = torch_file(tmp_path / "model.pt", FILES["VAR's multi-scale tokenizer"])
    with pytest.raises(InputError) as error:
        convert.load(path, format="taming")
    assert "this is VAR" not in str(error.value)
