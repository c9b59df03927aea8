"""Load a Hugging Face causal language model from the local disk, and say in one sentence why it can't be."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..arrays import appears_whole
from ..errors import Unsupported

# Bump when what is stored for a GGUF file changes.
_FORMAT = 1
_SAMPLE_BYTES = 1 << 20
# What llama-gguf-split calls the files of one model.
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
# What readers of configuration, safetensors and GGUF files raise for files that are not what they should be.
_BROKEN_FILE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    SafetensorError,
    struct.error,
)

# Transformers' verbosity, progress bars and Python's warning filters are global: one thread at a time.
_silence_lock = threading.RLock()


def load(path: str | os.PathLike[str], gguf_file: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Load (model, tokenizer) of a causal language model on this machine, ready to generate.

    `path` is a folder with config.json and safetensors, a GGUF file, or a folder with one (or `gguf_file` in
    it). Nothing is downloaded, no code from the model's folder is run and nothing is printed. A GGUF file is
    converted once, into `$XDG_CACHE_HOME/shardsum` (or `~/.cache/shardsum`).

    Raises: ValueError of one line: no such path, not a model, a broken or incomplete file, not a causal
    language model.
    """
    folder, gguf = _find(Path(path).expanduser(), gguf_file)
    if gguf is not None:
        folder = _convert(gguf, dtype)
    with silence(), _errors_in_one_line(path):
        return _from_folder(folder, dtype)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep Transformers from printing inside the block, whatever it warns of; settings are put back."""
    from transformers import utils

    theirs: Any = utils.logging  # its functions have no types
    with _silence_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
        theirs.set_verbosity(logging.CRITICAL)
        theirs.disable_progress_bar()
        try:
            yield
        finally:
            theirs.set_verbosity(verbosity)
            if bars:
                theirs.enable_progress_bar()


@contextlib.contextmanager
def _errors_in_one_line(path: object) -> Iterator[None]:
    """Raise whatever a reader of files raises inside the block as a ValueError of one line."""
    try:
        yield
    except Unsupported:
        raise
    except _BROKEN_FILE as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"can't load a model from {path}: {reason}") from error


def _find(path: Path, gguf_file: str | None) -> tuple[Path, Path | None]:
    """Return the model's folder, and the GGUF file if it is one."""
    if not path.exists():
        raise ValueError(f"no such model: {path} does not exist. Only models on this machine are loaded.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is not a model: expected a folder with config.json, or a .gguf file.")
        return path.parent, _whole_file(path)
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ValueError(f"no such model: {path} has no file {gguf_file}.")
        return path, _whole_file(path / gguf_file)
    if (path / "config.json").is_file():
        return path, None
    files = [_whole_file(file) for file in sorted(path.glob("*.gguf"))]
    if len(files) != 1:
        found = f"{len(files)} GGUF files; pass the path of one of them" if files else "neither"
        raise ValueError(f"{path} is not a model: expected config.json or one .gguf file in it, found {found}.")
    return path, files[0]


def _whole_file(gguf: Path) -> Path:
    """Return the path. Raises: Unsupported for one of several files that are one model together."""
    if (part := _PART.search(gguf.name)) is not None and int(part[1]) > 1:
        raise Unsupported(
            f"{gguf} is one of {int(part[1])} files of a model, which are not read together. Make one of them: "
            "llama-gguf-split --merge."
        )
    return gguf


def _from_folder(folder: Path, dtype: torch.dtype, **where: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False, **where}
    # Handed on, because reading it from a GGUF file takes seconds.
    config = AutoConfig.from_pretrained(folder, **local)
    _check_causal(config)
    auto: Any = AutoModelForCausalLM  # returns another type with output_loading_info
    model, info = auto.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
    )
    # Transformers fills weights that the file lacks with random numbers.
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ValueError(
            f"the file lacks {len(absent)} of the model's weights, or has them in other shapes: {absent[0]}."
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder, config=config, **local)


def _check_causal(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = config.architectures or []
    kind = names[0] if names else config.model_type
    causal = {name for entry in CAUSAL.values() for name in ((entry,) if isinstance(entry, str) else entry)}
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model, not a causal language model.")
    if config.model_type not in CAUSAL or (names and not causal & set(names)):
        raise ValueError(f"{kind} is not a causal language model.")


def _convert(gguf: Path, dtype: torch.dtype) -> Path:
    """Return a folder with the GGUF file's model as safetensors, made on the first call.

    Several processes and threads may ask at once: one converts, under a lock; the result appears whole.
    """
    from filelock import FileLock

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardsum"
    target = root / f"{gguf.stem}-{_identity(gguf, dtype)}"
    if target.is_dir():
        return target
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), silence():
        if target.is_dir():
            return target
        try:
            # Transformers' bar for this one can't be switched off; it writes to whatever stderr is.
            with (
                appears_whole(target) as unfinished,
                _errors_in_one_line(gguf),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                model, tokenizer = _from_folder(gguf.parent, dtype, gguf_file=gguf.name)
                _forget_quantization(model)
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
        except OSError:
            # A file system without locks lets two convert: the later one finds the first one's result.
            if not target.is_dir():
                raise
    return target


def _identity(file: Path, dtype: torch.dtype) -> str:
    """Identify a file by its size, time and both ends, and what is made of it."""
    stat = file.stat()
    with file.open("rb") as stream:
        head = stream.read(_SAMPLE_BYTES)
        stream.seek(max(stat.st_size - _SAMPLE_BYTES, 0))
        tail = stream.read()
    parts = f"{_FORMAT} {stat.st_size} {stat.st_mtime_ns} {dtype}".encode()
    return hashlib.blake2b(parts + head + tail, digest_size=10).hexdigest()


def _forget_quantization(model: Any) -> None:
    """Mark the weights as the plain ones they are by now; `save_pretrained` refuses a quantized model's."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
