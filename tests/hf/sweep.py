"""Every causal language model that Transformers builds, made small, on two ranks: right, or refused by name.

python -m tests.hf.sweep            # writes tests/hf/sweep.jsonl, a line for each model type; half an hour
python -m tests.hf.sweep llama bert # prints the lines of these
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import shardsum
from shardsum.hf import generate, training
from shardsum.launching import launch

TABLE = Path(__file__).with_name("sweep.jsonl")
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VERSION = "5.23.0"  # of Transformers, which the table is of
LEAST_RIGHT = 60  # rows in which something is computed, and right
LENGTHS = (23, 300)
RANKS, NEW_TOKENS, TOGETHER = 2, 4, 12
LARGEST_PARAMETERS = 30_000_000
LOSS, GRADIENT, LOGITS = 1e-5, 2e-3, 1e-3  # relative norms, in float32
SECONDS = 240.0  # for a dozen types, and as much again for each

# What a size becomes, by the first pattern that its name matches.
SMALL: list[tuple[str, int]] = [
    (r"pad_token_id|bos_token_id|eos_token_id", -1),
    (r"vocab_size", 97),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length", 512),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r"head_dim|d_kv|attention_head_size|d_head", 8),
    (r"lora_rank|proj_rank", 8),
    (r"n_group|topk_group", 1),
    (r"experts_per_tok|top_?k|num_selected", 2),
    (r"experts", 4),
    (r"moe_.*intermediate|expert_.*intermediate|moe_ffn|expert_ffn", 16),
    (r"intermediate|ffn|d_ff|inner_dim|mlp_dim|n_inner", 64),
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|kv_n_heads", 2),
    (r"heads|n_head", 4),
    (r"num_hidden_layers|n_layers?$|num_layers|encoder_layers|decoder_layers|num_blocks", 2),
    (r"state_size|d_state", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|^dim$|width|d_embed", 32),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
]
# What one type needs besides, because its parts belong together in ways of their own.
_HEADS_OF_THEIR_OWN = {"num_key_value_heads": 4}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
# Types whose positions or embeddings are made from the number of padding.
PADDED = {
    "camembert",
    "data2vec-text",
    "gemma4",
    "gemma4_unified",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}
PADDED |= {"xlm-roberta-xl", "xmod"}
EXTRA: dict[str, dict[str, Any]] = {
    "axk2": _HEADS_OF_THEIR_OWN,
    "bamba": _MAMBA,
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "deepseek_v32": _HEADS_OF_THEIR_OWN,
    "ernie4_5_moe": {"moe_k": 2},
    "glm_moe_dsa": _HEADS_OF_THEIR_OWN,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": _ROPE,
    "hunyuan_v1_moe": _ROPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": _ROPE,
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def build(model_type: str) -> Any:
    """A random model of this type, small, with weights large enough that attention and its masks matter."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    config = kind(**{**small(kind().to_dict()), **EXTRA.get(model_type, {})})
    for each in (config, config.get_text_config(decoder=True)):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            with contextlib.suppress(Exception):  # some must be numbers
                setattr(each, name, 0 if model_type in PADDED and name == "pad_token_id" else None)
    if "is_decoder" in config.to_dict():
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(x.numel() for x in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST_PARAMETERS:
        raise ValueError(f"{size:,} parameters, of {kind.__name__} made small")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(2)
    return model


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that become other ones, in parts of it too."""
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and ("config" in name and value):
            kept = {"model_type": value["model_type"]} if value.get("model_type") else {}
            changed[name] = {**kept, **small(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SMALL if re.search(pattern, name)), None)
            if size is not None and size >= 0 and value > size:
                changed[name] = size
    if "qk_rope_head_dim" in changed:  # of which head_dim is made
        changed.pop("head_dim", None)
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    if isinstance(kinds, list) and kinds:
        chosen = list(dict.fromkeys(kinds))
        chosen += chosen[: max(2 - len(chosen), 0)]
        changed["layer_types" if "layer_types" in settings else "layers_block_type"] = chosen
        changed["num_hidden_layers"] = len(chosen)
    return changed


def tokens(length: int, batch: int) -> Tensor:
    return (torch.arange(batch * length).view(batch, length) * 7 + 3) ** 2 // 5 % 97


def trained(model: Any, length: int) -> str:
    ids = tokens(length, 2)
    alone = copy.deepcopy(model)
    expected = alone(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    models = [copy.deepcopy(model) for _ in range(RANKS)]

    def run(comm: Any) -> Tensor:
        with training(models[comm.rank], comm) as sharded:
            loss = sharded.loss(ids, ids)
            loss.backward()
            sharded.sum_gradients()
        return loss.detach()

    loss = launch(run, RANKS, "threads", deadline=60.0)[0]
    if not abs(loss - expected) <= LOSS * abs(expected):
        return f"WRONG: loss {loss:.7f}, right {expected:.7f}"
    for name, weight in alone.named_parameters():
        found = dict(models[0].named_parameters())[name].grad
        reference = torch.zeros_like(weight) if weight.grad is None else weight.grad
        found = torch.zeros_like(weight) if found is None else found
        if not (found - reference).norm() <= GRADIENT * reference.norm() + 1e-7:
            error = (found - reference).norm() / reference.norm()
            return f"WRONG: the gradient of {name} is {error:.2g} off"
    return "right"


def generated(model: Any, length: int) -> str:
    ids = tokens(length, 1)
    asked = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = copy.deepcopy(model).generate(ids, **asked)
    models = [copy.deepcopy(model) for _ in range(RANKS)]

    def run(comm: Any) -> Any:
        out = generate(models[comm.rank], ids, comm=comm, **asked)
        return {"sequences": out.sequences, "logits": torch.stack(out.logits)}

    found, logits = launch(run, RANKS, "threads", deadline=60.0)[0], torch.stack(expected.logits)
    if not (found["logits"] - logits).norm() <= LOGITS * logits.norm():
        return f"WRONG: logits {(found['logits'] - logits).norm() / logits.norm():.2g} off"
    return "right" if torch.equal(found["sequences"], expected.sequences) else "WRONG: other tokens"


def said(check: Any) -> str:
    """What a check found; "refused: ..." in a sentence of ours, "fails alone: ..." where Transformers does."""
    try:
        return str(check())
    except Exception as error:  # noqa: BLE001 (whatever it is goes into the table)
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = [file.startswith(str(Path(shardsum.__file__).parent)) for file in files]
        if isinstance(error, ValueError) and ours[-1]:
            return f"refused: {_first_line(error)}"
        return f"{'RAISES' if any(ours) else 'fails alone'}: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def row(model_type: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, str]:
    """What is true of one model type, in both uses and at each length."""
    found = {"type": model_type}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(model_type)
        except Exception as error:  # noqa: BLE001 (as above)
            return {**found, "not built": f"{type(error).__name__}: {_first_line(error)}"}
        for length in lengths:
            found[f"training {length}"] = said(functools.partial(trained, model, length))
            found[f"generation {length}"] = said(functools.partial(generated, model, length))
    return found


def is_sound(found: dict[str, str]) -> bool:
    """Whether nothing is wrong, silent or unclear in a row."""
    return not any(text.startswith(("WRONG", "RAISES", "HANGS")) for text in found.values())


def rows(types: list[str]) -> list[dict[str, str]]:
    """The rows of some types, in processes of a dozen each: one that hangs is named, and the others go on."""
    found: list[dict[str, str]] = []
    waiting = list(types)
    while waiting:
        some = waiting[:TOGETHER]
        command = [sys.executable, "-m", "tests.hf.sweep", *some]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS * 2, check=False)
            out = done.stdout
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if len(lines) < len(some):
            lines.append({"type": some[len(lines)], "training": "HANGS, or ended the process"})
        found += lines
        waiting = waiting[len(lines) :]
        print(f"{len(found)} of {len(types)}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for model_type in sys.argv[1:]:
            print(json.dumps(row(model_type)), flush=True)
        return
    TABLE.write_text("".join(json.dumps(found) + "\n" for found in rows(TYPES)))


if __name__ == "__main__":
    main()
