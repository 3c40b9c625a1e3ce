"""taming-transformers' second stage, Net2NetTransformer: a minGPT over codes, into a Pipeline.

    first_stage_model.*    cond_stage_model.*    permuter.{forward,backward}_shuffle_idx
    transformer.{tok_emb,pos_emb,ln_f,head}      transformer.blocks.I.{ln1,ln2,attn,mlp}

The condition comes as tokens in front of the image's codes and shares their vocabulary: class c is
simply token c, an unconditional model starts with its SOS token, and the codes of a second
tokenizer stand there as they are. Here each has an embedding of its own, which starts as a copy of
the shared rows, so that the logits are the same. Rows and logits that stand for no code are left
out: with them, a sample could be an id that the tokenizer cannot decode.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from vqgan.convert import table, taming
from vqgan.convert.source import Imported, Source, fields
from vqgan.convert.table import Entry, Found, Layout, Table
from vqgan.errors import InputError
from vqgan.pipeline import Pipeline
from vqgan.prior.conditions import CodePrefix
from vqgan.prior.transformer import Prior, PriorConfig
from vqgan.tokenizer.model import Tokenizer

_PARAMS = (
    *("transformer_config", "first_stage_config", "cond_stage_config", "permuter_config"),
    *("sos_token", "unconditional", "downsample_cond_size", "pkeep"),
)
# Of the data and the training: no matter to the model.
_TRAINING = (
    *("target", "ckpt_path", "ignore_keys", "monitor"),
    *("first_stage_key", "cond_stage_key"),
)
_GPT = (
    *("vocab_size", "block_size", "n_layer", "n_head", "n_embd"),
    *("embd_pdrop", "resid_pdrop", "attn_pdrop", "n_unmasked"),
)
_OWN = ("transformer.", "first_stage_model.", "cond_stage_model.", "permuter.")


def recognise(source: Source) -> bool:
    """Whether the file holds taming's GPT beside its tokenizer."""
    return source.has(
        "transformer.tok_emb.weight",
        "transformer.blocks.0.attn.key.weight",
        "first_stage_model.encoder.conv_in.weight",
    )


def load(source: Source) -> Imported:
    """Both stages, and the tokenizer of the condition where there is one.

    Raises:
      InputError: there is no config, an option that is not here, or tensors that do not fit.
    """
    where = str(source.path)
    if source.config is None:
        raise InputError(
            f"{where}: its config is needed, which says how many heads there are and what the "
            "condition is; give the project.yaml with --config"
        )
    params = fields(
        taming.model_params(source.config, where),
        _PARAMS,
        where=f"{where}: model",
        ignored=_TRAINING,
        needed=("transformer_config", "first_stage_config", "cond_stage_config"),
    )
    if params.get("pkeep", 1.0) <= 0:
        raise InputError(
            f"{where}: pkeep {params['pkeep']}: such a model draws all codes at once, out of "
            "noise; there is no sampler for it here"
        )
    found = source.tensors
    notes: list[str] = []
    tokenizer = _tokenizer(found, "first_stage_model.", params["first_stage_config"], where, notes)
    condition_tokenizer = None
    if _kind(params) == "codes":
        config = params["cond_stage_config"]
        config = params["first_stage_config"] if config == "__is_first_stage__" else config
        condition_tokenizer = _tokenizer(found, "cond_stage_model.", config, where, notes)
    prior = _prior(found, params, tokenizer, condition_tokenizer, where, notes)
    _check_all_used(found, condition_tokenizer is not None, where)
    pipeline = Pipeline(tokenizer, prior, condition_tokenizer=condition_tokenizer)
    return Imported(format="net2net", model=pipeline, notes=tuple(notes))


def _tokenizer(found: Found, prefix: str, config: Any, where: str, notes: list[str]) -> Tokenizer:
    """A tokenizer inside the file; its training loss is left."""
    where = f"{where}: {prefix.rstrip('.')}"
    params = taming.model_params({"model": config}, where)
    inside = taming.below(found, prefix)
    model = taming.below(inside, "", but="loss.")
    said: list[str] = []
    tokenizer = taming.read_tokenizer(model, params, where=where, notes=said)
    if len(model) < len(inside):
        said.append(f"its loss was left, {len(inside) - len(model)} tensors")
    notes.extend(f"{prefix.rstrip('.')}: {note}" for note in said)
    return tokenizer


def _kind(params: Mapping[str, Any]) -> str:
    """What the condition is: "none", "class" or "codes"."""
    config = params.get("cond_stage_config")
    if config == "__is_unconditional__" or params.get("unconditional"):
        return "none"
    if config == "__is_first_stage__":
        return "codes"
    target = config.get("target", "") if isinstance(config, dict) else str(config)
    name = target.rsplit(".", 1)[-1]
    kinds = {"SOSProvider": "none", "Labelator": "class", "VQModel": "codes"}
    kinds |= {"VQSegmentationModel": "codes", "GumbelVQ": "codes"}
    if name not in kinds:
        raise InputError(
            f"cond_stage_config: conditions by {name or 'nothing'} are not here; there are "
            f"{', '.join(kinds)}"
        )
    return kinds[name]


def _prior(
    found: Found,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    condition_tokenizer: Tokenizer | None,
    where: str,
    notes: list[str],
) -> Prior:
    config = _prior_config(found, params, tokenizer, condition_tokenizer, where, notes)
    rows = np.arange(config.condition_rows)
    if _kind(params) == "none":
        rows = np.array([_sos_token(params)])
    return table.read(
        nnx.eval_shape(lambda: Prior(config, rngs=nnx.Rngs(0))),
        prior_table(config, rows),
        taming.below(found, "transformer."),
        where=f"{where}: transformer",
        ignore=(r"blocks\.\d+\.attn\.mask",),
    )


def _sos_token(params: Mapping[str, Any]) -> int:
    config = params.get("cond_stage_config")
    own = config.get("params", {}) if isinstance(config, dict) else {}
    return int(own.get("sos_token", params.get("sos_token", 0)))


def _prior_config(
    found: Found,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    condition_tokenizer: Tokenizer | None,
    where: str,
    notes: list[str],
) -> PriorConfig:
    gpt = params["transformer_config"].get("params", {})
    needed = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    gpt = fields(gpt, _GPT, where=f"{where}: transformer_config", needed=needed)
    if gpt.get("n_unmasked"):
        raise InputError(f"{where}: n_unmasked {gpt['n_unmasked']}: attention is causal here")
    side = tokenizer.config.autoencoder.resolution // tokenizer.factor
    prefix = None
    if condition_tokenizer is not None:
        model = condition_tokenizer.config.autoencoder
        size = params.get("downsample_cond_size", -1)
        rows = (size if size > 0 else model.resolution) // condition_tokenizer.factor
        prefix = CodePrefix(codebook_size=condition_tokenizer.codebook_size, grid=(rows, rows))
    classes = 0
    if _kind(params) == "class":
        classes = int(params["cond_stage_config"]["params"]["n_classes"])
    embedding = float(gpt.get("embd_pdrop", 0.0))
    config = PriorConfig(
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        num_classes=classes,
        null_class=classes == 0,
        prefix=prefix,
        order=_order(found, where),
        depth=gpt["n_layer"],
        heads=gpt["n_head"],
        width=gpt["n_embd"],
        position="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        dropout=float(gpt.get("resid_pdrop", embedding)),
        attention_dropout=float(gpt.get("attn_pdrop", 0.0)),
        label_dropout=0.0,
    )
    if config.dropout != embedding:
        notes.append(f"dropout of embeddings was {embedding}; here it is {config.dropout} as well")
    spare = gpt["block_size"] - config.slots(config.grid)
    if spare > 0:
        notes.append(f"{spare} of {gpt['block_size']} positions are behind the end, and were left")
    spare = gpt["vocab_size"] - config.codebook_size
    if spare > 0:
        notes.append(f"{spare} of {gpt['vocab_size']} tokens stand for no code, and were left")
    return config


def _order(found: Found, where: str) -> tuple[int, ...]:
    """The order of a permuter, which its buffers hold both ways."""
    forward, backward = (
        found.get(f"permuter.{way}_shuffle_idx") for way in ("forward", "backward")
    )
    if forward is None or backward is None:
        return ()
    order = forward.read().ravel()
    if not np.array_equal(np.argsort(order), backward.read().ravel()):
        raise InputError(f"{where}: permuter.backward_shuffle_idx does not undo the forward one")
    return tuple(int(position) for position in order)


def prior_table(config: PriorConfig, condition_rows: np.ndarray) -> Table:
    """Where each variable of a prior lies below `transformer.`.

    Args:
      condition_rows: the tokens whose embeddings the rows of the condition's start as.
    """
    slots = config.slots(config.grid)
    entries: Table = {
        "tokens.embedding": Entry(("tok_emb.weight",), _rows(np.arange(config.codebook_size))),
        "condition.embedding": Entry(("tok_emb.weight",), _rows(condition_rows)),
        "positions.embedding": Entry(("pos_emb",), Layout(lambda x: x[0, :slots])),
        "head.kernel": Entry(("head.weight",), Layout(lambda x: x[: config.codebook_size].T)),
    }
    rules = [
        (r"^norm\.", "ln_f."),
        (r"\.norm(\d)\.", r".ln\1."),
        (r"\.attention\.", ".attn."),
        (r"\.mlp\.up\.", ".mlp.0."),
        (r"\.mlp\.down\.", ".mlp.2."),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    abstract = nnx.eval_shape(lambda: Prior(config, rngs=nnx.Rngs(0)))
    return table.torch_table(abstract, rules) | entries


def _rows(rows: np.ndarray) -> Layout:
    return Layout(lambda x: x[rows])


def _check_all_used(found: Found, has_codes: bool, where: str) -> None:
    """Raises InputError for tensors that belong to no part."""
    owners = tuple(name for name in _OWN if has_codes or name != "cond_stage_model.")
    rest = [name for name in sorted(found) if not name.startswith(owners)]
    rest += [n for n in found if n.startswith("permuter.") and not n.endswith("_shuffle_idx")]
    if rest:
        raise InputError(f"{where}: {'; '.join(f'{name} is unexpected' for name in rest)}")
